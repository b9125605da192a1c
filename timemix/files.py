"""Reading files that may hold anything, and writing so that a reader sees the old content or the new, never half."""

import contextlib
import errno
import json
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from timemix.errors import UserError

LARGEST = 32 * 2**20
"""Bytes of a JSON file at most: what one holds takes up to 30 times as much memory."""


class CannotWrite(UserError):
    """A disk that is full, or a place that cannot be written."""


def check_regular(path: Path, largest: int | None = None, what: str = "") -> None:
    """Raises UserError where a file is missing, a folder, pipe or device, or larger than `largest` bytes.

    A pipe would be waited for without end, a device read without end. `what`: words for the file, before its path.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {what}{path}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"cannot read {what}{path}: it is a folder, pipe or device, not a file")
    if largest is not None and found.st_size > largest:
        raise UserError(f"{path} has {found.st_size:,} bytes; such a file has at most {largest:,}: it is damaged")


def read_text(path: Path, largest: int = LARGEST, what: str = "") -> str:
    """Text of a UTF-8 file without byte order mark. Raises UserError as `check_regular` does, and for other bytes."""
    check_regular(path, largest, what)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def parse_json(path: Path, what: str = "") -> Any:
    """What a JSON file holds. Raises UserError when it is missing or damaged; `what` as for `check_regular`."""
    text = read_text(path, what=what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not whole JSON ({error}); restore it from a copy") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError as `parse_json` does, and for another value."""
    data = parse_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return data


def read_lines(path: Path, largest: int | None = None) -> Iterator[bytes]:
    """Lines of a file with their ends, in pieces where one is longer than a mebibyte.

    Raises UserError as `check_regular` does.
    """
    check_regular(path, largest)
    try:
        with path.open("rb") as file:
            yield from iter(lambda: file.readline(2**20), b"")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    """Whether a value from a file is an integer from 0 that 64 bits hold."""
    return type(value) is int and 0 <= value < 2**63


def are_numbers(value: Any) -> bool:
    """Whether a value from a file is a list of numbers."""
    return isinstance(value, list) and all(map(is_number, value))


def misfit(data: Any, checks: dict[str, Callable[[Any], bool]]) -> str | None:
    """Name of the first field of a JSON object that is missing or fails its check, None where all serve."""
    return next(
        (n for n, check in checks.items() if not (isinstance(data, dict) and n in data and check(data[n]))), None
    )


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`; when the block ends well, synced and renamed to it.

    An older `folder` is replaced. Raises CannotWrite when the disk is full or the place cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
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
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the lock file `path` during the block and gives True; False where another process holds it.

    `wait` until that process lets go, rather than give False.
    The lock ends with its process, however that ends.
    """
    import filelock

    lock = filelock.FileLock(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Its Timeout is an OSError too, and no failure here.
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(blocking=wait)
    try:
        yield lock.is_locked
    finally:
        lock.release()


class FolderLock:
    """Says that one process works in a folder, and which. The lock ends with its process, however that ends.

    `taken_over`: the process that held the folder before and ended without letting go, killed say; else None.
    """

    def __init__(self, folder: Path) -> None:
        import filelock

        self.folder = folder
        self.taken_over: str | None = None
        self._lock = filelock.FileLock(folder / ".lock")
        # Beside the lock file, whose content a process that tries to take the lock may empty.
        self._holder = folder / ".lock.json"

    def take(self) -> None:
        """Holds the folder. Raises UserError, naming the holder, where another process (or a lock) holds it."""
        import filelock

        if self._lock.is_locked:
            return
        with explained(self.folder):
            try:
                self._lock.acquire(blocking=False)
            except filelock.Timeout:
                raise UserError(f"{self.folder} is in use by {self._named()}; wait for its end, or stop it") from None
            self.taken_over = self._named() if self._holder.exists() else None
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
            # Not into what lies there: a link or a pipe.
            write_text(self._holder, json.dumps(holder))

    def release(self) -> None:
        """Lets go; nothing where it was not held."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def _named(self) -> str:
        try:
            holder = read_json(self._holder)
            return f"process {holder['process']} on {holder['host']} since {holder['since']}"
        except (UserError, KeyError, ValueError, RecursionError):
            return "another process"


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raises UserError for a block that fails to write `path`."""
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
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
