"""Text sources: the built-in text, files, folders, globs, compressed files and named downloads."""

import contextlib
import difflib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TextIO

from timemix.data.config import DropDuplicates
from timemix.data.downloads import DOWNLOADS, Download, fetch, opened_member
from timemix.data.duplicates import DocumentReader, Reading
from timemix.data.folders import folder_files, glob_files, written_by_timemix
from timemix.data.hub import PREFIX, Split, open_dataset
from timemix.data.readers import CHUNK, chunks, decoded
from timemix.data.records import format_of, joined, parquet, records
from timemix.data.templates import TEMPLATES, ChatTemplate
from timemix.errors import FileError, InvalidValue, MissingFile
from timemix.runtime.progress import Advance, ShowProgress, passing, untold
from timemix.storage.files import cannot_read, check_name
from timemix.tokenizers.base import DOCUMENT_END

logger = logging.getLogger("timemix")

STANDARD_INPUT = Path("standard input")
"""Entry for standard input in a list of files. Compare entries with `is`: a file may have this name."""


@dataclass(frozen=True)
class SourceText:
    """A text in memory."""

    text: str
    name: str
    """Name of the source, for messages."""
    files: tuple[str, ...]
    """Paths of the files."""
    valid: str | None = None
    """Validation text, which only some downloads include; otherwise None."""


@dataclass(frozen=True)
class Source:
    """A text that can be read in pieces any number of times."""

    name: str
    """Name of the source, for messages."""
    files: tuple[str, ...]
    """Paths of the files."""
    size: int
    """Number of bytes to read. For a compressed file, the compressed size counts."""
    read: Callable[[Advance], Iterator[tuple[int, str]]]
    """Function that yields nonempty pieces of text, each with the number of its file. With `documents`, DOCUMENT_END
    ends each document.

    The argument of `read` is a function that receives the number of bytes read so far. A line end that separates two
    files belongs to the earlier file. `read` raises a TimemixError for the reasons that `read_source` lists.
    """
    valid: "Source | None" = None
    """Validation text, which only some downloads include; otherwise None."""
    documents: bool = False
    """Whether the pieces contain the ends of documents."""
    has_loss_marks: bool = False
    """Whether the pieces contain the marks COUNTED and UNCOUNTED."""
    counted: DocumentReader | None = None
    """Reader with the counts of the documents; None for a source with one document."""


def read_source(
    source: str,
    *,
    encoding: str = "utf-8",
    keep_nul: bool = False,
    text_key: str | None = None,
    documents: bool | None = False,
    template: str | None = None,
    cache: Path | None = None,
    progress: ShowProgress = False,
) -> SourceText:
    """Read a whole text into memory.

    Args:
        source: A text source, as for `open_source`.
        encoding: Encoding of the files.
        keep_nul: Whether a file with NUL characters counts as text instead of as binary.
        text_key: Key of the text in JSON lines, or name of the column in a table. Default: "text"; tables in CSV and
            TSV are then plain text.
        documents: Whether DOCUMENT_END ends each document, as in `open_source`.
        template: Name of the chat template for conversations, as for `open_source`.
        cache: Folder of the downloads. Default: the cache of the user.
        progress: Whether to show the progress of downloads on standard error, or a function for progress lines.

    Raises:
        MissingFile: The source does not exist.
        FileError: A file cannot be read, is damaged or is not text.
        InvalidValue: The text is empty, looks binary, or is not in `encoding`.
        Unavailable: A download failed.
    """
    opened = open_source(
        source,
        encoding=encoding,
        keep_nul=keep_nul,
        text_key=text_key,
        documents=documents,
        template=template,
        cache=cache,
        progress=progress,
    )
    valid = None if opened.valid is None else _whole(opened.valid)
    return SourceText(_whole(opened), opened.name, opened.files, valid)


def _whole(source: Source) -> str:
    return "".join(text for _, text in source.read(untold))


def open_source(
    source: str,
    *,
    encoding: str = "utf-8",
    keep_nul: bool = False,
    text_key: str | None = None,
    documents: bool | None = False,
    template: str | None = None,
    drop_duplicates: DropDuplicates = "none",
    cache: Path | None = None,
    progress: ShowProgress = False,
) -> Source:
    """Open a text source that is then read in pieces.

    Files may be compressed (gzip, xz, bzip2, Zstandard). JSON lines (.jsonl, .ndjson), Parquet files and, with
    `text_key`, tables (.csv, .tsv) have one text per record. A newline is between two records and between two files,
    unless `documents` is True. Line ends are not changed, and a byte order mark is removed. The files of a folder are
    read in sorted order. A warning counts the skipped files of each kind: hidden files, binary files, links to other
    files, compressed copies of other files, and folders that timemix wrote. The `read` function of the result raises
    the errors about the content of the files.

    Args:
        source: A file, folder, glob, "-" (standard input), "builtin", the name of a download (`DOWNLOADS`), or a
            dataset of Hugging Face, as in `open_dataset`. An existing path takes precedence over the other sources.
        encoding: Encoding of the files.
        keep_nul: Whether a file with NUL characters counts as text instead of as binary.
        text_key: Key of the text in JSON lines, or name of the column in a table. Default: "text"; tables in CSV and
            TSV are then plain text.
        documents: Whether DOCUMENT_END ends each record and each file of plain text. None: only if a file has records.
        template: Name of the chat template that writes the conversations of the records as texts, with the marks of
            `timemix.data.marks`. Default: the records have texts.
        drop_duplicates: Documents to leave out of the text, as in `DocumentReader`.
        cache: Folder of the downloads. Default: the cache of the user.
        progress: Whether to show the progress of downloads on standard error, or a function for progress lines.

    Raises:
        MissingFile: The source does not exist.
        FileError: A folder cannot be read, or timemix wrote the folder.
        InvalidValue: No text is piped into standard input.
        Unavailable: A download failed.
    """
    options = (encoding, keep_nul)
    of_files = partial(
        _files_source,
        encoding=encoding,
        keep_nul=keep_nul,
        text_key=text_key,
        documents=documents,
        template=None if template is None else TEMPLATES[template],
        drop_duplicates=drop_duplicates,
        progress=progress,
    )
    if source == "-":
        return of_files(STANDARD_INPUT.name, [STANDARD_INPUT])
    check_name(Path(source))
    if os.path.isdir(source):
        if kind := written_by_timemix(Path(source)):
            raise FileError(f"{source} is {kind}, which has tokens and no text; name a text file or a folder of texts")
        return of_files(source, folder_files(Path(source), *options))
    if os.path.exists(source):
        return of_files(source, [Path(source)])
    if template is not None and source.startswith(PREFIX):
        raise InvalidValue(
            f"{source} is a dataset of Hugging Face, but data.template needs files; save the dataset as a .jsonl or"
            " .parquet file"
        )
    if template is not None and (source == "builtin" or source in DOWNLOADS):
        raise InvalidValue(f"{source} has no conversations; leave data.template out, or name a file of conversations")
    if source == "builtin":
        return _ended(_builtin()) if documents else _builtin()
    if source.startswith(PREFIX):
        return _hub_source(source, text_key, documents is not False, drop_duplicates, cache, progress)
    if source in DOWNLOADS:
        found = _download_source(source, cache, progress)
        return _ended(found) if documents else found
    if matches := glob_files(source, *options):
        return of_files(source, matches)
    raise MissingFile(_no_source(source))


@functools.cache
def _standard_input(stream: TextIO | None) -> bytes:
    """Return all bytes of standard input, which are cached because standard input can be read only once."""
    if stream is None or stream.isatty():
        raise InvalidValue("the source '-' is standard input, but no text is piped into it; pipe a text or name a file")
    return stream.buffer.read()


def _hub_source(
    source: str,
    text_key: str | None,
    documents: bool,
    drop_duplicates: DropDuplicates,
    cache: Path | None,
    progress: ShowProgress,
) -> Source:
    """Return a dataset of Hugging Face as a source."""

    def opened(split: Split) -> Source:
        def read(reading: Reading, advance: Advance) -> Iterator[tuple[int, str]]:
            is_empty = True
            rows = split.texts(lambda share: advance(int(share * split.size)))
            for text in joined(reading.records(rows), documents):
                yield 0, text
                is_empty = False
            if is_empty:
                raise InvalidValue(f"{split.reference} is empty; name a source with text")

        comparing = partial(passing, progress, f"comparing the documents of {split.name}", split.size)
        counted = DocumentReader(read, drop_duplicates, comparing)
        return Source(split.name, (split.reference,), split.size, counted.read, documents=documents, counted=counted)

    train, valid = open_dataset(source, text_key, cache, progress)
    return replace(opened(train), valid=None if valid is None else opened(valid))


def _builtin() -> Source:
    """Return the built-in text: the Python language reference, about 0.47 M characters."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[topic] for topic in sorted(topics))
    return Source("builtin", (), len(text.encode()), lambda advance: iter([(0, text)]))


def _ended(source: Source) -> Source:
    """Return a source of one file whose text is one document."""

    def read(advance: Advance) -> Iterator[tuple[int, str]]:
        yield from source.read(advance)
        yield 0, DOCUMENT_END

    valid = None if source.valid is None else _ended(source.valid)
    return replace(source, read=read, valid=valid, documents=True)


def _files_source(
    source: str,
    files: list[Path],
    *,
    encoding: str,
    keep_nul: bool,
    text_key: str | None,
    documents: bool | None,
    template: ChatTemplate | None,
    drop_duplicates: DropDuplicates,
    progress: ShowProgress,
) -> Source:
    """Return files as a source. `open_source` describes the arguments."""
    if template is not None:
        for path in files:
            if format_of(path, text_key) is None:
                raise InvalidValue(
                    f"{path} is plain text, but data.template needs conversations in .jsonl, .ndjson or .parquet"
                    " files; leave data.template out, or name other files"
                )
        documents = True
    held = {path: _bytes_of_pipe(path) for path in files if path is STANDARD_INPUT or not path.is_file()}
    sizes = [len(held[path]) if path in held else _size(path) for path in files]
    has_records = any(format_of(path, text_key) for path in files)
    ended = has_records if documents is None else documents

    def texts_of(path: Path, before: int, size: int, reading: Reading, advance: Advance) -> Iterator[str]:
        suffix = format_of(path, text_key)
        if suffix == ".parquet":
            rows = parquet(path, text_key, template, lambda share: advance(before + int(share * size)))
            return joined(reading.records(rows), ended)
        data = chunks(path, held.get(path), before, advance)
        texts = decoded(data, str(path), encoding, keep_nul, is_alone=len(files) == 1)
        if suffix is None:
            return reading.file(texts)
        return joined(reading.records(records(texts, path, suffix, text_key, template)), ended)

    def read(reading: Reading, advance: Advance) -> Iterator[tuple[int, str]]:
        before, last, newest = 0, "", -1
        for number, (path, size) in enumerate(zip(files, sizes, strict=True)):
            begun = False
            for text in texts_of(path, before, size, reading, advance):
                if not begun and last not in ("", "\n", DOCUMENT_END):
                    yield newest, "\n"
                yield number, text
                begun, last, newest = True, text[-1], number
            if begun and ended and last != DOCUMENT_END:
                yield number, (last := DOCUMENT_END)
            before += size
        if not last:
            raise InvalidValue(f"{source} is empty; name a source with text")

    name = Path(source).name or str(Path(source).resolve())
    # JSON does not support names that are not UTF-8.
    shown = tuple(os.fsencode(path).decode("utf-8", "backslashreplace") for path in files)
    several = has_records or len(files) > 1
    comparing = partial(passing, progress, f"comparing the documents of {name}", sum(sizes))
    counted = DocumentReader(read, drop_duplicates if several else "none", comparing)
    return Source(
        name,
        shown,
        sum(sizes),
        counted.read,
        documents=ended,
        has_loss_marks=template is not None,
        counted=counted if several else None,
    )


def _bytes_of_pipe(path: Path) -> bytes:
    """Return all bytes of a pipe or of standard input, which can be read only once."""
    if path is STANDARD_INPUT:
        return _standard_input(sys.stdin)
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(cannot_read(path, error)) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise FileError(cannot_read(path, error)) from error


def _no_source(source: str) -> str:
    path = Path(source)
    near: dict[str, str] = {name: name for name in ("builtin", *DOWNLOADS)}
    with contextlib.suppress(OSError, ValueError):
        near |= {name: str(path.parent / name) for name in os.listdir(path.parent)}
    nearest = difflib.get_close_matches(path.name, near, n=1)
    hint = f"did you mean {near[nearest[0]]}?" if nearest else f"other sources are builtin, {', '.join(DOWNLOADS)}"
    return f"{source!r} is not a file, folder or download; {hint}"


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
                "%s has %d distinct characters, not %d: its text differs from the published one; delete %s to download"
                " it again",
                name,
                len(distinct),
                entry.distinct_characters,
                path,
            )

    return replace(whole, read=whole.read if entry.distinct_characters is None else read, valid=valid)


def _member_source(entry: Download, path: Path, name: str, member: str | None) -> Source:
    """Return a member of a zip archive as a source.

    Args:
        entry: The download.
        path: The downloaded file.
        name: Name of the source, for messages.
        member: Name of the text in the zip archive, or None if the file itself is the text.
    """
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
