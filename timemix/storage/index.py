"""The index of tensors that are stored in one safetensors file per process.

    model.safetensors                                        whole tensors, without an index
    model-0-of-2.safetensors, model-1-of-2.safetensors       rows of each tensor, in the order of the files
    model.index.json                                         the files with their checksums, and the shapes of the whole
                                                             tensors

A tensor without dimensions is in the first file alone. The names of the files of the optimizer state begin with
`training` instead of `model`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timemix.errors import DamagedFile
from timemix.storage.json_files import read_record, to_json


@dataclass(frozen=True)
class Index:
    """The content of an index: the files that hold the tensors, and the shapes of the tensors.

    Args:
        files: Names of the files, in the order of the rows that they hold.
        shapes: Shape of each whole tensor, by name.
        checksums: Checksum of each file, so that files of another step or process are refused. In an older index
            without checksums, the value is ().
    """

    files: tuple[str, ...]
    shapes: dict[str, Any]
    checksums: tuple[str, ...] = ()


def shard_name(stem: str, rank: int, size: int) -> str:
    """Return the name of the file in which one process stores its rows."""
    return f"{stem}-{rank}-of-{size}.safetensors"


def index_path(folder: Path, stem: str) -> Path:
    """Return the path of the index of sharded tensors."""
    return folder / f"{stem}.index.json"


def is_sharded(folder: Path, stem: str) -> bool:
    """Return True if an index of sharded files exists, and no file of whole tensors exists."""
    return index_path(folder, stem).exists() and not (folder / f"{stem}.safetensors").exists()


def write_index(folder: Path, stem: str, checksums: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Write the index of the files with these checksums, in the order of the ranks. Raises OSError."""
    files = tuple(shard_name(stem, rank, len(checksums)) for rank in range(len(checksums)))
    index = Index(files, {name: list(shape) for name, shape in shapes.items()}, tuple(checksums))
    index_path(folder, stem).write_text(json.dumps(to_json(index), indent=1), encoding="utf-8")


def read_index(folder: Path, stem: str) -> Index:
    """Read the index of sharded tensors. Raises FileError if the index is missing or damaged."""
    path = index_path(folder, stem)
    index = read_record(path, Index)
    for name, shape in index.shapes.items():
        if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise DamagedFile(f"{path} is damaged: the shape of {name} is {shape!r}; restore it from a copy")
    if not index.files or any("/" in name for name in index.files):
        raise DamagedFile(f"{path} is damaged: its files are {list(index.files)}; restore it from a copy")
    if len(index.checksums) not in (0, len(index.files)):
        raise DamagedFile(
            f"{path} is damaged: it has {len(index.checksums)} checksums of {len(index.files)} files; restore it from"
            " a copy"
        )
    return index
