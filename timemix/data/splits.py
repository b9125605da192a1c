"""The split of a text into a training part and a held-out part: the ends of files, or whole documents."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from timemix.data.config import DataConfig
from timemix.data.sources import Source
from timemix.errors import InvalidValue
from timemix.tokenizers.base import DOCUMENT_END

Texts = Iterator[tuple[int, str]]
"""Pieces of a text in order, each with the number of its file, as from `Source.read`."""

Parts = Callable[[Texts, str], Iterator[str]]
"""Function that yields the part of a text in the split "train" or "valid"."""


@dataclass(frozen=True)
class TextSize:
    """Size, alphabet and hash of a source, computed when the source is first read."""

    files: tuple[int, ...]
    """Number of characters of each file, where the end of a document counts as a character."""
    documents: np.ndarray
    """Number of characters up to the end of each document, counted like `files`, (documents,) int64."""
    characters: int
    """Number of characters of the text, without the ends of documents."""
    bytes: int
    """Number of bytes of the text in UTF-8, without the ends of documents."""
    alphabet: str
    """All distinct characters, sorted."""
    sha256: str
    """Hash of the text in UTF-8, with the ends of documents, in hexadecimal."""


def whole_text(texts: Texts, split: str) -> Iterator[str]:
    """Yield a whole source, which is one split."""
    return (text for _, text in texts)


def split_of(size: TextSize, config: DataConfig, source: Source, *, has_valid: bool) -> Parts:
    """Return the function that splits a source.

    Args:
        size: Size of the source.
        config: Share and place of the held-out part.
        source: The source.
        has_valid: Whether the validation text has its own source, so that all of this source is training text.

    Raises:
        InvalidValue: The source has no documents, or only one document, but whole documents are to be held out.
    """
    if not source.documents:
        for name, value in (("hold_out", config.hold_out == "documents"), ("shuffle", config.shuffle is not None)):
            if value:
                raise InvalidValue(
                    f"data.{name}={getattr(config, name)!r} needs ends of documents, but {source.name} has none; set"
                    f" data.end_of_text to True, or leave data.{name} out"
                )
    if has_valid:
        return whole_text
    if source.documents and config.valid_fraction and len(size.documents) < 2:
        reason = (
            f"{source.name} has only one document, so that none can be held out; set data.valid, or set"
            " data.valid_fraction to 0"
        )
        raise InvalidValue(reason if config.template is not None else f"{reason} or data.end_of_text to False")
    if source.documents and config.hold_out == "documents":
        return partial(_drawn, _draw(len(size.documents), config.valid_fraction))
    cuts = _cuts(size, config)
    return partial(_cut, _cuts_between_documents(size, cuts, config) if source.documents else cuts)


def _cuts(size: TextSize, config: DataConfig) -> tuple[int, ...]:
    """Return the number of characters of each file before its held-out part."""
    share = 1 - config.valid_fraction
    if config.hold_out == "each":
        # Cumulative shares are rounded, so that rounding errors of many short files do not add up.
        kept = [int(share * end) for end in itertools.accumulate(size.files, initial=0)]
        return tuple(after - before for before, after in itertools.pairwise(kept))
    cut = int(share * sum(size.files))
    ends = itertools.accumulate(size.files)
    return tuple(
        min(max(cut - end + characters, 0), characters) for end, characters in zip(ends, size.files, strict=True)
    )


def _cuts_between_documents(size: TextSize, cuts: tuple[int, ...], config: DataConfig) -> tuple[int, ...]:
    """Move each cut to the nearest end of a document in its file.

    The next file makes up for the distance. If each file is one document, then about every tenth file is held out at a
    share of 10 %.
    """
    moved, begin, missing = [], 0, 0
    for characters, cut in zip(size.files, cuts, strict=True):
        wanted = begin + cut + missing
        first, last = np.searchsorted(size.documents, (begin, begin + characters), "right")
        places = np.concatenate([[begin], size.documents[first:last]])
        place = int(places[np.abs(places - wanted).argmin()])
        missing = wanted - place if config.hold_out == "each" else 0
        moved.append(place - begin)
        begin += characters
    kept, whole = sum(moved), sum(size.files)
    if config.valid_fraction and kept in (0, whole):
        # Each split gets at least one document.
        lone = int(size.documents[0 if kept == 0 else -2])
        ends = itertools.accumulate(size.files)
        moved = [
            min(max(lone - end + characters, 0), characters) for end, characters in zip(ends, size.files, strict=True)
        ]
    return tuple(moved)


def _draw(documents: int, share: float) -> np.ndarray:
    """Return which documents are held out, (documents,) bool. At least one is, and at least one is not."""
    generator = np.random.default_rng(0)
    chosen = np.zeros(documents, bool)
    count = min(max(round(share * documents), 1), documents - 1) if share else 0
    chosen[generator.permutation(documents)[:count]] = True
    return chosen


def _cut(cuts: tuple[int, ...], texts: Texts, split: str) -> Iterator[str]:
    """Yield the part of each file before the cut ("train") or after the cut ("valid"), with line ends between parts.

    Args:
        cuts: Number of characters of each file before its held-out part.
        texts: The text.
        split: "train" or "valid".
    """
    place, before, last = 0, 0, ""
    for number, text in texts:
        place, newest = (place, before) if number == before else (0, before)
        cut = min(max(cuts[number] - place, 0), len(text))
        place, before = place + len(text), number
        if own := text[:cut] if split == "train" else text[cut:]:
            if number != newest and last not in ("", "\n", DOCUMENT_END):
                yield "\n"
            yield own
            last = own[-1]


def _drawn(held_out: np.ndarray, texts: Texts, split: str) -> Iterator[str]:
    """Yield the documents that are not held out ("train") or are held out ("valid").

    Args:
        held_out: Whether each document is held out, (documents,) bool.
        texts: The text.
        split: "train" or "valid".
    """
    wanted = (held_out == (split == "valid")).tolist()
    number = 0
    for _, text in texts:
        *ended, rest = text.split(DOCUMENT_END)
        own = [document + DOCUMENT_END for i, document in enumerate(ended, number) if wanted[i]]
        number += len(ended)
        if rest and wanted[number]:
            own.append(rest)
        if own:
            yield "".join(own)
