"""Safetensors files, read and written with clear errors."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timemix.errors import DamagedFile, MissingFile
from timemix.storage.files import check_name, check_regular

LARGEST_HEADER = 16 * 2**20
"""Bytes of the JSON at the beginning of a safetensors file at most: some 100,000 tensors."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file. Raises OSError."""
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)
    except SafetensorError as error:
        # The library hides the errno of a full disk in its text.
        if "os error 28" in str(error):
            raise OSError(28, "No space left on device") from error
        raise OSError(5, str(error)) from error


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
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path} is damaged or no safetensors file: {error}") from error


def fits_tensor(tensors: Any, name: str, shape: Sequence[int]) -> bool:
    """Whether an open file has a tensor of this name and shape, of floating-point numbers; reads no content."""
    if name not in tensors.keys():  # noqa: SIM118
        return False
    found = tensors.get_slice(name)
    return list(found.get_shape()) == list(shape) and found.get_dtype() in ("F32", "F64", "F16", "BF16")
