"""Token files and batches.

A prepared folder holds train.bin and valid.bin (ids in the smallest unsigned type, little-endian), tokenizer.json,
and data.json (counts, hashes, where the text came from).
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from timemix.config import DataConfig
from timemix.errors import UserError
from timemix.files import atomic_folder, check_regular, is_count, read_json
from timemix.sources import read_source
from timemix.tokenizer import UNKNOWN, Tokenizer, load_tokenizer, train_tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Corpus:
    """Tokens (tokens,) of both splits, memory-mapped, the tokenizer that made them, and data.json."""

    train: np.ndarray
    valid: np.ndarray
    tokenizer: Tokenizer
    info: dict[str, Any]


def prepare(out: Path, config: DataConfig, *, tokenizer: Tokenizer | None = None, progress: bool = False) -> Corpus:
    """Reads a text, makes its tokenizer, and writes the prepared folder `out`, whole or not at all.

    Held out for validation is the source `valid`, or what a download brings along, or the last `valid_fraction` of the
    characters. The tokenizer is made from the training text; one of characters, where the validation text is a part of
    the source, from all of it.

    `tokenizer`: one that is made already. `progress` shows downloads on stderr.

    Raises UserError as `read_source` and `train_tokenizer` do, for validation characters outside the vocabulary, and
    when `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder")
    texts, files, made = _tokenize(config, progress, tokenizer)
    splits = {}
    for split, text in texts.items():
        ids, unknown = _encode(made, split, text)
        splits[split] = ids, _counts(text, ids, unknown)
    if config.valid_tokens is not None and len(splits["valid"][0]) > config.valid_tokens:
        kept = spread(splits["valid"][0], config.valid_tokens)
        splits["valid"] = kept, _counts_of_ids(made, kept)
    return _write(out, made, splits, {"files": files, "encoding": config.encoding})


def hold_out_end(corpus: Corpus, out: Path, *, share: float = 0.05, valid_tokens: int | None = None) -> Corpus:
    """Writes a prepared folder whose validation text is the end of the training text of `corpus`.

    `share` of its tokens are held out, then thinned to `valid_tokens` as by `prepare`: choices made on it leave the
    validation text of `corpus` unseen. Raises UserError as `prepare` does.
    """
    cut = int((1 - share) * len(corpus.train))
    parts = {"train": corpus.train[:cut], "valid": spread(corpus.train[cut:], valid_tokens)}
    splits = {split: (ids, _counts_of_ids(corpus.tokenizer, ids)) for split, ids in parts.items()}
    return _write(out, corpus.tokenizer, splits, {name: corpus.info[name] for name in ("files", "encoding")})


def spread(ids: np.ndarray, tokens: int | None, pieces: int = 20) -> np.ndarray:
    """At most `tokens` of `ids`, in pieces of like length spread evenly from its beginning to its end; None: all."""
    if tokens is None or len(ids) <= tokens:
        return ids
    pieces = min(pieces, tokens)
    ends = [tokens * i // pieces for i in range(pieces + 1)]
    gap = len(ids) - tokens
    starts = [a + gap * i // max(pieces - 1, 1) for i, a in enumerate(ends[:-1])]
    return np.concatenate([ids[s : s + b - a] for s, a, b in zip(starts, ends, ends[1:], strict=False)])


def _write(out: Path, made: Tokenizer, splits: dict[str, tuple[np.ndarray, dict]], origin: dict[str, Any]) -> Corpus:
    """A prepared folder of the tokens and counts of each split."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder")
    info: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        **origin,
        "dtype": made.dtype.name,
        "tokenizer": {"kind": made.kind, "vocab_size": made.vocab_size, "sha256": made.hash},
    }
    with atomic_folder(out) as folder:
        for split, (ids, counts) in splits.items():
            raw = ids.astype(made.dtype.newbyteorder("<")).tobytes()
            (folder / f"{split}.bin").write_bytes(raw)
            info[split] = counts | {"sha256": hashlib.sha256(raw).hexdigest()}
        made.save(folder / "tokenizer.json")
        (folder / "data.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    return open_corpus(out)


def describe(config: DataConfig, *, progress: bool = False) -> dict[str, Any]:
    """What `prepare` would make of a text, in numbers; raises as it does."""
    texts, files, made = _tokenize(config, progress)
    whole = "".join(texts.values())
    report: dict[str, Any] = {
        "files": len(files),
        "characters": len(whole),
        "bytes": len(whole.encode("utf-8")),
        "distinct_characters": len(set(whole)),
        "sha256": hashlib.sha256(whole.encode("utf-8")).hexdigest(),
        "tokenizer": made.kind,
        "vocab_size": made.vocab_size,
    }
    for split, text in texts.items():
        report[split] = _counts(text, *_encode(made, split, text))
    return report


def _tokenize(
    config: DataConfig, progress: bool, tokenizer: Tokenizer | None = None
) -> tuple[dict[str, str], list[str], Tokenizer]:
    """Text of each split, the files they came from, and the tokenizer."""
    read = read_source(config.source, encoding=config.encoding, progress=progress)
    valid = None if read.valid is None else replace(read, text=read.valid, files=())
    if config.valid is not None:
        valid = read_source(config.valid, encoding=config.encoding, progress=progress)
    if valid is not None:
        texts = {"train": read.text, "valid": valid.text}
        basis = read.text
    else:
        cut = int((1 - config.valid_fraction) * len(read.text))
        texts = {"train": read.text[:cut], "valid": read.text[cut:]}
        basis = read.text if config.tokenizer == "character" else texts["train"]
    made = tokenizer or train_tokenizer(config.tokenizer, basis, vocab_size=config.vocab_size, unknown=config.unknown)
    return texts, [*read.files, *(valid.files if valid is not None else ())], made


def text_hash(config: DataConfig) -> str:
    """sha256 of the text that a config names, or of the tokens of a prepared folder; raises as `prepare` does."""
    if is_corpus(Path(config.source)):
        info = open_corpus(Path(config.source)).info
        parts = [info[split]["sha256"] for split in SPLITS]
    else:
        read = read_source(config.source, encoding=config.encoding)
        parts = [read.text, read.valid or ""]
        if config.valid is not None:
            parts[1] = read_source(config.valid, encoding=config.encoding).text
    return hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()


def _encode(tokenizer: Tokenizer, split: str, text: str) -> tuple[np.ndarray, int]:
    """Ids and the number of unknown pieces; where none may be unknown, an error names them."""
    if tokenizer.unknown == "error":
        try:
            return tokenizer.encode(text), 0
        except UserError as error:
            raise UserError(f"the {split} text does not fit: {error}") from None
    return tokenizer.encode_lenient(text)


def _counts(text: str, ids: np.ndarray, unknown: int) -> dict[str, int]:
    return {
        "tokens": len(ids),
        "characters": len(text),
        "bytes": len(text.encode("utf-8")),
        "unknown": unknown,
    }


def _counts_of_ids(tokenizer: Tokenizer, ids: np.ndarray) -> dict[str, int]:
    text = tokenizer.decode(ids)
    return _counts(text, ids, text.count(UNKNOWN) if tokenizer.unknown == "unk" else 0)


def is_corpus(path: Path) -> bool:
    """Whether a path is a prepared folder."""
    return os.path.isfile(path / "data.json") and os.path.isfile(path / "train.bin")


def open_run_corpus(run: Path, source: str) -> Corpus:
    """Tokens that a run was made with: its source where that is a prepared folder, else its own `data`."""
    return open_corpus(Path(source) if is_corpus(Path(source)) else run / "data")


def open_corpus(folder: Path) -> Corpus:
    """A prepared folder, its tokens memory-mapped.

    Raises UserError when a file is missing, damaged, or does not fit the others.
    """
    path = folder / "data.json"
    info = read_json(path)
    try:
        version = info["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format_version {version}; this timemix reads {FORMAT_VERSION}")
        counts = {split: info[split]["tokens"] for split in SPLITS}
        tokenizer_hash = info["tokenizer"]["sha256"]
        if not all(is_count(info[split][n]) for split in SPLITS for n in ("tokens", "characters", "bytes", "unknown")):
            raise ValueError("a count is no number")
        if not all(isinstance(info[split]["sha256"], str) for split in SPLITS):
            raise ValueError("a hash is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.hash != tokenizer_hash:
        raise UserError(f"{folder / 'tokenizer.json'} is not the tokenizer that made the tokens beside it")
    splits = {split: _map_tokens(folder / f"{split}.bin", counts[split], tokenizer) for split in SPLITS}
    return Corpus(splits["train"], splits["valid"], tokenizer, info)


def _map_tokens(path: Path, count: int, tokenizer: Tokenizer) -> np.ndarray:
    dtype = tokenizer.dtype.newbyteorder("<")
    check_regular(path)
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise UserError(f"{path} has {size} bytes, not {count * dtype.itemsize}: it is damaged")
        # An empty file cannot be mapped.
        tokens = np.memmap(path, dtype, "r") if count else np.empty(0, dtype)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if count and int(tokens.max()) >= tokenizer.vocab_size:
        raise UserError(f"{path} holds the id {int(tokens.max())}, outside the vocabulary: it is damaged")
    return tokens


class Batches:
    """Batches of windows, a function of the step alone: nothing else is needed to go on after a stop.

    order "random": windows at uniformly random places, as the 2021 code took them. "epoch": windows side by side, each
    once per epoch, in a new order and from a new starting point in every epoch. Calling with a step gives (inputs,
    targets), each (batch_size, ctx_len) int64, targets one token later; with a step and a slice, those rows of it.

    Raises UserError for a text shorter than a window and its next token.
    """

    def __init__(self, tokens: np.ndarray, *, batch_size: int, ctx_len: int, seed: int, order: str = "random") -> None:
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


def validation_windows(tokens: np.ndarray, ctx_len: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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
