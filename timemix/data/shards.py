"""Token files (shards): the token ids of a split, in files of limited size."""

import contextlib
import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from timemix.errors import DamagedFile, FileError
from timemix.storage.files import cannot_read, check_regular, sync
from timemix.storage.json_files import Count

SHARD_BYTES = 1 << 27
"""Largest size of a token file, in bytes."""

IDS_AT_ONCE = 1 << 20
"""Number of token ids that are read or copied at a time."""


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard, such as train-00000.bin."""
    return f"{split}-{number:05}.bin"


@dataclass(frozen=True)
class Shard:
    """Number of tokens and hash of a token file."""

    tokens: Count
    sha256: str
    """Hash of the file, in hexadecimal."""


class Tokens:
    """Sequence of token ids in several arrays, such as memory-mapped files. A slice `tokens[a:b]` is one NumPy array.

    Args:
        arrays: Token ids, each (tokens,).
        dtype: Type of the ids.
    """

    def __init__(self, arrays: Sequence[np.ndarray], dtype: np.dtype) -> None:
        self.dtype = dtype
        self._arrays = [array for array in arrays if len(array)]
        self._starts = [0, *itertools.accumulate(map(len, self._arrays))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, place: slice) -> np.ndarray:
        """Return the ids of a slice with step 1: a view if the ids lie in one array, otherwise a copy."""
        arrays = self._cut(place)
        return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, self.dtype), *arrays])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all ids as one array, copied into memory if the ids lie in several arrays."""
        whole = self[:]
        return whole.astype(dtype or self.dtype, copy=bool(copy))

    def part(self, place: slice) -> "Tokens":
        """Return the tokens of a slice with step 1, without copying the ids."""
        return Tokens(self._cut(place), self.dtype)

    def blocks(self) -> Iterator[np.ndarray]:
        """Iterate over all ids in order, in arrays of at most IDS_AT_ONCE ids."""
        for start in range(0, len(self), IDS_AT_ONCE):
            yield self[start : start + IDS_AT_ONCE]

    def _cut(self, place: slice) -> list[np.ndarray]:
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"the step {step} of a slice of tokens is not supported; leave it out")
        found = []
        number = bisect_right(self._starts, start) - 1
        while number < len(self._arrays) and self._starts[number] < stop:
            first = self._starts[number]
            found.append(self._arrays[number][max(start - first, 0) : stop - first])
            number += 1
        return found


class ShardWriter:
    """Writer of the token files of a split, each of at most SHARD_BYTES.

    Leaving the `with` block of the writer finishes the last file.

    Args:
        folder: Folder of the files.
        split: "train" or "valid".
        dtype: Type of the ids; the files are little-endian.
        shards: Finished files. The writer checks these files before it adds new files.
        vocab_size: Size of the vocabulary, for the check of `shards`.
        finished: Function to call after each file is written and synced.

    Attributes:
        shards: Record of every finished file.
        sha256: Hash of all bytes of the split so far.

    Raises:
        FileError: A file of `shards` is missing or damaged.
        OSError: A file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        *,
        shards: Sequence[Shard] = (),
        vocab_size: int = 0,
        finished: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype.newbyteorder("<")
        self.finished = finished
        self.shards = list(shards)
        self.sha256 = hashlib.sha256()
        for number, shard in enumerate(shards):
            check_shard(self._path(number), self._dtype, shard, vocab_size, self.sha256)
        self._file: BinaryIO | None = None
        self._own = hashlib.sha256()
        self._written = 0

    @property
    def tokens(self) -> int:
        """Number of ids in finished files."""
        return sum(shard.tokens for shard in self.shards)

    def add(self, ids: np.ndarray) -> None:
        """Append ids, (tokens,)."""
        room = max(1, SHARD_BYTES // self._dtype.itemsize)
        while len(ids):
            head, ids = np.split(ids, [room - self._written])
            raw = head.astype(self._dtype, copy=False).tobytes()
            self._open().write(raw)
            self._own.update(raw)
            self.sha256.update(raw)
            self._written += len(head)
            if self._written == room:
                self._finish()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            # Closing the file may fail with the same error as the preceding write.
            with contextlib.suppress(OSError):
                if self._file is not None:
                    self._file.close()
        elif self._file is not None or not self.shards:
            # Even a split without tokens has one file, which is empty.
            self._open()
            self._finish()

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._file = self._path(len(self.shards)).open("wb")
        return self._file

    def _finish(self) -> None:
        with self._open() as file:
            file.flush()
            sync(file.fileno())
        self.shards.append(Shard(self._written, self._own.hexdigest()))
        self._file, self._own, self._written = None, hashlib.sha256(), 0
        self.finished()

    def _path(self, number: int) -> Path:
        return self._folder / shard_name(self._split, number)


def check_shard(path: Path, dtype: np.dtype, shard: Shard, vocab_size: int, *hashes: Any) -> None:
    """Check a token file against its record. The file is read once, in blocks.

    Args:
        path: The file.
        dtype: Type of the ids.
        shard: Record of the file.
        vocab_size: Size of the vocabulary; all ids must be below this size.
        hashes: Hash objects that the bytes of the file are added to.

    Raises:
        DamagedFile: Size, ids or hash of the file are wrong.
        FileError: The file cannot be read.
    """
    size = shard.tokens * dtype.itemsize
    own = hashlib.sha256()
    check_regular(path)
    try:
        if (found := path.stat().st_size) != size:
            raise DamagedFile(f"{path} is damaged: it has {found} bytes, not {size}; prepare the text again")
        with path.open("rb") as file:
            while block := file.read(IDS_AT_ONCE * dtype.itemsize):
                largest = int(np.frombuffer(block, dtype).max())
                if largest >= vocab_size:
                    raise DamagedFile(
                        f"{path} is damaged: its id {largest} is outside the vocabulary; prepare the text again"
                    )
                for sha256 in (own, *hashes):
                    sha256.update(block)
    except OSError as error:
        raise FileError(cannot_read(path, error)) from error
    if own.hexdigest() != shard.sha256:
        raise DamagedFile(f"{path} is damaged: its content differs from its hash; prepare the text again")


def map_shards(paths: Sequence[Path], dtype: np.dtype) -> Tokens:
    """Return the ids in token files, memory-mapped."""
    # The system cannot map an empty file.
    arrays = [np.memmap(path, dtype.newbyteorder("<"), "r").view(np.ndarray) for path in paths if path.stat().st_size]
    return Tokens(arrays, dtype.newbyteorder("<"))
