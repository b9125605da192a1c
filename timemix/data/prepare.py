"""Resumable preparation of a text of any size, piece by piece, as a prepared folder."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from timemix._version import __version__
from timemix.data import shards
from timemix.data.config import DataConfig
from timemix.data.corpus import (
    DATA_FORMAT_VERSION,
    SPLITS,
    Corpus,
    DataInfo,
    SplitInfo,
    TokenizerInfo,
    counted_info,
    evenly_spaced,
    open_corpus,
    part_size,
)
from timemix.data.duplicates import DocumentCounts
from timemix.data.pipeline import Done, Piece, Text, encoded, no_counts
from timemix.data.shards import ShardWriter, Tokens, map_split, mask_of, shard_name
from timemix.errors import FileError, InUse, InvalidValue, Unfit
from timemix.runtime.progress import ShowProgress
from timemix.storage.files import (
    LARGEST_OF_TEXT,
    appear,
    atomic_folder,
    check_name,
    explained,
    refuse_existing,
    write_text,
)
from timemix.storage.json_files import to_json, to_record
from timemix.storage.locks import claimed
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.make import load_tokenizer
from timemix.tokenizers.pieces import PART


def prepare(
    out: Path, config: DataConfig, *, tokenizer: Tokenizer | None = None, progress: ShowProgress = False
) -> Corpus:
    """Tokenize a text, and save the tokens as a prepared folder in one atomic step.

    The validation text is `config.valid`, the validation text of a download, or a held-out share of the source. The
    held-out share is the last `valid_fraction` of the characters of each file, or of the whole source if `hold_out` is
    "end", or random documents if `hold_out` is "documents". No document is in both splits. A new tokenizer is trained
    on the training text. A character vocabulary also includes the characters of a held-out share.

    The text is read several times, in pieces. Several processes encode a large text, so a script that calls `prepare`
    needs `if __name__ == "__main__"`. Memory use does not grow with the text, with two exceptions. The training of a
    word or subword tokenizer holds all distinct words in memory. Word, subword and World tokenizers hold a whole text
    in memory if the text has no spaces or line ends.

    A stopped call leaves a folder .NAME.unfinished beside `out`, with the tokenizer and the finished token files. The
    next call with the same arguments and the same text resumes from the unfinished folder.

    Args:
        out: Folder to create.
        config: Source of the text, split and tokenizer.
        tokenizer: An existing tokenizer to use. Default: a new tokenizer, or the World tokenizer if `config` names it.
        progress: Whether to show the progress on standard error, or a function for progress lines.

    Returns:
        The prepared folder, open.

    Raises:
        AlreadyExists: `out` exists.
        InUse: Another process is preparing `out`.
        InvalidValue: The text is empty, not in its encoding or of too many files, or `config` contradicts `tokenizer`.
        Unfit: The validation text has characters outside the vocabulary, or the text changed during the call.
        FileError: A file is missing, damaged, not text, or cannot be written.
        Unavailable: A download failed, or a process ran out of memory.
    """
    check_name(out)
    refuse_existing(out)
    if tokenizer is not None:
        _refuse_other(config, tokenizer)
    lock = out.with_name(f".{out.name}.lock")
    with claimed(lock) as mine:
        if not mine:
            raise InUse(f"another process is preparing {out}; wait until it ends, or choose another folder")
        try:
            refuse_existing(out)
            with explained(out):
                _prepare(out, config, tokenizer, progress)
        finally:
            lock.unlink(missing_ok=True)
    return open_corpus(out)


def _prepare(out: Path, config: DataConfig, tokenizer: Tokenizer | None, progress: ShowProgress) -> None:
    text = Text(config, progress, tokenizer)
    # In data.json, a path also has an indent of two spaces, a comma and a newline. Half of the file is for the shards.
    if sum(len(json.dumps(path)) + 4 for path in text.files) > LARGEST_OF_TEXT // 2:
        raise InvalidValue(
            f"the text has {len(text.files):,} files, whose paths are too long together for data.json; join some files"
        )
    folder = out.with_name(f".{out.name}.unfinished")
    state = _State(folder, text)
    try:
        made = state.tokenizer(text, progress)
        splits = _write_splits(state, text, made, progress)
    except Unfit:
        shutil.rmtree(folder)
        raise
    if config.shuffle is not None:
        splits["train"] = _shuffled(folder, made, splits["train"], config.shuffle)
    if config.valid_tokens is not None and splits["valid"].tokens > config.valid_tokens:
        splits["valid"] = _thinned(folder, made, splits["valid"], config.valid_tokens)
    _write_info(
        folder, made, splits, tuple(text.files), config.encoding, text.held_out, config.template, text.documents
    )
    appear(folder, out)
    (out / _State.FILE).unlink()


def hold_out_end(corpus: Corpus, out: Path, *, share: float = 0.05, valid_tokens: int | None = None) -> Corpus:
    """Write a prepared folder whose validation text is the end of another folder's training text.

    Settings can be tuned on the new folder while the validation text of `corpus` stays unseen.

    Args:
        corpus: A prepared folder.
        out: Folder to create.
        share: Share of the training tokens to hold out, from 0 to 1.
        valid_tokens: Largest number of validation tokens, in evenly spaced pieces. Default: all tokens.

    Returns:
        The new prepared folder, open.

    Raises:
        AlreadyExists: `out` exists.
        CannotWrite: `out` cannot be written.
    """
    refuse_existing(out)
    cut = int((1 - share) * len(corpus.train))
    train = corpus.info.train
    parts: list[tuple[str, np.ndarray | Tokens, tuple[int, int] | None]] = [
        ("train", corpus.train.part(slice(cut)), train.first),
        ("valid", evenly_spaced(corpus.train.part(slice(cut, None)), valid_tokens), None),
    ]
    with atomic_folder(out) as folder:
        splits = {
            split: _write_ids(folder, split, corpus.tokenizer, ids, corpus.train, train, first)
            for split, ids, first in parts
        }
        corpus.tokenizer.save(folder / "tokenizer.json")
        held_out = f"the last {100 * share:g} % of the training text"
        info = corpus.info
        _write_info(folder, corpus.tokenizer, splits, info.files, info.encoding, held_out, info.template)
    return open_corpus(out)


class _State:
    """Folder of an unfinished preparation.

    The file unfinished.json stores the settings and the finished part of each split.
    """

    FILE = "unfinished.json"

    def __init__(self, folder: Path, text: Text) -> None:
        self.folder = folder
        settings = {k: v for k, v in asdict(text.config).items() if k not in ("source", "valid", "order")}
        sizes: dict[str, Any] = {"part": PART, "shard": shards.SHARD_BYTES, "valid": text.valid is not None}
        sizes |= {"made": None if text.made is None else text.made.hash}
        self._content: dict[str, Any] = {"version": __version__, "text": text.hash, "settings": settings | sizes}
        self._done: dict[str, Done] = {}
        self._has_mask = text.config.template is not None

    def tokenizer(self, text: Text, progress: ShowProgress) -> Tokenizer:
        """Return the tokenizer of the folder if it fits the text. Otherwise, empty the folder and train a tokenizer."""
        path = self.folder / "tokenizer.json"
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, FileError):
            found = json.loads((self.folder / self.FILE).read_text(encoding="utf-8"))
            made = load_tokenizer(path)
            done = {split: to_record(data, Done) for split, data in found.pop("splits").items()}
            if found == self._content | {"tokenizer": made.hash}:
                self._content, self._done = found, done
                for stray in self.folder.glob(".*"):
                    # Remove files that a killed process left partly written.
                    stray.unlink()
                return made
        made = text.train_tokenizer(progress)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        made.save(path)
        self._content |= {"tokenizer": made.hash}
        self._done = {}
        self._save()
        return made

    def writer(self, split: str, made: Tokenizer) -> ShardWriter:
        """Return a writer that continues after a split's finished token files, or at the start if a file is damaged."""
        has_mask = self._has_mask
        with contextlib.suppress(FileError):
            done = self._done.get(split)
            shards = () if done is None else done.shards
            return ShardWriter(
                self.folder, split, made.dtype, shards=shards, vocab_size=made.vocab_size, has_mask=has_mask
            )
        self._done.pop(split, None)
        return ShardWriter(self.folder, split, made.dtype, has_mask=has_mask)

    @property
    def begun(self) -> dict[str, Done]:
        """The finished part of each split."""
        return dict(self._done)

    def done(self, split: str, done: Done) -> None:
        """Save the finished part of a split."""
        self._done[split] = done
        self._save()

    def _save(self) -> None:
        splits = {split: to_json(done) for split, done in self._done.items()}
        write_text(self.folder / self.FILE, json.dumps(self._content | {"splits": splits}))


def _write_splits(state: _State, text: Text, made: Tokenizer, progress: ShowProgress) -> dict[str, SplitInfo]:
    """Write both splits to token files, and return their records for data.json."""
    writers = {split: state.writer(split, made) for split in SPLITS}
    begun = state.begun
    counts = {split: no_counts() for split in SPLITS}
    for split, done in begun.items():
        counts[split] |= {"tokens": done.tokens, "unknown": done.unknown}
    with contextlib.closing(encoded(text, made, counts, begun, progress)) as given:
        for split, group in itertools.groupby(given, lambda piece: piece.split):
            _write_split(state, writers[split], made, split, counts[split], group)
    for writer in writers.values():
        # If a split has no text, leaving the `with` block creates its empty token file.
        with writer:
            pass
    return {
        split: SplitInfo(
            **counts[split],
            sha256=writers[split].sha256,
            first=text.first.get(split),
            shards=tuple(writers[split].shards),
            counted=counted_info(writers[split], made),
        )
        for split in SPLITS
    }


def _write_split(
    state: _State, writer: ShardWriter, made: Tokenizer, split: str, counts: dict[str, int], encoded: Iterator[Piece]
) -> None:
    """Write the pieces of a split.

    Args:
        state: Object that saves the finished part of the split after each token file.
        writer: Writer of the token files.
        made: The tokenizer.
        split: "train" or "valid".
        counts: Counts of all pieces before the newest piece.
        encoded: The pieces.
    """
    place = Done((), 0, None, 0, 0)

    def finished() -> None:
        # After unknown characters, save no finished part, so that the next call reports all unknown characters.
        if made.unknown != "error" or not place.unknown:
            state.done(split, replace(place, shards=tuple(writer.shards)))

    writer.finished = finished
    with writer:
        for piece in encoded:
            place = Done((), piece.number, piece.before, counts["tokens"], counts["unknown"])
            if made.unknown != "error" or not place.unknown + piece.unknown:
                new = slice(max(0, writer.tokens - place.tokens), None)
                writer.add(piece.ids[new], None if piece.counted is None else piece.counted[new])
        place = Done((), piece.number + 1, None, counts["tokens"], counts["unknown"])


def _thinned(folder: Path, made: Tokenizer, valid: SplitInfo, tokens: int) -> SplitInfo:
    """Reduce the validation tokens to evenly spaced pieces, and return the new record for data.json.

    Args:
        folder: Folder of the token files.
        made: The tokenizer.
        valid: Record of the whole validation text.
        tokens: Number of tokens to keep.
    """
    whole = _taken(folder, "valid", made, valid)
    return _write_ids(folder, "valid", made, evenly_spaced(whole, tokens), whole, valid, valid.first)


def _shuffled(folder: Path, made: Tokenizer, train: SplitInfo, seed: int) -> SplitInfo:
    """Shuffle the documents of the training tokens, and return the new record for data.json.

    Args:
        folder: Folder of the token files.
        made: The tokenizer.
        train: Record of the training text.
        seed: Random seed of the order.
    """
    whole = _taken(folder, "train", made, train)
    starts = np.fromiter(_starts(whole, made), np.int64, train.documents + 1)
    with ShardWriter(folder, "train", made.dtype, has_mask=whole.counted is not None) as writer:
        for numbers in np.array_split(
            np.random.default_rng(seed).permutation(train.documents), train.documents // 1000 + 1
        ):
            parts = [whole.part(slice(starts[i], starts[i + 1])) for i in numbers.tolist()]
            for ids, counted in Tokens.joined(parts).masked_blocks():
                writer.add(ids, counted)
    first = made.spelled_size([writer.mapped()[:1]])
    info = counted_info(writer, made)
    return replace(train, sha256=writer.sha256, first=first, shards=tuple(writer.shards), counted=info)


def _starts(tokens: Tokens, made: Tokenizer) -> Iterator[int]:
    """Yield the place of the first token of each document, then the number of tokens."""
    yield 0
    before = 0
    for block in tokens.blocks():
        yield from (before + 1 + np.flatnonzero(block == made.end_of_text)).tolist()
        before += len(block)


def _taken(folder: Path, split: str, made: Tokenizer, info: SplitInfo) -> Tokens:
    """Return the tokens of a split, and unlink the files, so that other tokens can be written in their place."""
    whole = map_split(folder, split, made.dtype, info.shards or ())
    for name in (split, mask_of(split)):
        for number in range(len(info.shards or ())):
            (folder / shard_name(name, number)).unlink(missing_ok=True)
    return whole


def _write_ids(
    folder: Path,
    split: str,
    made: Tokenizer,
    ids: np.ndarray | Tokens,
    whole: Tokens,
    text: SplitInfo,
    first: tuple[int, int] | None,
) -> SplitInfo:
    """Write a part of a text as a split, and return the record of the split for data.json.

    Args:
        folder: Folder of the token files.
        split: "train" or "valid".
        made: The tokenizer.
        ids: Token ids of the split, (tokens,).
        whole: Token ids of the text.
        text: Record of the text.
        first: Number of characters and bytes of the first token, None if unknown.
    """
    tokens = ids if isinstance(ids, Tokens) else Tokens([ids], ids.dtype)
    with ShardWriter(folder, split, made.dtype, has_mask=tokens.counted is not None) as writer:
        unknown = documents = 0
        for block, counted in tokens.masked_blocks():
            writer.add(block, counted)
            documents += int((block == made.end_of_text).sum()) if text.documents else 0
            unknown += int((block == made.vocab_size - 1).sum()) if made.unknown == "unk" else 0
    characters, bytes_ = part_size(made, tokens, whole, text)
    return SplitInfo(
        tokens=len(tokens),
        characters=characters,
        bytes=bytes_,
        unknown=unknown,
        documents=documents,
        sha256=writer.sha256,
        first=first,
        shards=tuple(writer.shards),
        counted=counted_info(writer, made),
    )


def _write_info(
    folder: Path,
    made: Tokenizer,
    splits: dict[str, SplitInfo],
    files: tuple[str, ...],
    encoding: str,
    held_out: str,
    template: str | None,
    documents: dict[str, DocumentCounts] | None = None,
) -> None:
    info = DataInfo(
        format_version=DATA_FORMAT_VERSION,
        files=files,
        encoding=encoding,
        dtype=made.dtype.name,
        tokenizer=TokenizerInfo(made.kind, made.vocab_size, made.hash),
        train=splits["train"],
        valid=splits["valid"],
        held_out=held_out,
        template=template,
        documents=None if documents is None else documents.get("train"),
        valid_documents=None if documents is None else documents.get("valid"),
    )
    write_text(folder / "data.json", json.dumps(to_json(info), indent=1) + "\n")


def _refuse_other(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Raise InvalidValue if settings contradict an existing tokenizer."""
    for name, asked, own in config.contradictions({"tokenizer": tokenizer.kind, "unknown": tokenizer.unknown}):
        raise InvalidValue(
            f"data.{name}={asked!r} contradicts the vocabulary of the trained model, whose data.{name} is {own!r};"
            f" leave data.{name} out, or train a new model from random weights"
        )
