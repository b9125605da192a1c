"""Pipeline from a text to a prepared folder: it measures, splits and encodes the text in pieces and in parallel."""

import collections
import contextlib
import hashlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from timemix.data import marks
from timemix.data.config import DataConfig
from timemix.data.duplicates import counts_of
from timemix.data.readers import CHUNK
from timemix.data.shards import Shard
from timemix.data.sources import Source, open_source
from timemix.data.splits import Parts, TextSize, split_of, whole_text
from timemix.data.vocabulary import given_tokenizer
from timemix.errors import InvalidValue, Unavailable, Unfit
from timemix.runtime.processes import MOST_PROCESSES, Each, cores, in_processes
from timemix.runtime.progress import ShowProgress, passing, untold
from timemix.storage.json_files import Count
from timemix.tokenizers.base import DOCUMENT_END, Tokenizer, refuse_surrogates
from timemix.tokenizers.make import tokenizer_from_json, train_tokenizer
from timemix.tokenizers.pieces import PART

logger = logging.getLogger("timemix")

PROCESSES_FROM = 1 << 26
"""Least number of bytes of text for which starting several processes saves time."""


_SURROGATES = slice(0xD800, 0xE000)

CHANGED = "the text changed while it was read; try again when no process writes to it"


class Text:
    """The text that a config names. The text is read once to measure its size, and again for each later task.

    The constructor warns if at least half of the validation lines, or some of the validation documents, are also in the
    training text.

    Args:
        config: Sources, split and tokenizer.
        progress: Whether to show the progress of reading on standard error, or a function for progress lines.
        tokenizer: An existing tokenizer to use. Default: a new tokenizer.

    Attributes:
        made: The argument `tokenizer`, or the World tokenizer if the config names it; otherwise None.
        sizes: Size of the split "train", and of the split "valid" if the validation text has its own source.
        sha256: Hash of all text, in hexadecimal.
        hash: Hash of both sources, with a NUL between the two sources.
        held_out: Description of the validation text, such as "the last 10 % of builtin".
        documents: Counts of the documents of "train", and of "valid" if the validation text has its own source. A
            source that is one document has no counts.
        first: Number of characters and bytes of the first token of each split that `encoded` has started.

    Raises:
        InvalidValue: Both sources are the same text or share a file, or the config names a vocabulary without effect,
            or an end-of-text token, documents to hold out or an order of documents that the text cannot have.
        TimemixError: A source cannot be opened or read, for a reason that `open_source` lists.
    """

    def __init__(self, config: DataConfig, progress: ShowProgress, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.made = config, tokenizer or given_tokenizer(config, progress)
        self.source = self._open(config.source, progress, self._has_documents())
        self.valid, self.files = self.source.valid, list(self.source.files)
        self.sizes: dict[str, TextSize] = {}
        self.first: dict[str, tuple[int, int]] = {}
        whole = hashlib.sha256()
        if config.drop_duplicates != "none" and self.source.counted is None:
            raise InvalidValue(
                f"data.drop_duplicates={config.drop_duplicates!r} has no effect on {self.source.name}, which is one"
                " document; leave data.drop_duplicates out, or name a folder or a file of records"
            )
        self.sizes["train"] = _measure(self.source, progress, whole)
        if config.valid is not None:
            self.valid = self._open(config.valid, progress, self.source.documents)
            self._refuse_shared_files(self.valid)
            self.files += self.valid.files
        parted = whole.copy()
        parted.update(b"\0")
        if self.valid is not None:
            self.sizes["valid"] = _measure(self.valid, progress, whole, parted)
            if self.sizes["valid"].sha256 == self.sizes["train"].sha256:
                raise InvalidValue(
                    f"the validation text is the training text {config.source!r}; leave data.valid out to hold out the"
                    " end of the training text"
                )
            if config.valid is not None:
                _warn_of_shared_lines(self.source, self.valid, progress)
        name, counted = ("", None) if self.valid is None else (self.valid.name, self.valid.counted)
        self.documents = counts_of((self.source.name, name), self.source.counted, counted, progress)
        self.sha256, self.hash = whole.hexdigest(), parted.hexdigest()
        self._parts = split_of(self.sizes["train"], config, self.source, has_valid=self.valid is not None)
        self.held_out = self._held_out()

    def _has_documents(self) -> bool | None:
        """Return whether to mark the ends of documents; None: only in a source of records."""
        config = self.config
        if config.template is not None and (config.tokenizer if self.made is None else self.made.kind) == "word":
            raise InvalidValue(
                f"data.template={config.template!r} needs case and spaces, which a word tokenizer loses; choose another"
                " data.tokenizer, or leave data.template out"
            )
        if self.made is None or self.made.end_of_text is not None:
            return config.end_of_text
        for name, is_set in (
            ("template", config.template is not None),
            ("end_of_text", config.end_of_text),
            ("hold_out", config.hold_out == "documents"),
            ("shuffle", config.shuffle is not None),
        ):
            if is_set:
                raise InvalidValue(
                    f"data.{name}={getattr(config, name)!r} needs an end-of-text token, but the {self.made.kind}"
                    f" tokenizer has none; leave data.{name} out, or train a new model with another tokenizer"
                )
        return False

    def _open(self, source: str, progress: ShowProgress, documents: bool | None) -> Source:
        names = ("encoding", "keep_nul", "text_key", "template", "drop_duplicates")
        options = {name: getattr(self.config, name) for name in names}
        return open_source(source, **options, documents=documents, progress=progress)

    def _refuse_shared_files(self, valid: Source) -> None:
        own = {os.path.realpath(file): file for file in self.source.files}
        shared = [own[path] for file in valid.files if (path := os.path.realpath(file)) in own]
        if shared:
            raise InvalidValue(
                f"{shared[0]} is in both data.source and data.valid; remove it from one of them, or leave data.valid"
                " out to hold out a share of data.source"
            )

    def _held_out(self) -> str:
        config, files = self.config, len(self.sizes["train"].files)
        if self.valid is not None:
            return self.valid.name if config.valid is None else f"all of {self.valid.name}"
        if not config.valid_fraction:
            return "nothing"
        share = f"{100 * config.valid_fraction:g} %"
        if config.hold_out == "documents":
            return f"{share} of the documents of {self.source.name}"
        where = f"each of {files} files" if config.hold_out == "each" and files > 1 else self.source.name
        return f"the last {share} of {where}"

    def train_tokenizer(self, progress: ShowProgress) -> Tokenizer:
        """Train a tokenizer on the training text, or return the existing tokenizer.

        Args:
            progress: Whether to show the progress of reading, or a function for progress lines.
        """
        if self.made is not None:
            return self.made
        config = self.config
        options: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "unknown": config.unknown,
            "end_of_text": self.source.documents,
        }
        if config.tokenizer == "character":
            return train_tokenizer("character", self.sizes["train"].alphabet, **options)
        with (
            passing(progress, f"vocabulary of {self.source.name}", self.source.size) as advance,
            self._processes(config.tokenizer == "word", int) as each,
        ):
            texts = map(partial(marks.without, some=marks.LOSS_MARKS), self._parts(self.source.read(advance), "train"))
            return train_tokenizer(config.tokenizer, texts, each=each or map, **options)

    @contextlib.contextmanager
    def encoder(self, made: Tokenizer) -> Iterator[Callable[[Iterator[str]], Iterator[Any]]]:
        """Yield a function that applies `marks.encode_marked` to texts, in order.

        Args:
            made: The tokenizer.
        """
        with self._processes(True, _begin_encoding, made.to_json()) as each:
            yield partial(map, partial(marks.encode_marked, made)) if each is None else partial(each, _encode)

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
                        "this machine cannot start %d processes (%s); one process reads the text, which takes longer",
                        count,
                        error.strerror,
                    )
                yield each
        except BrokenProcessPool as error:
            raise Unavailable(
                f"a process that read {self.config.source} was killed, perhaps because memory ran out;"
                " free some memory and try again to resume"
            ) from error

    def readings(self) -> list[tuple[str, Source, TextSize, Parts]]:
        """Return name, source and size of each split, and the function that gives its part of the source."""
        train = ("train", self.source, self.sizes["train"], self._parts)
        if self.valid is None:
            return [train, ("valid", *train[1:])]
        # The validation text comes first: its unknown characters are reported before the long encoding of "train".
        return [("valid", self.valid, self.sizes["valid"], whole_text), train]


def _measure(source: Source, progress: ShowProgress, *hashes: Any) -> TextSize:
    """Read a source once to measure its size, and add its UTF-8 bytes to `hashes`."""
    place = characters = bytes_ = 0
    files = [0] * max(1, len(source.files))
    own, met = hashlib.sha256(), np.zeros(0x110000, bool)
    documents = [np.empty(0, np.int64)]
    allowed = marks.MARKS if source.has_loss_marks else marks.MARKS[: int(source.documents)]
    with passing(progress, f"reading {source.name}", source.size) as advance:
        for number, text in source.read(advance):
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
            met[codes] = True
            met[list(map(ord, allowed))] = False
            if met[_SURROGATES].any():
                refuse_surrogates(marks.without(text, allowed), characters)
            raw = text.encode("utf-8", "surrogatepass")
            if source.documents:
                documents.append(place + 1 + np.flatnonzero(codes == ord(DOCUMENT_END)))
            place += len(text)
            files[number] += len(text)
            count = sum(map(text.count, allowed))
            characters += len(text) - count
            bytes_ += len(raw) - count * marks.MARK_BYTES
            for sha256 in (own, *hashes):
                sha256.update(raw)
    alphabet = "".join(map(chr, np.flatnonzero(met)))
    return TextSize(tuple(files), np.concatenate(documents), characters, bytes_, alphabet, own.hexdigest())


LONG_LINE = 32
"""Least number of characters of a compared line. Two texts rarely share a line of 32 or more characters by chance."""

MOST_LINES = 100_000
"""Largest number of validation lines that are compared with the training text."""


def _warn_of_shared_lines(train: Source, valid: Source, progress: ShowProgress) -> None:
    """Warn if at least half of the long lines of a validation text are also lines of the training text."""
    lines = set(itertools.islice(_long_lines(valid.read(untold)), MOST_LINES))
    with passing(progress, f"comparing {train.name}", train.size) as advance:
        shared = lines.intersection(_long_lines(train.read(advance)))
    if lines and len(shared) >= len(lines) / 2:
        logger.warning(
            "%d of %d lines of %s are also in the training text: the validation loss will be too low;"
            " use another validation text",
            len(shared),
            len(lines),
            valid.name,
        )


def _long_lines(texts: Iterator[tuple[int, str]]) -> Iterator[int]:
    """Hash the lines of at least LONG_LINE characters. For a line longer than CHUNK, hash only its end."""
    rest = ""
    for _, text in texts:
        *lines, rest = (rest + text.replace(DOCUMENT_END, "\n")).split("\n")
        yield from (hash(line) for line in lines if len(line) >= LONG_LINE)
        rest = rest[-CHUNK:]
    if len(rest) >= LONG_LINE:
        yield hash(rest)


_tokenizer: Tokenizer
"""Tokenizer of a worker process."""


def _begin_encoding(document: str) -> None:
    global _tokenizer
    _tokenizer = tokenizer_from_json(document)


def _encode(text: str) -> tuple[np.ndarray, np.ndarray | None, Counter[str]]:
    return marks.encode_marked(_tokenizer, text)


@dataclass(frozen=True)
class Piece:
    """Token ids of a piece of text."""

    split: str
    number: int
    """Number of the piece in its split, counted from 0."""
    before: str
    """Hash of the split's text before the piece."""
    ids: np.ndarray
    """Token ids, (tokens,)."""
    counted: np.ndarray | None
    """Loss mask, (tokens,); None: the loss counts all tokens."""
    unknown: int
    """Number of characters or words outside the vocabulary."""


@dataclass(frozen=True)
class Done:
    """Finished part of a split, from which the preparation resumes."""

    shards: tuple[Shard, ...]
    """Finished token files."""
    pieces: Count
    """Number of pieces that lie completely in finished token files."""
    before: str | None
    """Hash of the text of the finished pieces, or None if the split is complete."""
    tokens: Count
    """Number of tokens in the finished pieces."""
    unknown: Count
    """Number of characters or words outside the vocabulary in the finished pieces."""


def encoded(
    text: Text,
    made: Tokenizer,
    counts: dict[str, dict[str, int]],
    begun: dict[str, Done],
    progress: ShowProgress,
) -> Generator[Piece, None, None]:
    """Encode both splits of a text, piece by piece.

    Args:
        text: The text.
        made: Its tokenizer.
        counts: Counts of each split. The counts of a piece are added after the piece is yielded.
        begun: Finished part of each split, which is read again but not encoded again.
        progress: Whether to show the progress on standard error, or a function for progress lines.

    Yields:
        The unfinished pieces, in order.

    Raises:
        Unfit: The text has changed since it was first read, or contains characters outside the vocabulary.
    """
    with text.encoder(made) as encode:
        for split, source, size, parts in text.readings():
            seen = hashlib.sha256()
            waiting: collections.deque[tuple[int, str]] = collections.deque()
            unknown: Counter[str] = Counter()
            with passing(progress, f"tokenizing {source.name}", source.size) as advance:
                cut = made.cut(parts(_hashed(source.read(advance), seen), split), PART)
                if beginning := next(cut, ""):
                    text.first[split] = made.first_size(marks.first_unmarked(beginning))
                    cut = itertools.chain([beginning], cut)
                mark = marks.UNCOUNTED if source.has_loss_marks else ""
                for ids, counted, missing in encode(_to_encode(cut, counts[split], begun.get(split), waiting, mark)):
                    piece = Piece(split, *waiting.popleft(), ids, counted, missing.total())
                    yield piece
                    counts[split]["tokens"] += len(ids)
                    counts[split]["unknown"] += piece.unknown
                    if made.unknown == "error":
                        unknown.update(missing)
            if seen.hexdigest() != size.sha256:
                raise Unfit(CHANGED)
            try:
                made.refuse(unknown, is_new=text.made is None)
            except InvalidValue as error:
                raise Unfit(f"the {split} text does not fit: {error}") from error


def _hashed(texts: Iterator[tuple[int, str]], sha256: Any) -> Iterator[tuple[int, str]]:
    """Yield the texts unchanged, and add their UTF-8 bytes to `sha256`."""
    for number, text in texts:
        sha256.update(text.encode("utf-8", "surrogatepass"))
        yield number, text


def _to_encode(
    cut: Iterator[str],
    counts: dict[str, int],
    done: Done | None,
    waiting: collections.deque[tuple[int, str]],
    mark: str,
) -> Iterator[str]:
    """Yield the unfinished pieces of a split, and count and hash all pieces.

    Args:
        cut: All pieces of the split, in order.
        counts: Counts of the split, to which characters, bytes and documents are added.
        done: Finished part of the split, if any.
        waiting: Queue that receives the number of each yielded piece, and the hash of the text before the piece.
        mark: Loss mark before the text, or empty. Each yielded piece begins with the newest loss mark before it.
    """
    sha256 = hashlib.sha256()
    for number, piece in enumerate(cut):
        before = sha256.hexdigest()
        if done is not None and number == done.pieces and done.before not in (None, before):
            raise Unfit(CHANGED)
        raw = piece.encode("utf-8", "surrogatepass")
        sha256.update(raw)
        count = marks.count_marks(piece)
        counts["documents"] += piece.count(DOCUMENT_END)
        counts["characters"] += len(piece) - count
        counts["bytes"] += len(raw) - count * marks.MARK_BYTES
        if done is None or number >= done.pieces:
            waiting.append((number, before))
            yield mark + piece
        mark = marks.newest_loss_mark(piece, mark)


def no_counts() -> dict[str, int]:
    """Return the counts of an empty split."""
    return {"tokens": 0, "characters": 0, "bytes": 0, "unknown": 0, "documents": 0}
