"""Token files: the ids of a split in files of limited size, written once, checked, and memory-mapped."""

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
from timemix.storage.files import check_regular, sync
from timemix.storage.json_files import Count

SHARD_BYTES = 1 << 27
"""Most bytes of a file."""

IDS_AT_ONCE = 1 << 20
"""Ids read or copied at a time."""


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05}.bin"


@dataclass(frozen=True)
class Shard:
    """What is known of a token file."""

    tokens: Count
    sha256: str


class Tokens:
    """Token ids (tokens,) that lie in several arrays, such as memory-mapped files; `tokens[a:b]` is an array."""

    def __init__(self, arrays: Sequence[np.ndarray], dtype: np.dtype) -> None:
        self.dtype = dtype
        self._arrays = [array for array in arrays if len(array)]
        self._starts = [0, *itertools.accumulate(map(len, self._arrays))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, place: slice) -> np.ndarray:
        """Ids of a slice without a step: a view where they lie in one array."""
        arrays = self._cut(place)
        return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, self.dtype), *arrays])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of them, in memory where they lie in several arrays."""
        whole = self[:]
        return whole.astype(dtype or self.dtype, copy=bool(copy))

    def part(self, place: slice) -> "Tokens":
        """A slice without a step that copies nothing."""
        return Tokens(self._cut(place), self.dtype)

    def blocks(self) -> Iterator[np.ndarray]:
        """All ids in order, at most IDS_AT_ONCE at a time."""
        for start in range(0, len(self), IDS_AT_ONCE):
            yield self[start : start + IDS_AT_ONCE]

    def _cut(self, place: slice) -> list[np.ndarray]:
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError("tokens are sliced without a step")
        found = []
        number = bisect_right(self._starts, start) - 1
        while number < len(self._arrays) and self._starts[number] < stop:
            first = self._starts[number]
            found.append(self._arrays[number][max(start - first, 0) : stop - first])
            number += 1
        return found


class ShardWriter:
    """Writes the ids of a split into files of at most SHARD_BYTES; a context, at whose end the last one is finished.

    shards: tokens and sha256 of every finished file. Those given at the start are there and are checked; `sha256`, that
        of all bytes, goes on after them. `vocab_size` is for that check.
    finished: called after each file that is written and synced.

    Raises TimemixError as `check_shard` does, and OSError.
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
        """Ids in finished files."""
        return sum(shard.tokens for shard in self.shards)

    def add(self, ids: np.ndarray) -> None:
        """Writes ids."""
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
            # What could not be written before cannot be written now.
            with contextlib.suppress(OSError):
                if self._file is not None:
                    self._file.close()
        elif self._file is not None or not self.shards:
            # A split without tokens has one empty file.
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
    """Reads a token file once, block by block, and gives its bytes to `hashes` too.

    Raises FileError where it cannot be read, or its size, its ids or its sha256 are not what `shard` says of it.
    """
    size = shard.tokens * dtype.itemsize
    own = hashlib.sha256()
    check_regular(path)
    try:
        if (found := path.stat().st_size) != size:
            raise DamagedFile(f"{path} has {found} bytes, not {size}: it is damaged")
        with path.open("rb") as file:
            while block := file.read(IDS_AT_ONCE * dtype.itemsize):
                largest = int(np.frombuffer(block, dtype).max())
                if largest >= vocab_size:
                    raise DamagedFile(f"{path} holds the id {largest}, outside the vocabulary: it is damaged")
                for sha256 in (own, *hashes):
                    sha256.update(block)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error
    if own.hexdigest() != shard.sha256:
        raise DamagedFile(f"{path} is damaged: its content is not what was written; prepare the folder again")


def map_shards(paths: Sequence[Path], dtype: np.dtype) -> Tokens:
    """The ids in token files, memory-mapped."""
    # An empty file cannot be mapped.
    arrays = [np.memmap(path, dtype.newbyteorder("<"), "r").view(np.ndarray) for path in paths if path.stat().st_size]
    return Tokens(arrays, dtype.newbyteorder("<"))
