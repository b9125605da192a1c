"""Locks of files and folders, which end with their process."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from timemix.errors import FileError, InUse
from timemix.storage.files import explained, write_text
from timemix.storage.json_files import read_json


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
        """Holds the folder. Raises InUse, naming the holder, where another process (or a lock) holds it."""
        import filelock

        if self._lock.is_locked:
            return
        with explained(self.folder):
            try:
                self._lock.acquire(blocking=False)
            except filelock.Timeout:
                raise InUse(f"{self.folder} is in use by {self._named()}; wait for its end, or stop it") from None
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
        except (FileError, KeyError, ValueError, RecursionError):
            return "another process"


def is_held(folder: Path) -> bool:
    """Whether a process holds a `FolderLock`, by what it wrote beside it; takes no lock, so none fails for it.

    A holder on another machine is taken for alive.
    """
    import psutil

    try:
        holder = read_json(folder / ".lock.json")
        if holder["host"] != socket.gethostname():
            return True
        since = time.mktime(time.strptime(holder["since"], "%Y-%m-%d %H:%M:%S"))
        # Another process may have got the number since; it began later.
        return bool(psutil.Process(holder["process"]).create_time() < since + 1)
    except (FileError, KeyError, TypeError, ValueError, OverflowError, psutil.Error):
        return False
