"""Reading files that may hold anything, and writing so that a reader sees the old content or the new, never half."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from timemix.errors import CannotWrite, DamagedFile, FileError, MissingFile

LARGEST = 32 * 2**20
"""Bytes of a JSON file at most: what one holds takes up to 30 times as much memory."""


def check_name(path: Path) -> None:
    """Raises FileError for a name that is not UTF-8: neither config.toml nor JSON nor safetensors can hold it."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileError(f"the name of {path} is not UTF-8; rename it") from error


def check_regular(path: Path, largest: int | None = None, what: str = "") -> None:
    """Raises FileError where a file is missing, a folder, pipe or device, or larger than `largest` bytes.

    A pipe would be waited for without end, a device read without end. `what`: words for the file, before its path.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else FileError
        raise kind(f"cannot read {what}{path}: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"cannot read {what}{path}: it is a folder, pipe or device, not a file")
    if largest is not None and found.st_size > largest:
        raise DamagedFile(f"{path} has {found.st_size:,} bytes; such a file has at most {largest:,}: it is damaged")


def read_text(path: Path, largest: int = LARGEST, what: str = "") -> str:
    """Text of a UTF-8 file without byte order mark. Raises FileError as `check_regular` does, and for other bytes."""
    check_regular(path, largest, what)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error


def read_lines(path: Path, largest: int | None = None) -> Iterator[bytes]:
    """Lines of a file with their ends, in pieces where one is longer than a mebibyte.

    Raises FileError as `check_regular` does.
    """
    check_regular(path, largest)
    try:
        with path.open("rb") as file:
            yield from iter(lambda: file.readline(2**20), b"")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`; when the block ends well, synced and renamed to it.

    An older `folder` is replaced. Raises CannotWrite when the disk is full or the place cannot be written.
    """
    temporary = unfinished_name(folder, os.getpid())
    with explained(folder):
        try:
            # A killed process may have left it.
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    _sync(path)
            if folder.exists():
                old = _set_aside(folder)
                temporary.rename(folder)
                shutil.rmtree(old)
                _sync(folder.parent)
            else:
                appear(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def unfinished_name(folder: Path, process: int) -> Path:
    """Return the name that `atomic_folder` gives a folder until it is complete, in the process of this id."""
    return folder.with_name(f".{folder.name}.partial-{process}")


def remove_folder(folder: Path) -> None:
    """Removes a folder so that it is there whole or not at all, also when the process is killed on the way.

    Raises CannotWrite where it may not.
    """
    with explained(folder):
        shutil.rmtree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    """Renames a folder to a name that `remove_unfinished` knows."""
    aside = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    folder.rename(aside)
    return aside


def appear(temporary: Path, folder: Path) -> None:
    """Renames a folder whose files are synced to a new place."""
    _sync(temporary)
    temporary.rename(folder)
    _sync(folder.parent)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, of the same suffix; when the block ends well, synced and renamed.

    Raises CannotWrite when the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Text as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raises CannotWrite for a block that fails to write `path`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(cannot_write(path, error)) from error


def remove_unfinished(folder: Path) -> None:
    """Removes what `atomic_folder` and `remove_folder` left of folders in `folder` when their process was killed."""
    for name in (".*.partial-*", ".*.replaced-*"):
        for path in folder.glob(name):
            shutil.rmtree(path, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> str:
    """Sentence for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device for {path}; free some, or choose another place"
    return f"cannot write {path}: {error.strerror or error}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Has the system write an open file or folder to its disk, if the file system can. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Many network and shared folders cannot sync a folder; what they hold is as safe as they make it.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
