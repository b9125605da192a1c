"""Locks of files and folders, which the system releases when the process that holds them ends."""

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
"""Error numbers (errno) that mean that a file system has no locks, as on some clusters and networks."""


class _Lock:
    """A lock of a file by the operating system, which releases the lock when the process ends.

    On a file system without locks, the fallback is a file PATH.soft that names the process. The next process on the
    same machine removes PATH.soft if the named process has ended.
    """

    def __init__(self, path: Path) -> None:
        import filelock

        self.soft = path.with_name(f"{path.name}.soft")
        # The library's own fallback is disabled, because it would treat the file of a released lock as a held lock.
        self._lock: filelock.BaseFileLock = filelock.FileLock(path, fallback_to_soft=False)

    @property
    def is_locked(self) -> bool:
        return self._lock.is_locked

    def acquire(self, *, blocking: bool) -> None:
        """Take the lock if no other process holds the lock. With `blocking`, wait until the lock is free.

        Raises:
            OSError: The lock file cannot be written.
        """
        import filelock

        # Timeout is an OSError, but here Timeout only means that another process holds the lock.
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
    """Hold a lock during the `with` block. Yield True if the lock was obtained, else False.

    The system releases the lock when the process ends, even if the process is killed.

    Args:
        path: The lock file.
        wait: Whether to wait until other processes release the lock, instead of yielding False.

    Raises:
        CannotWrite: The lock file cannot be written.
    """
    # The lock file is hidden, so a message about it would not help.
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with explained(path):
        lock = _Lock(path)
        lock.acquire(blocking=wait)
    try:
        yield lock.is_locked
    finally:
        lock.release()


class FolderLock:
    """Lock of a folder, with a file that names the process that holds the lock.

    The system releases the lock when the process ends, even if the process is killed.

    Args:
        folder: The folder.

    Attributes:
        taken_over: Description of the previous process if it ended without releasing the lock, else None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken_over: str | None = None
        self._lock = _Lock(folder / ".lock")
        # The name of the process is in a second file, because another process that tries to take the lock may empty the
        # lock file.
        self._holder = folder / ".lock.json"

    def take(self) -> None:
        """Take the lock. Do nothing if this object holds the lock already.

        Raises:
            InUse: Another process, or another object in this process, holds the lock. The message names the process.
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
            now = time.time()
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since, "time": now}
            # An atomic write replaces a link or a pipe of this name, instead of writing into the link or pipe.
            write_text(self._holder, json.dumps(holder))

    def release(self) -> None:
        """Release the lock. Do nothing if this object does not hold the lock."""
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

    The function reads the file that names the process. The function takes no lock, so other processes are not
    disturbed. The function assumes that a process on another machine is running.
    """
    import psutil

    try:
        holder = read_json(folder / ".lock.json")
        if holder["host"] != socket.gethostname():
            return True
        # A later process may have the same process id.
        return bool(psutil.Process(holder["process"]).create_time() < holder["time"] + 1)
    except (FileError, KeyError, TypeError, ValueError, OverflowError, psutil.Error):
        return False
