"""Empty documents, duplicates and near-duplicates in a source: their counts, and the choice of documents to drop."""

import logging
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import numpy as np

from timemix.data import minhash
from timemix.data.config import DropDuplicates
from timemix.data.minhash import VALUES, Signature, near_duplicates, signatures
from timemix.runtime.progress import Advance, ShowProgress, show
from timemix.storage.json_files import OPTIONAL, Count

logger = logging.getLogger("timemix")

BLOCK = 1 << 20
"""Number of characters of a document that are hashed at a time."""

Documents = Callable[["Reading", Advance], Iterator[tuple[int, str]]]
"""Function that reads a source once, and passes its documents to the methods of a `Reading`."""

Choosing = Callable[[], AbstractContextManager[Advance]]


@dataclass(frozen=True, kw_only=True)
class DocumentCounts:
    """Counts of the documents of a source, as stored in data.json. A document is a record, or a file of several."""

    total: Count
    """Number of documents."""
    empty: Count
    """Number of documents without any character except white space."""
    duplicates: Count
    """Number of documents that equal an earlier document, without the empty documents."""
    near_duplicates: Count | None = field(default=None, metadata=OPTIONAL)
    """Number of documents that are similar to an earlier document, without the duplicates. None if not counted."""
    dropped: Count
    """Number of dropped documents."""
    in_training: Count | None = field(default=None, metadata=OPTIONAL)
    """Number of distinct documents that are also training documents. None except for a validation text with its own
    source."""


class Reading:
    """One reading of the documents of a source, which counts the documents and leaves out the dropped ones.

    Args:
        dropped: Whether each document is dropped, one byte per document; empty to drop no document.
        counts: Whether to compute a hash of each document.
        compares: Whether to compute signatures, by which near-duplicates are found.
    """

    def __init__(self, dropped: bytes = b"", counts: bool = False, compares: bool = False) -> None:
        self._dropped, self._counts, self._compares = dropped, counts, compares
        self._number = 0
        self._hashes = array("q")
        self._signatures = bytearray()
        self._waiting: list[str] = []
        self._characters = 0

    def records(self, texts: Iterator[str]) -> Iterator[str]:
        """Yield the documents of a file with one document per record, without the dropped documents."""
        if not self._dropped and not self._compares:
            return self._counted(texts) if self._counts else texts
        return self._compared(texts)

    def _counted(self, texts: Iterator[str]) -> Iterator[str]:
        # This loop is short, since it runs for each record of each source.
        add = self._hashes.append
        for text in texts:
            # The hash of an empty text is 0.
            add(hash(text) if len(text) <= BLOCK and not text.isspace() else _hash(text))
            yield text

    def _compared(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            if self._is_dropped():
                continue
            if self._counts:
                self._hashes.append(_hash(text))
            if self._compares:
                self._add(text)
            yield text

    def file(self, texts: Iterator[str]) -> Iterator[str]:
        """Yield the pieces of a file that is one document, or nothing if the document is dropped."""
        if self._is_dropped():
            return
        whole = _Hash() if self._counts else None
        signature = Signature() if self._compares else None
        for text in texts:
            if whole is not None:
                whole.add(text)
            if signature is not None:
                signature.add(text)
            yield text
        if whole is not None:
            self._hashes.append(whole.value())
        if signature is not None:
            self._flush()
            self._signatures += signature.values()

    def _add(self, text: str) -> None:
        """Add the signature of a document. Short documents wait until there are enough of them."""
        if len(text) > minhash.BLOCK:
            self._flush()
            signature = Signature()
            signature.add(text)
            self._signatures += signature.values()
            return
        self._waiting.append(text)
        self._characters += max(len(text), minhash.SHINGLE)
        if self._characters > minhash.BLOCK:
            self._flush()

    def _flush(self) -> None:
        """Compute the signatures of the waiting documents."""
        if self._waiting:
            self._signatures += signatures(self._waiting).tobytes()
            self._waiting, self._characters = [], 0

    def _is_dropped(self) -> bool:
        """Return whether the next document is dropped."""
        number = self._number
        self._number += 1
        return number < len(self._dropped) and bool(self._dropped[number])

    def hashes(self) -> np.ndarray:
        """Return a hash of each document, 0 for an empty document, (documents,), int64."""
        return np.frombuffer(self._hashes, np.int64) if self._hashes else np.zeros(0, np.int64)

    def signatures(self) -> np.ndarray:
        """Return the signature of each document, (documents, VALUES), uint8."""
        self._flush()
        return np.frombuffer(self._signatures, np.uint8).reshape(-1, VALUES)


class DocumentReader:
    """A source whose documents are counted when the source is first read, and whose duplicates can be dropped.

    The hash of a document has 64 bits. The hashes take up to 20 bytes of memory per document during the first reading,
    and 8 bytes afterwards. With n documents, the probability that two different documents have the same hash is
    n^2 / 2^65: 3e-8 for a million documents.

    Args:
        documents: Function that reads the source once.
        drop: Documents to drop: "none", "exact" (empty documents and duplicates) or "near" (also near-duplicates). The
            first reading then reads the source twice: before it yields the first text, it finds the documents to
            drop.
        choosing: Function that shows the progress of the search for the documents to drop, as `passing` does.

    Attributes:
        counts: Counts of the documents, or None before the end of the first reading.
    """

    def __init__(self, documents: Documents, drop: DropDuplicates, choosing: Choosing) -> None:
        self._documents, self._drop, self._choosing = documents, drop, choosing
        self._dropped = b""
        self._distinct = np.zeros(0, np.int64)
        self.counts: DocumentCounts | None = None

    def read(self, advance: Advance) -> Iterator[tuple[int, str]]:
        """Read the source, without the dropped documents."""
        if self._drop != "none" and self.counts is None:
            self._choose()
        reading = Reading(self._dropped, counts=self.counts is None)
        yield from self._documents(reading, advance)
        if self.counts is None:
            self._count(reading.hashes())

    def _choose(self) -> None:
        """Read the source once to find the documents to drop."""
        reading = Reading(counts=True, compares=self._drop == "near")
        with self._choosing() as advance:
            for _ in self._documents(reading, advance):
                pass
        hashes = reading.hashes()
        first = np.unique(hashes, return_index=True)[1]
        dropped = np.ones(len(hashes), bool)
        dropped[first] = False
        dropped[hashes == 0] = True
        near = None
        if self._drop == "near":
            kept = np.flatnonzero(~dropped)
            similar = near_duplicates(reading.signatures()[kept])
            dropped[kept[similar]] = True
            near = int(similar.sum())
        self._dropped = dropped.tobytes()
        self._count(hashes, near, int(dropped.sum()))

    def _count(self, hashes: np.ndarray, near: int | None = None, dropped: int = 0) -> None:
        # In place, since np.unique copies the hashes.
        hashes.sort()
        is_first = hashes != 0
        is_first[1:] &= hashes[1:] != hashes[:-1]
        self._distinct = hashes[is_first]
        empty = int((hashes == 0).sum())
        self.counts = DocumentCounts(
            total=len(hashes),
            empty=empty,
            duplicates=len(hashes) - empty - len(self._distinct),
            near_duplicates=near,
            dropped=dropped,
        )

    def shared(self, other: "DocumentReader") -> int:
        """Return the number of distinct documents that are also documents of another source."""
        return int(np.isin(self._distinct, other._distinct, assume_unique=True).sum())


def counts_of(
    names: tuple[str, str], train: DocumentReader | None, valid: DocumentReader | None, progress: ShowProgress
) -> dict[str, DocumentCounts]:
    """Return the counts of two sources that were read, show a line about each, and warn if they share documents.

    Args:
        names: Names of both sources, for messages.
        train: The training text, None if it is one document.
        valid: The validation text, None if it is one document or a part of the training text.
        progress: Whether to show the lines on standard error, or a function for the lines.

    Returns:
        The counts of "train" and "valid", without a source that is None.
    """
    found: dict[str, DocumentCounts] = {}
    for split, name, reader in zip(("train", "valid"), names, (train, valid), strict=True):
        if reader is None or (counts := reader.counts) is None:
            continue
        if split == "valid" and train is not None:
            counts = replace(counts, in_training=reader.shared(train))
            if counts.in_training:
                logger.warning(
                    "%d of %d documents of %s are also training documents: the validation loss will be too low;"
                    " remove them from one of the texts",
                    counts.in_training,
                    counts.total,
                    name,
                )
        found[split] = counts
        near = "" if counts.near_duplicates is None else f", {counts.near_duplicates:,} near-duplicates"
        if counts.empty or counts.duplicates or counts.near_duplicates:
            end = f"dropped {counts.dropped:,}" if counts.dropped else "kept the duplicates"
            show(
                progress,
                f"{name}: {counts.total:,} documents, {counts.empty:,} empty, {counts.duplicates:,} duplicates{near};"
                f" {end}",
            )
    return found


class _Hash:
    """Hash of a document that is read in pieces. The hash does not depend on the pieces.

    The document is cut into blocks of BLOCK characters. The hash of the first block is that of Python, and each later
    block is hashed together with the hash of the blocks before it.
    """

    def __init__(self) -> None:
        self._value, self._rest, self._is_empty, self._is_first = 0, "", True, True

    def add(self, text: str) -> None:
        self._is_empty = self._is_empty and (not text or text.isspace())
        text = self._rest + text
        whole = max(0, len(text) - 1) // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            self._add(text[start : start + BLOCK])
        self._rest = text[whole:]

    def _add(self, block: str) -> None:
        self._value = hash(block) if self._is_first else hash((self._value, block))
        self._is_first = False

    def value(self) -> int:
        if self._is_empty:
            return 0
        self._add(self._rest)
        return self._value


def _hash(text: str) -> int:
    whole = _Hash()
    whole.add(text)
    return whole.value()
