"""Memory-mapped entries of a zip file with unknown content. Nothing is extracted, so no name becomes a path."""

import io
import mmap
import zipfile
import zlib
from pathlib import Path
from typing import Any

from timemix.errors import DamagedFile, FileError
from timemix.storage.files import cannot_read, check_name, check_regular

LARGEST_DIRECTORY = 2**20
"""Maximum size in bytes of the list of entries. The largest published RWKV model needs about 200 KiB."""
# The end of a zip file, which `zipfile` reads without a size: fixed fields, and a comment of at most 64 KiB
_LARGEST_END = 2**17
_ENCRYPTED = 0x1
# The header of an entry: a signature, 22 bytes that the list of entries repeats, the lengths of name and extra field
_SIGNATURE, _LENGTHS, _HEADER = b"PK\3\4", 26, 30


class _Directory(io.FileIO):
    """A file that refuses long reads. `zipfile` reads the list of entries, of any claimed length, in one call."""

    def read(self, size: int | None = -1, /) -> Any:
        size = _LARGEST_END if size is None or size < 0 else size
        if size > LARGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"its list of entries would have {size:,} bytes")
        return super().read(size)


class ZipEntries:
    """The entries of a zip file, as parts of one private mapping of the file into memory.

    Args:
        path: The file.

    Attributes:
        path: The file.
        mapping: The whole file. Writes to the mapping change neither the file nor other mappings.
        names: Names of the entries, in the order of the list of entries.

    Raises:
        FileError: The file is missing, is no regular file or cannot be read.
        DamagedFile: The file is not a zip file, has two entries of one name, or has a compressed entry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_name(path)
        check_regular(path)
        try:
            with _Directory(path) as file:
                self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                with zipfile.ZipFile(file) as archive:
                    entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise DamagedFile(f"{path} is damaged or not a zip file: {error}; restore it from a copy") from error
        except OSError as error:
            raise FileError(cannot_read(path, error)) from error
        self._entries = {entry.filename: entry for entry in entries}
        self.names = tuple(self._entries)
        if len(self.names) < len(entries):
            raise self._damaged("two of its entries have one name")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
                raise DamagedFile(
                    f"{self.path} has compressed or encrypted entries, as files of TorchScript do; save the weights"
                    " with torch.save(model.state_dict(), FILE)"
                )

    def _damaged(self, reason: str) -> DamagedFile:
        return DamagedFile(f"{self.path} is damaged: {reason}; restore it from a copy")

    def place(self, name: str) -> tuple[int, int]:
        """Return the place of an entry in the mapping, after a check of its content.

        The check reads the content once. The memory of the content is released after the check.

        Args:
            name: Name of the entry.

        Returns:
            First byte and number of bytes.

        Raises:
            DamagedFile: The entry does not exist, lies outside the file, or differs from its checksum.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise self._damaged(f"its entry {name!r} is missing")
        header = self.mapping[entry.header_offset : entry.header_offset + _HEADER]
        if len(header) < _HEADER or not header.startswith(_SIGNATURE):
            raise self._damaged(f"its entry {name!r} has no header")
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (_LENGTHS, _LENGTHS + 2))
        begin = entry.header_offset + _HEADER + sum(lengths)
        end = begin + entry.file_size
        if entry.file_size != entry.compress_size or end > len(self.mapping):
            raise self._damaged(f"its entry {name!r} ends outside the file")
        with memoryview(self.mapping)[begin:end] as content:
            if zlib.crc32(content) != entry.CRC:
                raise self._damaged(f"the content of its entry {name!r} differs from its checksum")
        self._release(begin, end)
        return begin, entry.file_size

    def _release(self, begin: int, end: int) -> None:
        """Release the memory of the whole pages in a part of the mapping. The next access reads them from the file."""
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            self.mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)
