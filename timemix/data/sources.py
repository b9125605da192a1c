"""Text from the built-in reference, files, folders, globs, compressed files and named downloads."""

import contextlib
import difflib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from timemix.data.downloads import DOWNLOADS, Download, fetch, opened_member
from timemix.data.folders import folder_files, glob_files, written_by_timemix
from timemix.data.readers import CHUNK, chunks, decoded
from timemix.errors import FileError, InvalidValue, MissingFile
from timemix.runtime.progress import Advance, ShowProgress, untold
from timemix.storage.files import check_name

logger = logging.getLogger("timemix")

STANDARD_INPUT = Path("standard input")
"""Stands for it among files, as this object: a file may have this name."""


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
    read: gives the number of a file and a piece of its text, none of them empty, and tells its argument the bytes read
        so far. A line end that parts two files is the earlier one's. It raises TimemixError as `read_source` does.
    """

    name: str
    files: tuple[str, ...]
    size: int
    read: Callable[[Advance], Iterator[tuple[int, str]]]
    valid: "Source | None" = None


def read_source(
    source: str,
    *,
    encoding: str = "utf-8",
    keep_nul: bool = False,
    cache: Path | None = None,
    progress: ShowProgress = False,
) -> SourceText:
    """The text of `open_source`, whole; raises as that and its `read` do."""
    opened = open_source(source, encoding=encoding, keep_nul=keep_nul, cache=cache, progress=progress)
    valid = None if opened.valid is None else _whole(opened.valid)
    return SourceText(_whole(opened), opened.name, opened.files, valid)


def _whole(source: Source) -> str:
    return "".join(text for _, text in source.read(untold))


def open_source(
    source: str,
    *,
    encoding: str = "utf-8",
    keep_nul: bool = False,
    cache: Path | None = None,
    progress: ShowProgress = False,
) -> Source:
    """The text of a file, a folder or glob of files, `-` (standard input), `builtin`, or a download of DOWNLOADS.

    A path that exists comes before a name. Files may be compressed (gzip, xz, bzip2); line ends stay as they
    are; a byte order mark is dropped. The files of a folder come in sorted order, hidden ones left out, with
    a newline between two. A warning names what else is skipped: binary files, second names of a file, compressed
    copies beside it, and folders that timemix wrote. `encoding` is that of files, `keep_nul` as for `decoded`;
    downloads are kept in `cache` (None: the user's).

    Raises MissingFile where there is no such source, and while it is read, where it cannot be read, is empty, looks
    binary, or is not in `encoding`.
    """
    options = (encoding, keep_nul)
    if source == "-":
        return _files_source(STANDARD_INPUT.name, [STANDARD_INPUT], *options)
    check_name(Path(source))
    if os.path.isdir(source):
        if kind := written_by_timemix(Path(source)):
            raise FileError(f"{source} is {kind}, which holds tokens rather than a text; name a text")
        return _files_source(source, folder_files(Path(source), *options), *options)
    if os.path.exists(source):
        return _files_source(source, [Path(source)], *options)
    if source == "builtin":
        return _builtin()
    if source in DOWNLOADS:
        return _download_source(source, cache, progress)
    if matches := glob_files(source, *options):
        return _files_source(source, matches, *options)
    raise MissingFile(_no_source(source))


@functools.cache
def _standard_input(stream: TextIO | None) -> bytes:
    """All of standard input, which can be read only once."""
    if stream is None or stream.isatty():
        raise InvalidValue("the source '-' is standard input, but no text is piped into it; name a file instead")
    return stream.buffer.read()


def _builtin() -> Source:
    """The Python language reference, about 0.47 M characters."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[topic] for topic in sorted(topics))
    return Source("builtin", (), len(text.encode()), lambda advance: iter([(0, text)]))


def _files_source(source: str, files: list[Path], encoding: str, keep_nul: bool) -> Source:
    held = {path: _bytes_of_pipe(path) for path in files if path is STANDARD_INPUT or not path.is_file()}
    sizes = [len(held[path]) if path in held else _size(path) for path in files]

    def read(advance: Advance) -> Iterator[tuple[int, str]]:
        before, last, newest = 0, "", -1
        for number, (path, size) in enumerate(zip(files, sizes, strict=True)):
            begun = False
            for text in decoded(chunks(path, held.get(path), before, advance), str(path), encoding, keep_nul):
                if not begun and last not in ("", "\n"):
                    yield newest, "\n"
                yield number, text
                begun, last, newest = True, text[-1], number
            before += size
        if not last:
            raise InvalidValue(f"{source} is empty; give a text to read")

    name = Path(source).name or str(Path(source).resolve())
    # JSON cannot hold a name that is not UTF-8.
    shown = tuple(os.fsencode(path).decode("utf-8", "backslashreplace") for path in files)
    return Source(name, shown, sum(sizes), read)


def _bytes_of_pipe(path: Path) -> bytes:
    """All bytes of a pipe or of standard input, which give them only once."""
    if path is STANDARD_INPUT:
        return _standard_input(sys.stdin)
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from error


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

    def read(advance: Advance) -> Iterator[tuple[int, str]]:
        nonlocal warned
        distinct: set[str] = set()
        for number, text in whole.read(advance):
            if not warned:
                distinct.update(text)
            yield number, text
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

    def read(advance: Advance) -> Iterator[tuple[int, str]]:
        for text in decoded(member_chunks(advance), str(path), "utf-8"):
            yield 0, text

    return Source(name, (str(path),), size, read)
