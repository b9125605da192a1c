"""Prepared folders and batches.

A prepared folder holds the ids of both splits in train-00000.bin and so on (smallest unsigned type, little-endian),
tokenizer.json, and data.json (counts, hashes, where the text came from).
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from timemix.data.shards import Shard, Tokens, check_shard, map_shards, shard_name
from timemix.errors import DamagedFile, MissingFile
from timemix.storage.files import check_name
from timemix.storage.json_files import OPTIONAL, Count, Misfit, read_json, to_record
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.make import load_tokenizer

DATA_FORMAT_VERSION = 2
SPLITS = ("train", "valid")


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What data.json says of a split: its counts, the sha256 of its tokens, and its token files.

    first: characters and bytes of the text of its first token, which no model predicts; None where it is not known. A
    folder of format version 1 names no files: each split has one.
    """

    tokens: Count
    characters: Count
    bytes: Count
    unknown: Count
    sha256: str
    first: tuple[Count, Count] | None = field(default=None, metadata=OPTIONAL)
    shards: tuple[Shard, ...] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class TokenizerInfo:
    """What data.json says of the tokenizer."""

    kind: str
    vocab_size: Count
    sha256: str


@dataclass(frozen=True)
class DataInfo:
    """data.json of a prepared folder; `held_out`: what the validation text is, in words."""

    format_version: int
    files: tuple[str, ...]
    encoding: str
    dtype: str
    tokenizer: TokenizerInfo
    train: SplitInfo
    valid: SplitInfo
    held_out: str | None = field(default=None, metadata=OPTIONAL)

    def split(self, name: str) -> SplitInfo:
        return {"train": self.train, "valid": self.valid}[name]


@dataclass(frozen=True)
class Corpus:
    """Tokens of both splits, memory-mapped, the tokenizer that made them, and data.json."""

    train: Tokens
    valid: Tokens
    tokenizer: Tokenizer
    info: DataInfo


def evenly_spaced(ids: np.ndarray | Tokens, tokens: int | None, pieces: int = 20) -> np.ndarray | Tokens:
    """At most `tokens` of `ids`, in pieces of like length spread evenly from its beginning to its end; None: all."""
    if tokens is None or len(ids) <= tokens:
        return ids
    pieces = min(pieces, tokens)
    ends = [tokens * i // pieces for i in range(pieces + 1)]
    gap = len(ids) - tokens
    starts = [a + gap * i // max(pieces - 1, 1) for i, a in enumerate(ends[:-1])]
    return np.concatenate([ids[s : s + b - a] for s, a, b in zip(starts, ends, ends[1:], strict=False)])


def part_size(tokenizer: Tokenizer, part: Tokens, whole: Tokens, text: SplitInfo) -> tuple[int, int]:
    """Characters and bytes (UTF-8) of the text of `part`, some of the tokens `whole` of a text.

    Exact where tokens decode to their text. With a word vocabulary or <unk>, the sizes of the text are divided in
    proportion to the sizes of the tokens.

    Args:
        tokenizer: The tokenizer that made the tokens.
        part: Tokens among `whole`.
        whole: All tokens of the text.
        text: The counts of the text.
    """
    own, all_ = tokenizer.spelled_size(part.blocks()), tokenizer.spelled_size(whole.blocks())
    characters, bytes_ = (
        round(real * mine / max(total, 1))
        for real, mine, total in zip((text.characters, text.bytes), own, all_, strict=True)
    )
    return characters, bytes_


def is_corpus(path: Path) -> bool:
    """Whether a path is a prepared folder."""
    names = ("train.bin", shard_name("train", 0))
    return os.path.isfile(path / "data.json") and any(os.path.isfile(path / name) for name in names)


def open_run_corpus(run: Path, source: str) -> Corpus:
    """Tokens that a run was made with: its own `data`, else the prepared folder that is its source.

    Raises FileError as `open_corpus` does, and MissingFile where there is neither.
    """
    own = run / "data"
    if own.is_dir():
        return open_corpus(own)
    if not is_corpus(Path(source)):
        raise MissingFile(
            f"the tokens of {run} are missing: there is no folder {own}, and {source} is no prepared folder; move back"
            " the one that was there"
        )
    return open_corpus(Path(source))


def open_corpus(folder: Path) -> Corpus:
    """A prepared folder, its tokens memory-mapped; every file is read once and checked against its hash.

    Raises FileError when a file is missing, damaged, or does not fit the others.
    """
    check_name(folder)
    path = folder / "data.json"
    data = read_json(path)
    version = data.get("format_version")
    if version is not None and version not in (1, DATA_FORMAT_VERSION):
        raise DamagedFile(f"{path} has format_version {version}; this timemix reads 1 and {DATA_FORMAT_VERSION}")
    try:
        info = to_record(data, DataInfo)
        shards = {split: _shards(folder, split, info) for split in SPLITS}
    except Misfit as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.hash != info.tokenizer.sha256:
        raise DamagedFile(f"{folder / 'tokenizer.json'} is not the tokenizer that made the tokens beside it")
    dtype = tokenizer.dtype.newbyteorder("<")
    for split in SPLITS:
        for place, shard in shards[split].items():
            check_shard(place, dtype, shard, tokenizer.vocab_size)
    train, valid = (map_shards(list(shards[split]), dtype) for split in SPLITS)
    return Corpus(train, valid, tokenizer, info)


def _shards(folder: Path, split: str, info: DataInfo) -> dict[Path, Shard]:
    """Path of each token file of a split. Raises Misfit where the files have other tokens than the split."""
    counts = info.split(split)
    if info.format_version == 1:
        return {folder / f"{split}.bin": Shard(counts.tokens, counts.sha256)}
    found = {folder / shard_name(split, number): shard for number, shard in enumerate(counts.shards or ())}
    if sum(shard.tokens for shard in found.values()) != counts.tokens:
        raise Misfit(f"the shards of {split} have other tokens than the split")
    return found
