"""Prepared folders and batches.

A prepared folder holds the ids of both splits in train-00000.bin and so on (smallest unsigned type, little-endian),
tokenizer.json, and data.json (counts, hashes, where the text came from).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from timemix.errors import UserError
from timemix.files import is_count, read_json
from timemix.shards import Tokens, check_shard, map_shards, shard_name
from timemix.tokenizer import Tokenizer, load_tokenizer

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

    Raises UserError when a file is missing, damaged, or does not fit the others.
    """
    path = folder / "data.json"
    info = read_json(path)
    try:
        version = info["format_version"]
        if version not in (1, DATA_FORMAT_VERSION):
            raise UserError(f"{path} has format_version {version}; this timemix reads 1 and {DATA_FORMAT_VERSION}")
        if not all(is_count(info[split][n]) for split in SPLITS for n in ("tokens", "characters", "bytes", "unknown")):
            raise ValueError("a count is no number")
        shards = {split: _shards(folder, split, info[split], version) for split in SPLITS}
        tokenizer_hash = info["tokenizer"]["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.hash != tokenizer_hash:
        raise UserError(f"{folder / 'tokenizer.json'} is not the tokenizer that made the tokens beside it")
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


class Batches:
    """Batches of windows, a function of the step alone: nothing else is needed to go on after a stop.

    order "random": windows at uniformly random places, as the 2021 code took them. "epoch": windows side by side, each
    once per epoch, in a new order and from a new starting point in every epoch. Calling with a step gives (inputs,
    targets), each (batch_size, ctx_len) int64, targets one token later; with a step and a slice, those rows of it.

    Raises UserError for a text shorter than a window and its next token.
    """

    def __init__(
        self, tokens: np.ndarray | Tokens, *, batch_size: int, ctx_len: int, seed: int, order: str = "random"
    ) -> None:
        if len(tokens) < ctx_len + 1:
            raise UserError(
                f"the training text has {len(tokens)} tokens; a window of ctx_len {ctx_len} needs {ctx_len + 1}:"
                " take more text or a smaller --model.ctx-len"
            )
        self._tokens, self._batch_size, self._ctx_len = tokens, batch_size, ctx_len
        self._seed, self._order = seed, order
        # The starting point of an epoch lies anywhere that still leaves this many windows.
        self._windows = max(1, (len(tokens) - 1) // ctx_len - 1)
        self._slack = min(ctx_len - 1, len(tokens) - 1 - self._windows * ctx_len)
        self._epoch = -1
        self._epoch_starts = np.empty(0, np.int64)

    def __call__(self, step: int, part: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        starts = self._starts(step)[part]
        rows = np.stack([self._tokens[s : s + self._ctx_len + 1] for s in starts]).astype(np.int64)
        return rows[:, :-1], rows[:, 1:]

    def _starts(self, step: int) -> np.ndarray:
        if self._order == "random":
            return _generator(self._seed, step).integers(0, len(self._tokens) - self._ctx_len, self._batch_size)
        number = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, places = np.divmod(number, self._windows)
        return np.array([self._starts_of_epoch(e)[p] for e, p in zip(epochs.tolist(), places, strict=True)])

    def _starts_of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = _generator(self._seed, epoch)
            first = generator.integers(0, self._slack + 1)
            self._epoch, self._epoch_starts = epoch, first + generator.permutation(self._windows) * self._ctx_len
        return self._epoch_starts


def _generator(seed: int, counter: int) -> np.random.Generator:
    """Randomness of a step or an epoch, from nothing but (seed, counter)."""
    return np.random.Generator(np.random.Philox(key=seed | counter << 64))


def validation_windows(
    tokens: np.ndarray | Tokens, ctx_len: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of ctx_len side by side over a whole text: (inputs, targets), int64, every target once.

    The last window, where shorter, comes alone.
    """
    whole = (len(tokens) - 1) // ctx_len
    for first in range(0, whole, batch_size):
        last = min(first + batch_size, whole)
        span = tokens[first * ctx_len : last * ctx_len + 1].astype(np.int64)
        yield span[:-1].reshape(-1, ctx_len), span[1:].reshape(-1, ctx_len)
    rest = tokens[whole * ctx_len :].astype(np.int64)
    if len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:]
