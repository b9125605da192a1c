"""Prepared folders and batches.

A prepared folder holds the ids of both splits in train-00000.bin and so on (smallest unsigned type, little-endian),
tokenizer.json, and data.json (counts, hashes, where the text came from).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from timemix.data.shards import Tokens, check_shard, map_shards, shard_name
from timemix.errors import DamagedFile
from timemix.storage.json_files import is_count, read_json
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.make import load_tokenizer

DATA_FORMAT_VERSION = 2
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Corpus:
    """Tokens of both splits, memory-mapped, the tokenizer that made them, and data.json."""

    train: Tokens
    valid: Tokens
    tokenizer: Tokenizer
    info: dict[str, Any]


def evenly_spaced(ids: np.ndarray | Tokens, tokens: int | None, pieces: int = 20) -> np.ndarray | Tokens:
    """At most `tokens` of `ids`, in pieces of like length spread evenly from its beginning to its end; None: all."""
    if tokens is None or len(ids) <= tokens:
        return ids
    pieces = min(pieces, tokens)
    ends = [tokens * i // pieces for i in range(pieces + 1)]
    gap = len(ids) - tokens
    starts = [a + gap * i // max(pieces - 1, 1) for i, a in enumerate(ends[:-1])]
    return np.concatenate([ids[s : s + b - a] for s, a, b in zip(starts, ends, ends[1:], strict=False)])


def text_size(tokenizer: Tokenizer, tokens: Tokens) -> tuple[int, int]:
    """Characters and bytes (UTF-8) of the text that tokens decode to."""
    characters = bytes_ = 0
    for text in tokenizer.texts(tokens.blocks()):
        characters += len(text)
        bytes_ += len(text.encode())
    return characters, bytes_


def is_corpus(path: Path) -> bool:
    """Whether a path is a prepared folder."""
    names = ("train.bin", shard_name("train", 0))
    return os.path.isfile(path / "data.json") and any(os.path.isfile(path / name) for name in names)


def open_run_corpus(run: Path, source: str) -> Corpus:
    """Tokens that a run was made with: its source where that is a prepared folder, else its own `data`."""
    return open_corpus(Path(source) if is_corpus(Path(source)) else run / "data")


def open_corpus(folder: Path) -> Corpus:
    """A prepared folder, its tokens memory-mapped; every file is read once and checked against its hash.

    Raises DamagedFile when a file is missing, damaged, or does not fit the others.
    """
    path = folder / "data.json"
    info = read_json(path)
    try:
        version = info["format_version"]
        if version not in (1, DATA_FORMAT_VERSION):
            raise DamagedFile(f"{path} has format_version {version}; this timemix reads 1 and {DATA_FORMAT_VERSION}")
        if not all(is_count(info[split][n]) for split in SPLITS for n in ("tokens", "characters", "bytes", "unknown")):
            raise ValueError("a count is no number")
        shards = {split: _shards(folder, split, info[split], version) for split in SPLITS}
        tokenizer_hash = info["tokenizer"]["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {error!r}") from error
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.hash != tokenizer_hash:
        raise DamagedFile(f"{folder / 'tokenizer.json'} is not the tokenizer that made the tokens beside it")
    dtype = tokenizer.dtype.newbyteorder("<")
    for split in SPLITS:
        for place, shard in shards[split].items():
            check_shard(place, dtype, shard, tokenizer.vocab_size)
    train, valid = (map_shards(list(shards[split]), dtype) for split in SPLITS)
    return Corpus(train, valid, tokenizer, info)


def _shards(folder: Path, split: str, counts: dict[str, Any], version: int) -> dict[Path, dict[str, Any]]:
    """Tokens and sha256 of each token file of a split; raises ValueError and the like where data.json is damaged."""
    if version == 1:
        found = {folder / f"{split}.bin": counts}
    else:
        found = {folder / shard_name(split, number): shard for number, shard in enumerate(counts["shards"])}
    for shard in (counts, *found.values()):
        if not (is_count(shard["tokens"]) and isinstance(shard["sha256"], str)):
            raise ValueError(f"no count and hash: {shard}")
    if sum(shard["tokens"] for shard in found.values()) != counts["tokens"]:
        raise ValueError(f"the shards of {split} have other tokens than the split")
    return found
