"""Tensors of a checkpoint, in one safetensors file or in one file per process with an index (`storage.index`)."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timemix.errors import DamagedFile
from timemix.storage.index import index_path, read_index
from timemix.storage.tensors import CHECKSUM, check_content, open_tensors

FLOATS = ("F32", "F64", "F16", "BF16")
"""Types of tensors of floating-point numbers, as the header of a safetensors file names them."""


class StoredTensors:
    """Read tensors of a checkpoint, whole or by rows, from one file or several.

    Args:
        path: The one file, or the index; for messages.
        files: Path and opened safetensors file, in the order of their rows.
        shapes: Shapes of the whole tensors by name; None for those of the one file.

    Raises:
        DamagedFile: The rows in the files do not make up the shapes.
    """

    def __init__(self, path: Path, files: Sequence[tuple[Path, Any]], shapes: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._files = files
        self._parts: dict[str, list[Any]] = {}
        for _, file in files:
            for name in file.keys():  # noqa: SIM118
                self._parts.setdefault(name, []).append(file.get_slice(name))
        own = {name: part.get_shape() for name, (part, *_) in self._parts.items()}
        self.shapes = own if shapes is None else shapes
        for name in sorted(self._parts.keys() | self.shapes.keys()):
            if not self._make_up(self._parts.get(name, []), self.shapes.get(name)):
                raise DamagedFile(f"{path} does not fit its files: their rows of {name} are not those of one tensor")

    @staticmethod
    def _make_up(parts: list[Any], shape: list[int] | None) -> bool:
        """Whether the rows of a tensor in the files are all rows of a whole tensor of this shape."""
        if shape is None or not shape:
            return shape == [] and len(parts) == 1 and parts[0].get_shape() == []
        rows = [part.get_shape()[:1] for part in parts]
        return sum(map(sum, rows)) == shape[0] and all(part.get_shape()[1:] == shape[1:] for part in parts)

    def dtype(self, name: str) -> str:
        """Return the type of a tensor as its file names it, such as "F32"."""
        return str(self._parts[name][0].get_dtype())

    def fits(self, name: str, shape: Sequence[int]) -> bool:
        """Whether there is a tensor of this name and shape, of floating-point numbers; reads no content."""
        if name not in self._parts:
            return False
        return list(self.shapes[name]) == list(shape) and all(p.get_dtype() in FLOATS for p in self._parts[name])

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Read the rows from `begin` up to but not including `end` of a tensor with at least one dimension."""
        found, first = [], 0
        for part in self._parts[name]:
            count = part.get_shape()[0]
            low, high = max(begin - first, 0), min(end - first, count)
            if low < high:
                found.append(part[low:high])
            first += count
        if not found:
            return self.tensor(name)[:0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor."""
        parts = [part[...] for part in self._parts[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def check_content(self, rank: int = 0, size: int = 1) -> None:
        """Check the checksums of every `size`-th file, from file `rank` on.

        Raises:
            DamagedFile: The content of a file has another checksum than it was saved with.
        """
        for path, file in self._files[rank::size]:
            check_content(file, path)


@contextlib.contextmanager
def open_stored(folder: Path, stem: str) -> Iterator[StoredTensors]:
    """Open the tensors of a checkpoint, which are read one by one.

    Args:
        folder: Checkpoint folder.
        stem: "model" or "training".

    Raises:
        FileError: A file is missing, truncated or something else, or the files do not fit together.
    """
    path = folder / f"{stem}.safetensors"
    with contextlib.ExitStack() as stack:
        if path.exists() or not index_path(folder, stem).exists():
            yield StoredTensors(path, [(path, stack.enter_context(open_tensors(path)))])
            return
        index = read_index(folder, stem)
        files = [(folder / name, stack.enter_context(open_tensors(folder / name))) for name in index.files]
        for (own, file), checksum in zip(files, index.checksums, strict=False):
            if (file.metadata() or {}).get(CHECKSUM) != checksum:
                raise DamagedFile(
                    f"{own} is not the file that {index_path(folder, stem).name} describes: its checksum differs;"
                    " restore both from one copy"
                )
        yield StoredTensors(index_path(folder, stem), files, index.shapes)
