"""Reading of the tensors of a checkpoint, from one safetensors file or from one file per process with an index."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timemix.errors import DamagedFile
from timemix.storage.index import index_path, is_sharded, read_index
from timemix.storage.tensors import CHECKSUM, check_content, open_tensors

FLOATS = ("F32", "F64", "F16", "BF16")
"""Names of floating-point types in the header of a safetensors file."""


class StoredTensors:
    """Tensors of a checkpoint in one or several files. Each tensor can be read whole or by rows.

    Args:
        path: Path of the only file or of the index, for messages.
        files: Pairs of path and opened safetensors file, in the order of the rows that the files hold.
        shapes: Shapes of the whole tensors by name; None to use the shapes in the only file.

    Raises:
        DamagedFile: The rows in the files do not match the shapes of the whole tensors.
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
                raise DamagedFile(f"{path} does not fit its files: the rows of {name} in the files are not one tensor")

    @property
    def is_mapped(self) -> bool:
        """Whether `tensor` returns tensors that are mapped from a file: each tensor is in one file."""
        return all(len(parts) == 1 for parts in self._parts.values())

    @staticmethod
    def _make_up(parts: list[Any], shape: list[int] | None) -> bool:
        """Return whether the rows of a tensor in all files together have the shape of the whole tensor."""
        if shape is None or not shape:
            return shape == [] and len(parts) == 1 and parts[0].get_shape() == []
        rows = [part.get_shape()[:1] for part in parts]
        return sum(map(sum, rows)) == shape[0] and all(part.get_shape()[1:] == shape[1:] for part in parts)

    def dtype(self, name: str) -> str:
        """Return the type of a tensor as named in the safetensors file, such as "F32"."""
        return str(self._parts[name][0].get_dtype())

    def fits(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether a floating-point tensor of this name and shape exists, without reading its content."""
        if name not in self._parts:
            return False
        return list(self.shapes[name]) == list(shape) and all(p.get_dtype() in FLOATS for p in self._parts[name])

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """Read the rows `begin` to `end` - 1 of a tensor with at least one dimension."""
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
        """Check the checksums of the files `rank`, `rank` + `size`, `rank` + 2 * `size` and so on.

        Raises:
            DamagedFile: The content of a file does not match the checksum in the file.
        """
        for path, file in self._files[rank::size]:
            check_content(file, path)


@contextlib.contextmanager
def open_stored(folder: Path, stem: str) -> Iterator[StoredTensors]:
    """Open the files of a checkpoint, to read the tensors one by one.

    Args:
        folder: Checkpoint folder.
        stem: "model" or "training".

    Raises:
        FileError: A file is missing, truncated or not a safetensors file, or the files do not belong together.
    """
    path = folder / f"{stem}.safetensors"
    with contextlib.ExitStack() as stack:
        if not is_sharded(folder, stem):
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
