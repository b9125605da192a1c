"""Token files (shards): the token ids of a split, in files of limited size."""

import contextlib
import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from timemix.errors import DamagedFile, FileError
from timemix.storage.files import cannot_read, check_regular, sync
from timemix.storage.json_files import OPTIONAL, Count

SHARD_BYTES = 1 << 27
"""Largest size of a token file, in bytes."""

IDS_AT_ONCE = 1 << 20
"""Number of token ids that are read or copied at a time."""

IGNORED = -100
"""Target that the loss does not count, as in PyTorch."""


MASK_TYPE = np.dtype(np.uint8)
"""Type of the entries of a loss mask."""


def mask_of(split: str) -> str:
    """Return the name of the split in the file names of its loss mask, such as train-loss."""
    return f"{split}-loss"


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard, such as train-00000.bin."""
    return f"{split}-{number:05}.bin"


@dataclass(frozen=True)
class Shard:
    """Number of tokens and hash of a token file."""

    tokens: Count
    sha256: str
    """Hash of the file, in hexadecimal."""
    counted: str | None = field(default=None, metadata=OPTIONAL)
    """Hash of the file of the loss mask, in hexadecimal; None: the loss counts all tokens."""


class Tokens:
    """Sequence of token ids in several arrays, such as memory-mapped files. A slice `tokens[a:b]` is one NumPy array.

    Args:
        arrays: Token ids, each (tokens,).
        dtype: Type of the ids.
        counted: For each token, 1 if the loss counts the token as a target, otherwise 0. Default: the loss counts all
            tokens.
    """

    def __init__(self, arrays: Sequence[np.ndarray], dtype: np.dtype, counted: "Tokens | None" = None) -> None:
        self.dtype, self.counted = dtype, counted
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
        counted = None if self.counted is None else self.counted.part(place)
        return Tokens(self._cut(place), self.dtype, counted)

    def blocks(self) -> Iterator[np.ndarray]:
        """Iterate over all ids in order, in arrays of at most IDS_AT_ONCE ids."""
        for start in range(0, len(self), IDS_AT_ONCE):
            yield self[start : start + IDS_AT_ONCE]

    def masked_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Iterate over all ids as `blocks` does, each block with its entries of the loss mask, or None."""
        for start in range(0, len(self), IDS_AT_ONCE):
            place = slice(start, start + IDS_AT_ONCE)
            yield self[place], None if self.counted is None else self.counted[place]

    @classmethod
    def joined(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """Join at least one sequence, without copying the ids."""
        counted = [part.counted for part in parts if part.counted is not None]
        arrays = [array for part in parts for array in part._arrays]
        return cls(arrays, parts[0].dtype, cls.joined(counted) if counted else None)

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


def targets_of(tokens: np.ndarray | Tokens, place: slice) -> np.ndarray:
    """Return the token ids of a slice as targets, int64. The loss does not count the targets with the value IGNORED."""
    targets = tokens[place].astype(np.int64)
    if isinstance(tokens, Tokens) and tokens.counted is not None:
        targets[tokens.counted[place] == 0] = IGNORED
    return targets


def counted_targets(tokens: np.ndarray | Tokens) -> int:
    """Return the number of tokens after the first token that the loss counts."""
    if not isinstance(tokens, Tokens) or tokens.counted is None:
        return max(0, len(tokens) - 1)
    return sum(int(np.count_nonzero(block)) for block in tokens.counted.part(slice(1, None)).blocks())


class ShardWriter:
    """Writer of the token files of a split, each of at most SHARD_BYTES, and of the files of its loss mask.

    Leaving the `with` block of the writer finishes the last file.

    Args:
        folder: Folder of the files.
        split: "train" or "valid".
        dtype: Type of the ids; the files are little-endian.
        shards: Finished files. The writer checks these files before it adds new files.
        vocab_size: Size of the vocabulary, for the check of `shards`.
        has_mask: Whether the split has a loss mask.
        finished: Function to call after each file is written and synced.

    Attributes:
        shards: Record of every finished file.

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
        has_mask: bool = False,
        finished: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder, self._split = folder, split
        self.finished = finished
        self.shards = list(shards)
        self._ids = _Column(folder, split, dtype.newbyteorder("<"))
        self._mask = _Column(folder, mask_of(split), MASK_TYPE) if has_mask else None
        for number, shard in enumerate(shards):
            self._ids.check(number, shard.tokens, shard.sha256, vocab_size)
            if self._mask is not None:
                self._mask.check(number, shard.tokens, shard.counted or "", 2)
        self._written = 0

    @property
    def tokens(self) -> int:
        """Number of ids in finished files."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Hash of all token ids of the split so far, in hexadecimal."""
        return self._ids.whole.hexdigest()

    @property
    def mask_sha256(self) -> str | None:
        """Hash of the loss mask of the split so far, in hexadecimal; None without a loss mask."""
        return None if self._mask is None else self._mask.whole.hexdigest()

    def mapped(self) -> Tokens:
        """Return the ids in finished files with their loss mask, memory-mapped."""
        return map_split(self._folder, self._split, self._ids.dtype, self.shards)

    def add(self, ids: np.ndarray, counted: np.ndarray | None = None) -> None:
        """Append ids, (tokens,), and with a loss mask its entries, (tokens,)."""
        room = max(1, SHARD_BYTES // self._ids.dtype.itemsize)
        while len(ids):
            count = room - self._written
            self._ids.write(len(self.shards), ids[:count])
            if self._mask is not None:
                assert counted is not None
                self._mask.write(len(self.shards), counted[:count])
                counted = counted[count:]
            self._written += len(ids[:count])
            ids = ids[count:]
            if self._written == room:
                self._finish()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            for column in self._columns:
                column.abandon()
        elif self._written or not self.shards:
            # Even a split without tokens has one file, which is empty.
            for column in self._columns:
                column.write(len(self.shards), np.empty(0, column.dtype))
            self._finish()

    @property
    def _columns(self) -> "list[_Column]":
        return [self._ids] if self._mask is None else [self._ids, self._mask]

    def _finish(self) -> None:
        hashes = [column.finish() for column in self._columns]
        self.shards.append(Shard(self._written, *hashes))
        self._written = 0
        self.finished()


class _Column:
    """The files of the ids of a split, or of its loss mask.

    Args:
        folder: Folder of the files.
        name: Beginning of the file names.
        dtype: Type of the entries.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self._folder, self._name, self.dtype = folder, name, dtype
        self.whole, self._own = hashlib.sha256(), hashlib.sha256()
        self._file: BinaryIO | None = None

    def _path(self, number: int) -> Path:
        return self._folder / shard_name(self._name, number)

    def check(self, number: int, tokens: int, sha256: str, vocab_size: int) -> None:
        """Check a finished file, and add its entries to the hash."""
        check_shard(self._path(number), self.dtype, tokens, sha256, vocab_size, self.whole)

    def write(self, number: int, entries: np.ndarray) -> None:
        """Append entries to the file with a number, which is created on first use."""
        if self._file is None:
            self._file = self._path(number).open("wb")
        raw = entries.astype(self.dtype, copy=False).tobytes()
        self._file.write(raw)
        self._own.update(raw)
        self.whole.update(raw)

    def finish(self) -> str:
        """Close and sync the file, and return its hash."""
        assert self._file is not None
        with self._file as file:
            file.flush()
            sync(file.fileno())
        own, self._file, self._own = self._own.hexdigest(), None, hashlib.sha256()
        return own

    def abandon(self) -> None:
        """Close the file after an error."""
        # Closing the file may fail with the same error as the preceding write.
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


def check_shard(path: Path, dtype: np.dtype, tokens: int, sha256: str, vocab_size: int, *hashes: Any) -> None:
    """Check a token file or the file of a loss mask against its record. The file is read once, in blocks.

    Args:
        path: The file.
        dtype: Type of the ids.
        tokens: Number of ids in the file.
        sha256: Hash of the file, in hexadecimal.
        vocab_size: Size of the vocabulary; all ids must be below this size.
        hashes: Hash objects that the bytes of the file are added to.

    Raises:
        DamagedFile: Size, ids or hash of the file are wrong.
        FileError: The file cannot be read.
    """
    size = tokens * dtype.itemsize
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
                for each in (own, *hashes):
                    each.update(block)
    except OSError as error:
        raise FileError(cannot_read(path, error)) from error
    if own.hexdigest() != sha256:
        raise DamagedFile(f"{path} is damaged: its content differs from its hash; prepare the text again")


def map_shards(paths: Sequence[Path], dtype: np.dtype, counted: Tokens | None = None) -> Tokens:
    """Return the ids in token files, memory-mapped, with their loss mask, if any."""
    # The system cannot map an empty file.
    arrays = [np.memmap(path, dtype.newbyteorder("<"), "r").view(np.ndarray) for path in paths if path.stat().st_size]
    return Tokens(arrays, dtype.newbyteorder("<"), counted)


def map_split(folder: Path, split: str, dtype: np.dtype, shards: Sequence[Shard]) -> Tokens:
    """Return the ids in the token files of a split with their loss mask, if any, memory-mapped."""
    ids, mask = ([folder / shard_name(name, i) for i in range(len(shards))] for name in (split, mask_of(split)))
    has_mask = any(shard.counted is not None for shard in shards)
    return map_shards(ids, dtype, map_shards(mask, MASK_TYPE) if has_mask else None)
