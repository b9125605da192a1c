"""The text files of a folder or a glob, and a warning for each kind of skipped file."""

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from timemix.data.corpus import is_corpus
from timemix.data.readers import OPENERS, chunks, looks_binary
from timemix.data.records import format_of
from timemix.errors import FileError, MissingFile

logger = logging.getLogger("timemix")

HEAD = 1 << 16
"""Number of bytes at the beginning of a file that are checked for signs of a binary file."""


def folder_files(folder: Path, encoding: str, keep_nul: bool) -> list[Path]:
    """Return the text files in a folder and its subfolders, sorted.

    A warning counts the skipped files of each kind: hidden files and folders, output of timemix, links to folders,
    links to other files, compressed copies of other files, and binary files.

    Args:
        folder: The folder.
        encoding: Encoding of the text files.
        keep_nul: Whether a file with NUL characters counts as text instead of as binary.

    Raises:
        FileError: A folder cannot be read.
        MissingFile: The folder has no text files.
    """
    found: list[Path] = []
    ours: list[Path] = []
    links: list[Path] = []
    hidden: list[Path] = []
    try:
        for place, folders, files in os.walk(folder, onerror=_raise):
            hidden += [Path(place, name) for name in (*folders, *files) if name.startswith(".")]
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            links += [Path(place, name) for name in folders if os.path.islink(Path(place, name))]
            ours += [path for name in folders if written_by_timemix(path := Path(place, name)) and path not in links]
            folders[:] = [name for name in folders if Path(place, name) not in ours]
            found += [Path(place, name) for name in files if not name.startswith(".")]
    except OSError as error:
        raise FileError(f"cannot read the folder {error.filename}: {error.strerror}; check its permissions") from error
    _skip(str(folder), "hidden", hidden)
    _skip(str(folder), "written by timemix", ours)
    _skip(str(folder), "a link to a folder", links)
    kept = _kept(str(folder), sorted(path for path in found if path.is_file()), encoding, keep_nul)
    if not kept:
        raise MissingFile(f"the folder {folder} has no text files; name a file, or a folder with text files")
    return kept


def glob_files(pattern: str, encoding: str, keep_nul: bool) -> list[Path]:
    """Return the sorted text files that match a glob, or an empty list if no file matches.

    The function skips the same files as `folder_files`. As in a shell, `*` and `**` match no hidden file or folder, so
    these are not counted. With `**` in the pattern, folders that timemix wrote are skipped too.

    Args:
        pattern: The glob.
        encoding: Encoding of the text files.
        keep_nul: Whether a file with NUL characters counts as text instead of as binary.

    Raises:
        MissingFile: Files match, but none of them is a text file.
    """
    matches = sorted(path for path in set(map(Path, _matches(pattern))) if path.is_file())
    root = Path(pattern.partition("**")[0]) if "**" in pattern else None
    ours: set[Path] = set()
    if root is not None:
        folders = {folder for path in matches for folder in path.parents if root in folder.parents}
        ours = {folder for folder in folders if written_by_timemix(folder)}
        _skip(pattern, "written by timemix", sorted(ours))
    kept = _kept(pattern, [path for path in matches if ours.isdisjoint(path.parents)], encoding, keep_nul)
    if matches and not kept:
        raise MissingFile(f"{pattern} matches no text files; name a file, or a folder with text files")
    return kept


def written_by_timemix(folder: Path) -> str | None:
    """Return the kind of a folder that timemix wrote, such as "a run folder", or None for other folders."""
    if is_corpus(folder):
        return "a prepared folder"
    for kind, file, others in (
        ("a run folder", "config.toml", ("checkpoints", "metrics.jsonl")),
        ("the folder of a comparison", "experiment.json", ("data", "variants")),
    ):
        if (folder / file).is_file() and any((folder / name).exists() for name in others):
            return kind
    return None


def _matches(pattern: str) -> Iterator[str]:
    """Yield the paths that match a glob. `**` visits a folder only once, even if links lead to it."""
    stars = re.search(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    if stars is None:
        yield from glob.glob(pattern)
        return
    before, after = pattern[: stars.start()], pattern[stars.end() :] or "*"
    for root in glob.glob(before) if before else ["."]:
        for folder in _folders_below(root):
            yield from _matches(os.path.join(glob.escape(folder), after))


def _folders_below(root: str) -> Iterator[str]:
    """Yield a folder and all its subfolders except hidden folders. Follow links last, and only to unvisited folders."""
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        for place, folders, _ in os.walk(pending.pop(0)):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            pending += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
            yield place


def _raise(error: OSError) -> None:
    raise error


def _kept(source: str, files: list[Path], encoding: str, keep_nul: bool) -> list[Path]:
    """Return the files except links to other files, compressed copies of other files, and binary files."""
    again = set(_second_names(files))
    _skip(source, "a link to another file", again)
    files = [path for path in files if path not in again]
    names = set(files)
    copies = {path for path in files if path.suffix.lower() in OPENERS and path.with_suffix("") in names}
    _skip(source, "a compressed copy of the file beside it", copies)
    files = [path for path in files if path not in copies]
    tables = {path for path in files if format_of(path, None) == ".parquet"}
    texts = [path for path in files if path not in tables]
    binary = {path for path in texts if looks_binary(next(chunks(path), b"")[:HEAD], encoding, keep_nul)}
    _skip(source, "binary", binary)
    return [path for path in files if path not in binary]


def _second_names(files: list[Path]) -> Iterator[Path]:
    """Yield the redundant paths of each file that is listed several times: all paths except the path without links."""
    seen: set[tuple[int, int]] = set()
    for path in sorted(files, key=lambda path: (os.path.realpath(path) != os.path.abspath(path), path)):
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen:
            yield path
        seen.add((status.st_dev, status.st_ino))


def _skip(source: str, what: str, paths: Iterable[Path]) -> None:
    """Warn about skipped files, and name the first four files."""
    names = [str(path) for path in sorted(paths)]
    if names:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        logger.warning("%s: skipped %d as %s: %s%s", source, len(names), what, ", ".join(names[:4]), more)
