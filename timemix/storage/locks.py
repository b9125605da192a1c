"""Locks of files and folders. The system releases them when their process ends."""

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
"""Error numbers of file systems without locks, such as some cluster and network file systems."""


class _Lock:
    """A lock of a file by the operating system, which releases it when the process ends.

    The fallback on a file system without locks is a file PATH.soft that names the process. The next process on the same
    machine removes this file if the named process has ended.
    """

    def __init__(self, path: Path) -> None:
        import filelock

        self.soft = path.with_name(f"{path.name}.soft")
        # The fallback of the library would mistake the file of an earlier, released lock for a held lock.
        self._lock: filelock.BaseFileLock = filelock.FileLock(path, fallback_to_soft=False)

    @property
    def is_locked(self) -> bool:
        return self._lock.is_locked

    def acquire(self, *, blocking: bool) -> None:
        """Take the lock if no other process holds it; `blocking` waits for it.

        Raises:
            OSError: The lock file cannot be written.
        """
        import filelock

        # Timeout is an OSError, but here it only means that another process holds the lock.
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
    """Hold a lock file during the `with` block; yield whether it was obtained.

    The system releases the lock when the process ends, even if it is killed.

    Args:
        path: The lock file.
        wait: Whether to wait for a process that holds the lock, instead of yielding False.

    Raises:
        CannotWrite: The lock file cannot be written.
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
    """Lock of a folder, with a file that names the process that holds it.

    The system releases the lock when the process ends, even if it is killed.

    Args:
        folder: The folder.

    Attributes:
        taken_over: Description of the process that held the lock before and ended without releasing it, else None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken_over: str | None = None
        self._lock = _Lock(folder / ".lock")
        # A second file, since a process that tries to take the lock may empty the lock file.
        self._holder = folder / ".lock.json"

    def take(self) -> None:
        """Take the lock; do nothing if this object holds it already.

        Raises:
            InUse: Another process or another lock of this process holds it. The message names the process.
            CannotWrite: The folder cannot be written.
        """
        if self._lock.is_locked:
            return
        with explained(self.folder):
            self._lock.acquire(blocking=False)
            if not self._lock.is_locked:
                dead = f"; if it has ended, remove {self._lock.soft}" if self._lock.soft.exists() else ""
                raise InUse(f"{self.folder} is in use by {self._named()}; wait until it ends, or stop it{dead}")
            self.taken_over = self._named() if self._holder.exists() else None
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
            # An atomic write: it replaces a link or a pipe of this name instead of writing into it.
            write_text(self._holder, json.dumps(holder))

    def release(self) -> None:
        """Release the lock; do nothing if it is not held."""
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
    """Return whether a process holds the `FolderLock` of a folder.

    The answer comes from the file that names the process. No lock is taken, so no other process is disturbed. A process
    on another machine counts as alive.
    """
    import psutil

    try:
        holder = read_json(folder / ".lock.json")
        if holder["host"] != socket.gethostname():
            return True
        since = time.mktime(time.strptime(holder["since"], "%Y-%m-%d %H:%M:%S"))
        # A later process may have the same number.
        return bool(psutil.Process(holder["process"]).create_time() < since + 1)
    except (FileError, KeyError, TypeError, ValueError, OverflowError, psutil.Error):
        return False
