"""Text from the built-in reference, files, folders, globs, compressed files and named downloads."""

import contextlib
import difflib
import glob
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from timemix.data.downloads import DOWNLOADS, Download, fetch, opened_member
from timemix.data.readers import CHUNK, chunks, decoded
from timemix.errors import FileError, InvalidValue, MissingFile
from timemix.runtime.progress import Advance, ShowProgress, untold
from timemix.storage.files import check_name

logger = logging.getLogger("timemix")


@dataclass(frozen=True)
class SourceText:
    """A text, where it came from, and the validation text that some downloads bring along."""

    text: str
    name: str
    files: tuple[str, ...]
    valid: str | None = None


@dataclass(frozen=True)
class Source:
    """A text that is read piece by piece, as often as needed.

    size: bytes to read, of the files as they lie.
    read: gives the text in pieces, none of them empty, and tells its argument the bytes read so far. It raises
        TimemixError as `read_source` does.
    """

    name: str
    files: tuple[str, ...]
    size: int
    read: Callable[[Advance], Iterator[str]]
    valid: "Source | None" = None


def read_source(
    source: str, *, encoding: str = "utf-8", cache: Path | None = None, progress: ShowProgress = False
) -> SourceText:
    """The text of `open_source`, whole; raises as that and its `read` do."""
    opened = open_source(source, encoding=encoding, cache=cache, progress=progress)
    valid = None if opened.valid is None else "".join(opened.valid.read(untold))
    return SourceText("".join(opened.read(untold)), opened.name, opened.files, valid)


def open_source(
    source: str, *, encoding: str = "utf-8", cache: Path | None = None, progress: ShowProgress = False
) -> Source:
    """The text of a file, a folder or glob of files, `builtin`, or a download of DOWNLOADS.

    A path that exists comes before a name. Files may be compressed (.gz, .xz, .bz2); line ends stay as they
    are; a byte order mark is dropped. The files of a folder come in sorted order, hidden ones left out, with
    a newline between two. `encoding` is that of files; downloads are kept in `cache` (None: the user's).

    Raises MissingFile where there is no such source, and while it is read, where it cannot be read, is empty, looks
    binary, or is not in `encoding`.
    """
    check_name(Path(source))
    if os.path.isdir(source):
        return _files_source(source, _files_below(Path(source)), encoding)
    if os.path.exists(source):
        return _files_source(source, [Path(source)], encoding)
    if source == "builtin":
        return _builtin()
    if source in DOWNLOADS:
        return _download_source(source, cache, progress)
    matches = sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())
    if matches:
        return _files_source(source, matches, encoding)
    raise MissingFile(_no_source(source))


def _builtin() -> Source:
    """The Python language reference, about 0.47 M characters."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[topic] for topic in sorted(topics))
    return Source("builtin", (), len(text.encode()), lambda advance: iter([text]))


def _files_below(folder: Path) -> list[Path]:
    """Regular files in `folder` and its subfolders, sorted, hidden ones left out."""
    found = []
    try:
        for place, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(place, name) for name in files if not name.startswith(".")]
    except OSError as error:
        raise FileError(f"cannot read the folder {error.filename}: {error.strerror}; check its permissions") from error
    found = sorted(path for path in found if path.is_file())
    if not found:
        raise MissingFile(f"the folder {folder} holds no files; name a file, or a folder with text files")
    return found


def _raise(error: OSError) -> None:
    raise error


def _files_source(source: str, files: list[Path], encoding: str) -> Source:
    # A pipe gives its bytes only once.
    held = {path: b"".join(chunks(path)) for path in files if not path.is_file()}

    def read(advance: Advance) -> Iterator[str]:
        before, last = 0, ""
        for path in files:
            begun = False
            for text in decoded(chunks(path, held.get(path), before, advance), str(path), encoding):
                if not begun and last not in ("", "\n"):
                    yield "\n"
                yield text
                begun, last = True, text[-1]
            before += _size(path)
        if not last:
            raise InvalidValue(f"{source} is empty; give a text to read")

    name = Path(source).name or str(Path(source).resolve())
    # JSON cannot hold a name that is not UTF-8.
    shown = tuple(os.fsencode(path).decode("utf-8", "backslashreplace") for path in files)
    return Source(name, shown, sum(map(_size, files)), read)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error


def _no_source(source: str) -> str:
    path = Path(source)
    near: dict[str, str] = {name: name for name in ("builtin", *DOWNLOADS)}
    with contextlib.suppress(OSError, ValueError):
        near |= {name: str(path.parent / name) for name in os.listdir(path.parent)}
    nearest = difflib.get_close_matches(path.name, near, n=1)
    hint = f"did you mean {near[nearest[0]]}?" if nearest else f"other sources are builtin, {', '.join(DOWNLOADS)}"
    return f"there is no file, folder or download {source!r}; {hint}"


def _download_source(name: str, cache: Path | None, progress: ShowProgress) -> Source:
    entry = DOWNLOADS[name]
    path = fetch(entry, cache, progress)
    valid = None
    if entry.valid_member is not None:
        valid = _member_source(entry, path, f"the held-out part of {name}", entry.valid_member)
    whole = _member_source(entry, path, name, entry.member)
    warned = False

    def read(advance: Advance) -> Iterator[str]:
        nonlocal warned
        distinct: set[str] = set()
        for text in whole.read(advance):
            if not warned:
                distinct.update(text)
            yield text
        if not warned and len(distinct) != entry.distinct_characters:
            warned = True
            logger.warning(
                "%s has %d distinct characters, not the %d it should have: its text differs from the published one",
                name,
                len(distinct),
                entry.distinct_characters,
            )

    return replace(whole, read=whole.read if entry.distinct_characters is None else read, valid=valid)


def _member_source(entry: Download, path: Path, name: str, member: str | None) -> Source:
    """Text of a member of a zip; None: of the file itself."""
    if member is None:
        size = _size(path)
    else:
        with opened_member(entry, path, member) as (_, size):
            pass

    def member_chunks(advance: Advance) -> Iterator[bytes]:
        if member is None:
            yield from chunks(path, advance=advance)
            return
        with opened_member(entry, path, member) as (file, _):
            done = 0
            while chunk := file.read(CHUNK):
                done += len(chunk)
                advance(done)
                yield chunk

    return Source(name, (str(path),), size, lambda advance: decoded(member_chunks(advance), str(path), "utf-8"))
