"""Prepared folders: each folder holds the token ids of a text and the tokenizer.

A prepared folder contains

- train-00000.bin, ..., valid-00000.bin, ...: token ids of both splits (smallest unsigned type, little-endian),
- train-loss-00000.bin, ..., valid-loss-00000.bin, ..., for conversations only: the loss mask, with one byte for each
  token, which is 1 if the loss counts the token as a target, and otherwise 0,
- tokenizer.json: the tokenizer,
- data.json: counts (also of dropped documents), hashes, and the paths of the text files.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from timemix.data.config import DataConfig
from timemix.data.duplicates import DocumentCounts
from timemix.data.shards import MASK_TYPE, Shard, ShardWriter, Tokens, check_shard, map_shards, mask_of, shard_name
from timemix.errors import DamagedFile, InvalidValue, MissingFile
from timemix.storage.files import LARGEST_OF_TEXT, check_name
from timemix.storage.json_files import OPTIONAL, Count, Misfit, read_json, to_record
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.make import load_tokenizer

DATA_FORMAT_VERSION = 2
SPLITS = ("train", "valid")


@dataclass(frozen=True, kw_only=True)
class CountedInfo:
    """Hash of the loss mask of a split and counts of its counted tokens, as stored in data.json."""

    tokens: Count
    """Number of tokens that the loss counts."""
    characters: Count
    """Number of characters that these tokens represent, without the first token of the split."""
    bytes: Count
    """Number of UTF-8 bytes that these tokens represent, without the first token of the split."""
    sha256: str
    """Hash of the mask, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """Counts, hash and token files of a split, as stored in data.json."""

    tokens: Count
    """Number of tokens."""
    characters: Count
    """Number of characters of the text."""
    bytes: Count
    """Number of bytes of the text in UTF-8."""
    unknown: Count
    """Number of characters or words outside the vocabulary."""
    sha256: str
    """Hash of all token ids, in hexadecimal."""
    documents: Count = field(default=0, metadata=OPTIONAL)
    """Number of documents, each of which an end-of-text token ends."""
    first: tuple[Count, Count] | None = field(default=None, metadata=OPTIONAL)
    """Number of characters and bytes of the first token, None if unknown. No model predicts the first token."""
    shards: tuple[Shard, ...] | None = field(default=None, metadata=OPTIONAL)
    """The token files. The value is None in format version 1, because version 1 stores each split in one file."""
    counted: CountedInfo | None = field(default=None, metadata=OPTIONAL)
    """The loss mask; None: the loss counts all tokens."""


@dataclass(frozen=True)
class TokenizerInfo:
    """Kind, vocabulary size and hash of a tokenizer, as stored in data.json."""

    kind: str
    vocab_size: Count
    sha256: str


@dataclass(frozen=True)
class DataInfo:
    """Content of data.json in a prepared folder."""

    format_version: int
    files: tuple[str, ...]
    """Paths of the files of the text."""
    encoding: str
    """Encoding of the text files."""
    dtype: str
    """NumPy type of the token ids."""
    tokenizer: TokenizerInfo
    train: SplitInfo
    valid: SplitInfo
    held_out: str | None = field(default=None, metadata=OPTIONAL)
    """Description of the validation text, such as "the last 10 % of builtin"."""
    template: str | None = field(default=None, metadata=OPTIONAL)
    """Name of the chat template of the conversations; None: the text has no conversations."""
    documents: DocumentCounts | None = field(default=None, metadata=OPTIONAL)
    """Counts of the documents of the source, None if it is one document."""
    valid_documents: DocumentCounts | None = field(default=None, metadata=OPTIONAL)
    """Counts of the documents of a validation text with its own source."""

    def split(self, name: str) -> SplitInfo:
        """Return the record of the split "train" or "valid"."""
        return {"train": self.train, "valid": self.valid}[name]


@dataclass(frozen=True)
class Corpus:
    """An open prepared folder."""

    train: Tokens
    """Token ids of the training text, memory-mapped."""
    valid: Tokens
    """Token ids of the validation text, memory-mapped."""
    tokenizer: Tokenizer
    """The tokenizer of the training and validation text."""
    info: DataInfo
    """Content of data.json."""


def evenly_spaced(ids: np.ndarray | Tokens, tokens: int | None, pieces: int = 20) -> np.ndarray | Tokens:
    """Return a part of a text: evenly spaced pieces of about equal length.

    Args:
        ids: Token ids of the text, (n,).
        tokens: Largest number of tokens to return, or None for all tokens.
        pieces: Number of pieces.
    """
    if tokens is None or len(ids) <= tokens:
        return ids
    pieces = min(pieces, tokens)
    ends = [tokens * i // pieces for i in range(pieces + 1)]
    gap = len(ids) - tokens
    starts = [a + gap * i // max(pieces - 1, 1) for i, a in enumerate(ends[:-1])]
    places = [slice(s, s + b - a) for s, a, b in zip(starts, ends, ends[1:], strict=False)]
    if isinstance(ids, Tokens):
        return Tokens.joined([ids.part(place) for place in places])
    return np.concatenate([ids[place] for place in places])


def part_size(tokenizer: Tokenizer, part: Tokens, whole: Tokens, text: SplitInfo) -> tuple[int, int]:
    """Return the number of characters and of UTF-8 bytes of a part of a text.

    The numbers of characters and bytes are exact if decoding the tokens gives the original text. With a word vocabulary
    or <unk>, the numbers are estimates, in proportion to the size of the decoded tokens.

    Args:
        tokenizer: Tokenizer of the text.
        part: Tokens of the part.
        whole: All tokens of the text.
        text: Counts of the whole text.
    """
    own, all_ = tokenizer.spelled_size(part.blocks()), tokenizer.spelled_size(whole.blocks())
    characters, bytes_ = (
        round(real * mine / max(total, 1))
        for real, mine, total in zip((text.characters, text.bytes), own, all_, strict=True)
    )
    return characters, bytes_


def counted_info(writer: ShardWriter, tokenizer: Tokenizer) -> CountedInfo | None:
    """Return the record of the loss mask of a finished split; None: the loss counts all tokens."""
    if writer.mask_sha256 is None:
        return None
    tokens = writer.mapped()
    count = sum(int(np.count_nonzero(counted)) for _, counted in tokens.masked_blocks() if counted is not None)
    predicted = tokens.part(slice(1, None)).masked_blocks()
    characters, bytes_ = tokenizer.spelled_size(ids[counted > 0] for ids, counted in predicted if counted is not None)
    return CountedInfo(tokens=count, characters=characters, bytes=bytes_, sha256=writer.mask_sha256)


def is_corpus(path: Path) -> bool:
    """Return whether a path is a prepared folder."""
    names = ("train.bin", shard_name("train", 0))
    return os.path.isfile(path / "data.json") and any(os.path.isfile(path / name) for name in names)


def open_run_corpus(run: Path, source: str) -> Corpus:
    """Open the training and validation tokens of a run, from RUN/data or from the prepared folder of its source.

    Args:
        run: The run folder.
        source: `data.source` of the run, "" for a run of imported weights.

    Raises:
        InvalidValue: The run has no text.
        MissingFile: Neither RUN/data nor the prepared folder exists.
        FileError: A file is missing, damaged, or does not fit the other files.
    """
    own = run / "data"
    if own.is_dir():
        return open_corpus(own)
    if not source:
        raise InvalidValue(f"data is missing: {run} has no text, because its weights were imported; give a text")
    if not is_corpus(Path(source)):
        raise MissingFile(
            f"the tokens of {run} are missing: neither {own} nor {source} is a prepared folder; restore one of them"
        )
    return open_corpus(Path(source))


def open_prepared(config: DataConfig) -> Corpus:
    """Open the prepared folder that a config names as its text, and check that the settings do not contradict it.

    Only settings that differ from their defaults are checked.

    Args:
        config: Settings of the data, whose source is a prepared folder.

    Raises:
        InvalidValue: The folder has another tokenizer, template or encoding, or another treatment of unknown text.
        FileError: A file is missing, damaged, or does not fit the other files.
    """
    corpus = open_corpus(Path(config.source))
    made, info = corpus.tokenizer, corpus.info
    found = {"tokenizer": made.kind, "unknown": made.unknown, "template": info.template, "encoding": info.encoding}
    for name, asked, own in config.contradictions(found):
        remedy = f"leave data.{name} out" if own is None else f"set data.{name} to {own}"
        raise InvalidValue(
            f"data.{name}={asked!r} differs from that of {config.source}, which is prepared: {own}; {remedy}, or"
            " name the text instead"
        )
    return corpus


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared folder, and memory-map its tokens. Every file is read once and checked against its hash.

    Args:
        folder: The prepared folder.

    Raises:
        FileError: A file is missing, damaged, or does not fit the other files.
    """
    check_name(folder)
    path = folder / "data.json"
    data = read_json(path, LARGEST_OF_TEXT)
    version = data.get("format_version")
    if version is not None and version not in (1, DATA_FORMAT_VERSION):
        raise DamagedFile(
            f"{path} has format_version {version}, but this timemix supports 1 and {DATA_FORMAT_VERSION};"
            " update timemix or prepare the text again"
        )
    try:
        info = to_record(data, DataInfo)
        shards = {split: _shards(folder, split, info) for split in SPLITS}
    except Misfit as error:
        raise DamagedFile(f"{path} is damaged: {error}; prepare the text again") from error
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.hash != info.tokenizer.sha256:
        raise DamagedFile(
            f"{folder / 'tokenizer.json'} is not the tokenizer of the tokens in its folder; prepare the text again"
        )
    dtype = tokenizer.dtype.newbyteorder("<")
    for split in SPLITS:
        for place, shard in shards[split].items():
            check_shard(place, dtype, shard.tokens, shard.sha256, tokenizer.vocab_size)
    train, valid = (map_shards(list(shards[split]), dtype, _mask(folder, split, shards[split])) for split in SPLITS)
    return Corpus(train, valid, tokenizer, info)


def _mask(folder: Path, split: str, shards: dict[Path, Shard]) -> Tokens | None:
    """Open and check the loss mask of a split; return None if the loss counts all tokens."""
    paths = {}
    for number, shard in enumerate(shards.values()):
        if shard.counted is not None:
            paths[folder / shard_name(mask_of(split), number)] = shard
    for path, shard in paths.items():
        check_shard(path, MASK_TYPE, shard.tokens, shard.counted or "", 2)
    return map_shards(list(paths), MASK_TYPE) if paths else None


def _shards(folder: Path, split: str, info: DataInfo) -> dict[Path, Shard]:
    """Return the path and record of each token file of a split.

    Raises:
        Misfit: The token counts of the files do not add up to the count of the split.
    """
    counts = info.split(split)
    if info.format_version == 1:
        return {folder / f"{split}.bin": Shard(counts.tokens, counts.sha256)}
    found = {folder / shard_name(split, number): shard for number, shard in enumerate(counts.shards or ())}
    if sum(shard.tokens for shard in found.values()) != counts.tokens:
        raise Misfit(f"the shards of {split} do not add up to its {counts.tokens} tokens")
    if {shard.counted is None for shard in found.values()} - {counts.counted is None}:
        raise Misfit(f"only a part of {split} has a loss mask")
    return found
