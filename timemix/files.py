"""Writing files so that a reader sees the old content or the new, never half of it."""

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from timemix.errors import UserError


class CannotWrite(UserError):
    """A disk that is full, or a place that cannot be written."""


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
                old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
                folder.rename(old)
                temporary.rename(folder)
                shutil.rmtree(old)
                _sync(folder.parent)
            else:
                appear(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


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
            self._holder.write_text(json.dumps(holder), encoding="utf-8")

    def release(self) -> None:
        """Lets go; nothing where it was not held."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def _named(self) -> str:
        try:
            holder = json.loads(self._holder.read_text(encoding="utf-8"))
            return f"process {holder['process']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "another process"


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raises UserError for a block that fails to write `path`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(cannot_write(path, error)) from error


def remove_unfinished(folder: Path) -> None:
    """Removes what `atomic_folder` left of folders in `folder` when its process was killed."""
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
