"""Locks of files and folders, which end with their process."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from timemix.errors import FileError, InUse
from timemix.storage.files import explained, write_text
from timemix.storage.json_files import read_json

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a lock fails with on file systems without locks, such as some of clusters and networks."""


class _Lock:
    """An operating-system lock of a file, which ends with its process.

    On a file system without locks: a file PATH.soft beside it that names the process. The next process on the same
    machine removes it if that process has ended.
    """

    def __init__(self, path: Path) -> None:
        import filelock

        self.soft = path.with_name(f"{path.name}.soft")
        # The library's own fallback takes the file that an earlier lock left for a lock that is held.
        self._lock: filelock.BaseFileLock = filelock.FileLock(path, fallback_to_soft=False)

    @property
    def is_locked(self) -> bool:
        return self._lock.is_locked

    def acquire(self, *, blocking: bool) -> None:
        """Takes the lock if no other process holds it, or waits for it. Raises OSError."""
        import filelock

        # Its Timeout is an OSError too, and no failure here.
        with contextlib.suppress(filelock.Timeout):
            try:
                self._lock.acquire(blocking=blocking)
            except filelock.Timeout:
                raise
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self._lock = filelock.SoftFileLock(self.soft)
                self._lock.acquire(blocking=blocking)

    def release(self) -> None:
        self._lock.release()


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the lock file `path` during the block and gives True; False where another process holds it.

    `wait` until that process lets go, rather than give False.
    The lock ends with its process, however that ends.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _Lock(path)
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
        self.folder = folder
        self.taken_over: str | None = None
        self._lock = _Lock(folder / ".lock")
        # Beside the lock file, whose content a process that tries to take the lock may empty.
        self._holder = folder / ".lock.json"

    def take(self) -> None:
        """Holds the folder. Raises InUse, naming the holder, where another process (or a lock) holds it."""
        if self._lock.is_locked:
            return
        with explained(self.folder):
            self._lock.acquire(blocking=False)
            if not self._lock.is_locked:
                dead = f"; if it has ended, remove {self._lock.soft}" if self._lock.soft.exists() else ""
                raise InUse(f"{self.folder} is in use by {self._named()}; wait for its end, or stop it{dead}")
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
