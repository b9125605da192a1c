"""Safetensors files, read and written with clear errors."""

import contextlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timemix.errors import DamagedFile, MissingFile
from timemix.storage.files import check_name, check_regular

LARGEST_HEADER = 16 * 2**20
"""Bytes of the JSON at the beginning of a safetensors file at most: some 100,000 tensors."""

CHECKSUM = "crc32"
"""Key of the metadata under which a file holds the checksum of its tensors; those of earlier versions have none."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file with a checksum of its tensors. Raises OSError."""
    whole = {name: x.contiguous() for name, x in tensors.items()}
    # The library creates files that only their owner may read; what Python creates follows the umask.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(whole, path, metadata | {CHECKSUM: _checksum(whole, whole.__getitem__)})
    except SafetensorError as error:
        # The library hides the errno of a full disk in its text.
        if "os error 28" in str(error):
            raise OSError(28, "No space left on device") from error
        raise OSError(5, str(error)) from error
    _sort_metadata(path)
    if path.stat().st_mode != mode:
        path.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Give the same tensors the same bytes: the library orders the metadata differently from call to call."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}
        file.seek(8)
        # The same length: only the order changed.
        file.write(json.dumps(metadata | header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size))


def _checksum(names: Iterable[str], tensor: Callable[[str], Tensor]) -> str:
    """CRC-32 of names and contents, by name: any one wrong byte changes it, at several gigabytes a second."""
    crc = 0
    for name in sorted(names):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensor(name).reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def check_content(tensors: Any, path: Path) -> None:
    """Raises DamagedFile where the content of an open file is not what was written, by its checksum if it has one."""
    known = (tensors.metadata() or {}).get(CHECKSUM)
    if known is not None and known != _checksum(tensors.keys(), tensors.get_tensor):
        raise DamagedFile(f"{path} is damaged: its content has another checksum than it was saved with; restore it")


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one.

    Raises FileError when it is missing, truncated or something else.
    """
    check_name(path)
    if not path.exists():
        raise MissingFile(f"{path} is missing")
    check_regular(path)
    try:
        with path.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if header > LARGEST_HEADER:
            raise OSError(f"its header is said to have {header:,} bytes")
        try:
            opened = safe_open(path, framework="pt")
        except RuntimeError as error:
            # torch maps the file into memory, and cannot where it has gone since.
            raise OSError(str(error)) from error
        with opened as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path} is damaged or no safetensors file: {error}") from error
