"""A text for a prepared folder: measured, split, and encoded, in pieces and in several processes."""

import collections
import contextlib
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from timemix.data.config import DataConfig
from timemix.data.shards import Shard
from timemix.data.sources import Source, open_source
from timemix.errors import InvalidValue, Unavailable, Unfit
from timemix.runtime.processes import MOST_PROCESSES, Each, cores, in_processes
from timemix.runtime.progress import ShowProgress, passing
from timemix.storage.json_files import Count
from timemix.tokenizers.base import Tokenizer, refuse_surrogates
from timemix.tokenizers.make import tokenizer_from_json, train_tokenizer
from timemix.tokenizers.pieces import PART, equal_pieces, pieces

logger = logging.getLogger("timemix")

PROCESSES_FROM = 1 << 26
"""Bytes of text from which other processes are worth their start."""


CHANGED = "the text changed while it was read; call again when it stays as it is"


@dataclass(frozen=True)
class TextSize:
    """What the first reading of a source finds."""

    characters: int
    bytes: int
    alphabet: str
    sha256: str


class Text:
    """The text that a config names, read once for its size, and as often as needed after that.

    sizes: of the source, and of the validation source where there is one.
    sha256: of all text. hash: of both sources with a NUL between.
    tokenizer: one that is made already.

    Raises TimemixError as `open_source` does, and where both sources are the same text.
    """

    def __init__(self, config: DataConfig, progress: ShowProgress, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.made = config, tokenizer
        self.source = open_source(config.source, encoding=config.encoding, progress=progress)
        self.valid, self.files = self.source.valid, list(self.source.files)
        self.sizes: dict[str, TextSize] = {}
        whole = hashlib.sha256()
        self.sizes["train"] = _measure(self.source, progress, whole)
        if config.valid is not None:
            self.valid = open_source(config.valid, encoding=config.encoding, progress=progress)
            self.files += self.valid.files
        parted = whole.copy()
        parted.update(b"\0")
        if self.valid is not None:
            self.sizes["valid"] = _measure(self.valid, progress, whole, parted)
            if self.sizes["valid"].sha256 == self.sizes["train"].sha256:
                raise InvalidValue(
                    f"the validation text is the training text, {config.source!r}; leave out data.valid to hold out the"
                    " end of it"
                )
        self.sha256, self.hash = whole.hexdigest(), parted.hexdigest()
        characters = self.sizes["train"].characters
        self._cut = characters if self.valid is not None else int((1 - config.valid_fraction) * characters)

    def train_tokenizer(self, progress: ShowProgress) -> Tokenizer:
        """The tokenizer of the training text, or the one that is made already."""
        if self.made is not None:
            return self.made
        config = self.config
        options: dict[str, Any] = {"vocab_size": config.vocab_size, "unknown": config.unknown}
        if config.tokenizer == "character":
            return train_tokenizer("character", self.sizes["train"].alphabet, **options)
        with (
            passing(progress, f"vocabulary of {self.source.name}", self.source.size) as advance,
            self._processes(config.tokenizer == "word", int) as each,
        ):
            texts = _Texts(self.source.read(advance)).take(self._cut)
            return train_tokenizer(config.tokenizer, texts, each=each or map, **options)

    @contextlib.contextmanager
    def encoder(self, made: Tokenizer) -> Iterator[Callable[[Iterator[str]], Iterator[Any]]]:
        """Gives the function that encodes pieces in order, each as `Tokenizer.encode_counted` does."""
        with self._processes(True, _begin_encoding, made.to_json()) as each:
            yield partial(map, made.encode_counted) if each is None else partial(each, _encode)

    @contextlib.contextmanager
    def _processes(self, useful: bool, *begin: Any) -> Iterator[Each | None]:
        count = min(cores(), MOST_PROCESSES)
        if not useful or count == 1 or sum(size.bytes for size in self.sizes.values()) < PROCESSES_FROM:
            yield None
            return
        try:
            with contextlib.ExitStack() as stack:
                each: Each | None = None
                try:
                    each = stack.enter_context(in_processes(count, *begin))
                except OSError as error:
                    logger.warning(
                        "this machine cannot start %d processes (%s); one reads the text", count, error.strerror
                    )
                yield each
        except BrokenProcessPool as error:
            raise Unavailable(
                f"a process that read {self.config.source} was killed, perhaps because memory ran out;"
                " call again to resume"
            ) from error

    def readings(self) -> list[tuple[Source, TextSize, dict[str, int | None]]]:
        """Each source, and the characters of each split in it (None: all that is left)."""
        if self.valid is None:
            return [(self.source, self.sizes["train"], {"train": self._cut, "valid": None})]
        # Unknown characters are met before the long work.
        return [
            (self.valid, self.sizes["valid"], {"valid": None}),
            (self.source, self.sizes["train"], {"train": None}),
        ]


def _measure(source: Source, progress: ShowProgress, *hashes: Any) -> TextSize:
    """Reads a source once; gives its UTF-8 to `hashes` too."""
    characters = bytes_ = 0
    own = hashlib.sha256()
    met = np.zeros(0x110000, bool)
    with passing(progress, f"reading {source.name}", source.size) as advance:
        for text in source.read(advance):
            raw = refuse_surrogates(text, characters)
            characters += len(text)
            bytes_ += len(raw)
            met[np.frombuffer(text.encode("utf-32-le"), "<u4")] = True
            for sha256 in (own, *hashes):
                sha256.update(raw)
    return TextSize(characters, bytes_, "".join(map(chr, np.flatnonzero(met))), own.hexdigest())


class _Texts:
    """Texts in order, of which any number of characters can be taken."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts

    def take(self, characters: int | None) -> Iterator[str]:
        """The next characters; None: all that are left."""
        for text in self._texts:
            if characters is not None and len(text) > characters:
                self._texts = itertools.chain([text[characters:]], self._texts)
                text = text[:characters]
            yield text
            if characters is not None:
                characters -= len(text)
                if characters == 0:
                    return


_tokenizer: Tokenizer
"""That of a process which encodes for another one."""


def _begin_encoding(document: str) -> None:
    global _tokenizer
    _tokenizer = tokenizer_from_json(document)


def _encode(text: str) -> tuple[np.ndarray, Counter[str]]:
    return _tokenizer.encode_counted(text)


@dataclass(frozen=True)
class Piece:
    """Ids of a piece of text: the number-th of its split; `before` is the sha256 of its source's text up to it."""

    split: str
    number: int
    before: str
    ids: np.ndarray
    unknown: int


@dataclass(frozen=True)
class Done:
    """How far a split came.

    shards: its finished token files. pieces: number of the pieces before the one in which the last of them ends.
    before: sha256 of the source's text up to that one, None at the end. tokens, unknown: those of these pieces.
    """

    shards: tuple[Shard, ...]
    pieces: Count
    before: str | None
    tokens: Count
    unknown: Count


def encoded(
    text: Text,
    made: Tokenizer,
    counts: dict[str, dict[str, int]],
    begun: dict[str, Done],
    progress: ShowProgress,
) -> Generator[Piece, None, None]:
    """Encodes the text; the pieces that `begun` counts as done are only read.

    Adds to `counts` what a piece holds once it was given. Raises Unfit where the text is not that of the first reading,
    or holds what the vocabulary does not.
    """
    with text.encoder(made) as encode:
        for source, size, splits in text.readings():
            sha256 = hashlib.sha256()
            waiting: collections.deque[tuple[str, int, str]] = collections.deque()
            unknown: dict[str, Counter[str]] = {split: Counter() for split in splits}
            with passing(progress, f"tokenizing {source.name}", source.size) as advance:
                cut = _cut(made, _Texts(source.read(advance)), splits)
                for ids, missing in encode(_to_encode(cut, sha256, counts, begun, waiting)):
                    piece = Piece(*waiting.popleft(), ids, missing.total())
                    yield piece
                    counts[piece.split]["tokens"] += len(ids)
                    counts[piece.split]["unknown"] += piece.unknown
                    if made.unknown == "error":
                        unknown[piece.split].update(missing)
            if sha256.hexdigest() != size.sha256:
                raise Unfit(CHANGED)
            for split, missing in unknown.items():
                try:
                    made.refuse(missing, is_new=text.made is None)
                except InvalidValue as error:
                    raise Unfit(f"the {split} text does not fit: {error}") from error


def _cut(made: Tokenizer, texts: _Texts, splits: dict[str, int | None]) -> Iterator[tuple[str, int, str]]:
    """The pieces (split, number, text) of a source, cut so that they can be encoded each by itself."""
    cut = pieces if made.kind in ("word", "subword") else equal_pieces
    for split, characters in splits.items():
        for number, piece in enumerate(cut(texts.take(characters), PART)):
            yield split, number, piece


def _to_encode(
    cut: Iterator[tuple[str, int, str]],
    sha256: Any,
    counts: dict[str, dict[str, int]],
    begun: dict[str, Done],
    waiting: collections.deque[tuple[str, int, str]],
) -> Iterator[str]:
    """The pieces that are not done yet; counts and hashes all of them, and says in `waiting` which were given."""
    for split, number, piece in cut:
        before = sha256.hexdigest()
        done = begun.get(split)
        if done is not None and number == done.pieces and done.before not in (None, before):
            raise Unfit(CHANGED)
        raw = piece.encode("utf-8", "surrogatepass")
        sha256.update(raw)
        counts[split]["characters"] += len(piece)
        counts[split]["bytes"] += len(raw)
        if done is None or number >= done.pieces:
            waiting.append((split, number, before))
            yield piece


def no_counts() -> dict[str, int]:
    return {"tokens": 0, "characters": 0, "bytes": 0, "unknown": 0}
