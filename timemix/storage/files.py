"""Safe reading of files with unknown content, and atomic writes, whose readers see either old or new content."""

import contextlib
import errno
import glob
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from timemix.errors import AlreadyExists, CannotWrite, DamagedFile, FileError, MissingFile

LARGEST = 32 * 2**20
"""Maximum size of a JSON file in bytes. The parsed content takes up to 30 times as much memory as the file."""

LARGEST_OF_TEXT = 8 * LARGEST
"""Maximum size in bytes of tokenizer.json and data.json, which grow with the words and the files of a text."""


def check_name(path: Path) -> None:
    """Raise FileError if a path is not UTF-8, because config.toml, JSON and safetensors do not support such paths."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileError(f"the name of {path} is not UTF-8; rename it") from error


def check_regular(path: Path, largest: int | None = None, what: str = "") -> None:
    """Check that a path is a regular file, because reading a pipe or a device may never end.

    Args:
        path: The file.
        largest: Maximum size of the file in bytes; None for any size.
        what: Words before the path in messages, such as "the tokenizer ".

    Raises:
        MissingFile: The file does not exist.
        FileError: The path is a folder, a pipe or a device, or cannot be accessed.
        DamagedFile: The file has more than `largest` bytes.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else FileError
        raise kind(cannot_read(path, error, what)) from error
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"cannot read {what}{path}: it is a folder, a pipe or a device; name a file")
    if largest is not None and found.st_size > largest:
        raise DamagedFile(
            f"{path} is damaged: it has {found.st_size:,} bytes, more than the maximum of {largest:,} bytes;"
            " restore it from a copy"
        )


def refuse_existing(path: Path, what: str = "folder") -> None:
    """Raise AlreadyExists if a path exists, also as a link to a missing file.

    Args:
        path: The path.
        what: Word for the path in the message, "folder" or "file".
    """
    if os.path.lexists(path):
        raise AlreadyExists(f"{path} exists already; choose another {what}")


def read_text(path: Path, largest: int = LARGEST, what: str = "") -> str:
    """Read a UTF-8 file. A byte order mark is removed.

    Args:
        path: The file.
        largest: Maximum size of the file in bytes.
        what: Words before the path in messages, such as "the tokenizer ".

    Raises:
        FileError: The file is missing, not a regular file, too large or not UTF-8.
    """
    check_regular(path, largest, what)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileError(cannot_read(path, error)) from error
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is damaged: it is not UTF-8 ({error}); restore it from a copy") from error


def read_lines(path: Path, largest: int | None = None) -> Iterator[bytes]:
    """Read the lines of a file with their line ends. A line longer than 1 MiB is yielded in several pieces.

    Args:
        path: The file.
        largest: Maximum size of the file in bytes; None for any size.

    Raises:
        FileError: The file is missing, not a regular file, too large or unreadable.
    """
    check_regular(path, largest)
    try:
        with path.open("rb") as file:
            yield from iter(lambda: file.readline(2**20), b"")
    except OSError as error:
        raise FileError(cannot_read(path, error)) from error


@contextlib.contextmanager
def atomic_folder(folder: Path, *, replaces: bool = True) -> Iterator[Path]:
    """Write a folder atomically. Yield a temporary folder, which is renamed when the `with` block succeeds.

    Args:
        folder: The folder.
        replaces: Whether to replace the folder if it exists.

    Raises:
        AlreadyExists: The folder exists, and `replaces` is False.
        CannotWrite: The disk is full or not writable.
    """
    temporary = unfinished_name(folder, os.getpid())
    with explained(folder):
        try:
            # A killed process with the same process id may have left a temporary folder.
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    _sync(path)
            if replaces and folder.exists():
                old = _set_aside(folder, "replaced")
                appear(temporary, folder)
                shutil.rmtree(old)
                return
            refuse_existing(folder)
            try:
                appear(temporary, folder)
            except OSError:
                # The system refuses to rename a folder to a folder with files, which another process may have written.
                refuse_existing(folder)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Write a new folder atomically, as `atomic_folder` does, but never replace a folder.

    Temporary folders of the same name that killed processes left are removed.

    Args:
        folder: The folder, which must not exist.

    Raises:
        AlreadyExists: The folder exists before or after the `with` block.
        CannotWrite: The disk is full or not writable.
    """
    refuse_existing(folder)
    _remove_of_dead_processes(folder.parent.glob(f"{glob.escape(unfinished_name(folder, 0).name[:-1])}*"))
    with atomic_folder(folder, replaces=False) as temporary:
        yield temporary


def _remove_of_dead_processes(unfinished: Iterator[Path]) -> None:
    """Remove temporary files and folders whose names end with the id of a process that does not exist."""
    import psutil

    for left in unfinished:
        process = re.search(r"-(\d+)(\.[^.]*)?$", left.name)
        if process and not psutil.pid_exists(int(process[1])):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def unfinished_name(folder: Path, process: int) -> Path:
    """Return the path of the temporary folder that `atomic_folder` writes in the process with the given id."""
    return folder.with_name(f".{folder.name}.partial-{process}")


def remove_folder(folder: Path) -> None:
    """Remove a folder atomically. The folder is renamed first, so a killed process never leaves part of the folder.

    Raises:
        CannotWrite: The folder cannot be removed.
    """
    with explained(folder):
        shutil.rmtree(_set_aside(folder, "removed"))


def _set_aside(folder: Path, what: str) -> Path:
    """Rename a folder to a name that `remove_unfinished` recognizes, and return the new path.

    Args:
        folder: The folder.
        what: What happens to the folder: "replaced" or "removed".
    """
    aside = folder.with_name(f".{folder.name}.{what}-{os.getpid()}")
    folder.rename(aside)
    return aside


def appear(temporary: Path, folder: Path) -> None:
    """Rename a folder and sync the rename to disk. The files in the folder must be synced already.

    Args:
        temporary: The folder.
        folder: New path of the folder, which must not exist.
    """
    _sync(temporary)
    temporary.rename(folder)
    _sync(folder.parent)


def refuse_irregular(path: Path) -> None:
    """Check before a write that a path is free or a regular file, because a rename would replace a pipe or a device.

    Raises:
        CannotWrite: The path is a folder, a pipe or a device, or cannot be accessed.
    """
    with explained(path):
        if path.exists() and not path.is_file():
            raise CannotWrite(f"cannot write {path}: it is a folder, a pipe or a device; name a file")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically. Yield a temporary path, which is renamed when the `with` block succeeds.

    Args:
        path: The file, or a symbolic link to the file. The temporary path has the suffix of this file.

    Raises:
        CannotWrite: The path is a folder, a pipe or a device, or the disk is full or not writable.
    """
    refuse_irregular(path)
    # A rename to the path of a link would replace the link.
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    with _unfinished_file(path) as temporary:
        yield temporary
        _sync(temporary)
        temporary.replace(path)


@contextlib.contextmanager
def _unfinished_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file. At the end of the `with` block, the temporary file is removed."""
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    with explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a new file atomically, as `atomic_file` does, but never replace a file.

    Temporary files of the same name that killed processes left are removed.

    Args:
        path: The file, which must not exist.

    Raises:
        AlreadyExists: The file exists at the begin or at the end of the `with` block.
        CannotWrite: The disk is full or not writable.
    """
    refuse_existing(path, "file")
    _remove_of_dead_processes(path.parent.glob(f".{glob.escape(path.stem)}.partial-*{glob.escape(path.suffix)}"))
    with _unfinished_file(path) as temporary:
        yield temporary
        _sync(temporary)
        try:
            # Unlike a rename, a new link never replaces the file of another process.
            path.hardlink_to(temporary)
        except OSError:
            refuse_existing(path, "file")
            # The file system has no hard links.
            temporary.replace(path)


def append(path: Path, raw: bytes) -> None:
    """Append bytes to a file: all of them, or none if the disk is full.

    Raises:
        CannotWrite: The disk is full or not writable.
    """
    # Without a buffer, closing the file does not repeat a write that failed on a full disk.
    with explained(path), path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(raw) != len(raw):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_text(path: Path, text: str) -> None:
    """Save a text in a UTF-8 file, with an atomic write.

    Raises:
        CannotWrite: The disk is full or not writable.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Replace an OSError in the `with` block by CannotWrite, with a message about `path`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(cannot_write(path, error)) from error


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary folders that `atomic_folder` or `remove_folder` of a killed process left in `folder`.

    A folder gets its name back if the process was killed before the new folder got this name.
    """
    for path in folder.glob(".*.replaced-*"):
        if not (old := path.with_name(path.name[1:].rpartition(".replaced-")[0])).exists():
            path.rename(old)
    for what in ("partial", "replaced", "removed"):
        for path in folder.glob(f".*.{what}-*"):
            shutil.rmtree(path, ignore_errors=True)


def cannot_read(path: Path, error: OSError | ValueError, what: str = "") -> str:
    """Return the message for a failed read. `what` contains words before the path, such as "the tokenizer "."""
    reason = getattr(error, "strerror", None) or error
    ways = {errno.EACCES: "check its permissions", errno.EIO: "check the disk"}
    return f"cannot read {what}{path}: {reason}; {ways.get(getattr(error, 'errno', None) or 0, 'check its path')}"


def cannot_write(path: Path, error: OSError) -> str:
    """Return the message for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device for {path}; free some space, or choose another place"
    way = "choose a shorter name" if error.errno == errno.ENAMETOOLONG else "check its permissions"
    return f"cannot write {path}: {error.strerror or error}; {way}, or choose another place"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Make the system write an open file or folder to disk, if the file system supports the call.

    Raises:
        OSError: The write failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Many network and shared file systems do not support the sync of a folder.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
