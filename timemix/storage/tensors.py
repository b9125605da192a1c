"""Safetensors files, with checksums and clear errors."""

import contextlib
import ctypes
import errno
import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from timemix.errors import DamagedFile, FileError, MissingFile
from timemix.storage.files import cannot_read, check_name, check_regular

LARGEST_HEADER = 16 * 2**20
"""Maximum size in bytes of the JSON header of a safetensors file, enough for about 100,000 tensors."""

MOST_BRACES = 1000
"""Maximum number of opening braces in the header of a file in memory, beside one for each tensor."""

ALIGNMENT = 64
"""Largest size in bytes of a register of processors, and the alignment of tensors that PyTorch allocates."""

CHECKSUM = "crc32"
"""Metadata key of the checksum of the tensors in a file. Earlier versions of timemix wrote files without a checksum."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write a safetensors file with a checksum of its tensors.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: Metadata of the file by name, to which `write_tensors` adds the checksum.

    Returns:
        The checksum.

    Raises:
        OSError: The file cannot be written.
    """
    whole = _apart(tensors)
    # The library creates files that only the owner may read. Files that Python creates follow the umask.
    path.touch()
    mode = path.stat().st_mode
    checksum = _checksum(whole, whole.__getitem__)
    try:
        save_file(whole, path, metadata | {CHECKSUM: checksum})
    except SafetensorError as error:
        # The error of the library gives the error number (errno), such as the number for a full disk, only in its
        # message.
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise OSError(errno.EIO, str(error)) from error
    _sort_metadata(path)
    if path.stat().st_mode != mode:
        path.chmod(mode)
    return checksum


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors, with copies of those that share numbers with another, which the library refuses."""
    whole, end = {name: x.contiguous() for name, x in tensors.items()}, 0
    for name, x in sorted(whole.items(), key=lambda item: item[1].data_ptr()):
        if x.data_ptr() < end:
            whole[name] = x.clone()
        end = max(end, x.data_ptr() + x.nbytes)
    return whole


def copy_tensors(path: Path, names: Mapping[str, str], stored: Any, metadata: dict[str, str]) -> None:
    """Write a safetensors file from the tensors of an open file, one tensor after another, with a checksum.

    The memory use does not depend on the size of the file, if the tensors are mapped.

    Args:
        path: The file.
        names: Names of floating-point tensors in the open file, by their new names.
        stored: The open file, a `StoredTensors`.
        metadata: Metadata of the file by name, to which `copy_tensors` adds the checksum.

    Raises:
        OSError: The file cannot be written.
    """

    def tensor(name: str) -> Tensor:
        found: Tensor = stored.tensor(names[name]).contiguous()
        return found

    metadata = metadata | {CHECKSUM: _checksum(names, tensor, mapped=stored.is_mapped)}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    widths = {name: int(stored.dtype(names[name]).lstrip("BF")) // 8 for name in names}
    sizes = {name: math.prod(stored.shapes[names[name]]) * widths[name] for name in names}
    # As in the library, wide types come first, so that each tensor begins at a multiple of the size of its numbers.
    # Libraries for matrix products sum in another order if a mapped tensor does not begin at a multiple of ALIGNMENT.
    order = sorted(names, key=lambda name: (-widths[name], sizes[name] % ALIGNMENT != 0, name))
    end = 0
    for name in order:
        begin, end = end, end + sizes[name]
        dtype, shape = stored.dtype(names[name]), list(stored.shapes[names[name]])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            content = tensor(name)
            file.write(content.reshape(-1).view(torch.uint8).numpy().data)
            if stored.is_mapped:
                release(content)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a file, since the library writes any order, so that equal tensors give identical files."""
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8)
        file.write(_sorted_header(header))


def _sorted_header(header: bytes) -> bytes:
    """Return a header with sorted metadata, of the same length, because only the order of the metadata changes."""
    parsed = json.loads(header)
    metadata = {"__metadata__": dict(sorted(parsed.pop("__metadata__").items()))}
    text = json.dumps(metadata | parsed, ensure_ascii=False, separators=(",", ":"))
    return text.encode().ljust(len(header))


def tensors_to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the content of the file that `write_tensors` writes.

    Args:
        tensors: Tensors by name.
        metadata: Metadata of the file by name, to which the checksum is added.

    Returns:
        The content.
    """
    whole = {name: x.contiguous() for name, x in tensors.items()}
    content = save(whole, metadata | {CHECKSUM: _checksum(whole, whole.__getitem__)})
    end = 8 + int.from_bytes(content[:8], "little")
    return content[:8] + _sorted_header(content[8:end]) + content[end:]


def tensors_from_bytes(content: bytes, most: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file in memory, and check the tensors.

    A hostile file needs at most about 20 times its size in memory.

    Args:
        content: Content of the file.
        most: Largest number of tensors.

    Returns:
        Tensors by name, and metadata by name.

    Raises:
        ValueError: The content is damaged or not a safetensors file. The message is a clause that states the reason.
    """
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + min(size, LARGEST_HEADER)]
    # A tensor without numbers takes 50 bytes in the header, and 1,000 bytes in memory.
    if size > LARGEST_HEADER or header.count(b"{") > most + MOST_BRACES:
        raise ValueError(f"its header has {size:,} bytes and describes {header.count(b'{'):,} objects")
    try:
        tensors, metadata = load(content), json.loads(header).get("__metadata__", {})
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"it is not a safetensors file ({error})") from None
    if CHECKSUM in metadata and metadata[CHECKSUM] != _checksum(tensors, tensors.__getitem__):
        raise ValueError("its content differs from its checksum")
    return tensors, metadata


def _checksum(names: Iterable[str], tensor: Callable[[str], Tensor], *, mapped: bool = False) -> str:
    """Return the CRC-32 of the names and contents of tensors, in hexadecimal.

    CRC-32 detects every change of a single byte, at several gigabytes per second.

    Args:
        names: Names of the tensors, in any order.
        tensor: Function that returns the tensor of a name.
        mapped: Whether the tensors are mapped from a file, so that their memory can be released after use.
    """
    crc = 0
    for name in sorted(names):
        crc = zlib.crc32(name.encode(), crc)
        content = tensor(name)
        crc = zlib.crc32(content.reshape(-1).view(torch.uint8).numpy().data, crc)
        if mapped:
            release(content)
    return f"{crc:08x}"


def release(mapped: Tensor) -> None:
    """Release the memory of a tensor that is mapped from a file. The next access reads the file again.

    Args:
        mapped: A contiguous tensor of `open_tensors`, whose numbers were never written. A tensor in other memory would
            lose its numbers.
    """
    begin = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        # If the call fails, the memory stays in use, which does no harm.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def check_content(tensors: Any, path: Path) -> None:
    """Check the content of an open file against its checksum, if the file has a checksum.

    Args:
        tensors: The open file that `open_tensors` yields.
        path: Path of the file, for the message.

    Raises:
        DamagedFile: The content has changed since the file was written.
    """
    known = (tensors.metadata() or {}).get(CHECKSUM)
    if known is not None and known != _checksum(tensors.keys(), tensors.get_tensor, mapped=True):
        raise DamagedFile(f"{path} is damaged: its content differs from its checksum; restore it from a copy")


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, to read its tensors one by one.

    Args:
        path: The file.

    Raises:
        FileError: The file is missing, truncated or not a safetensors file.
    """
    check_name(path)
    if not path.exists():
        raise MissingFile(f"{path} is missing; restore it from a copy, or check the path")
    check_regular(path)
    try:
        with path.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
    except OSError as error:
        raise FileError(cannot_read(path, error)) from error
    try:
        if header > LARGEST_HEADER:
            raise OSError(f"its header would have {header:,} bytes")
        try:
            opened = safe_open(path, framework="pt")
        except RuntimeError as error:
            # torch maps the file into memory, which fails if another process has removed it.
            raise OSError(str(error)) from error
        with opened as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedFile(
            f"{path} is damaged or not a safetensors file: {error}; restore it, or name another file"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, and check their content.

    Args:
        path: The file.

    Returns:
        Tensors by name, mapped from the file.

    Raises:
        FileError: The file is missing, damaged or not a safetensors file.
    """
    with open_tensors(path) as file:
        check_content(file, path)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
