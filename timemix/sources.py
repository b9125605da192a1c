"""Text from the built-in reference, files, folders, globs, compressed files and named downloads."""

import bz2
import codecs
import contextlib
import difflib
import glob
import gzip
import http.client
import logging
import lzma
import os
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timemix.errors import UserError
from timemix.files import write_text

logger = logging.getLogger("timemix")

Progress = Callable[[str], None] | bool
"""True shows a bar on stderr; a function gets a line of text now and then; False is quiet."""


@dataclass(frozen=True)
class SourceText:
    """A text, where it came from, and the validation text that some downloads bring along."""

    text: str
    name: str
    files: tuple[str, ...]
    valid: str | None = None


@dataclass(frozen=True)
class Download:
    """A text on the internet.

    file: its name in the cache.
    member, valid_member: names of the text and of its validation part in a zip; None: the file is the text.
    sha256: of the file, in hexadecimal; None: not published, so what the first download had is held on to.
    distinct_characters: of the text, where that is known.
    """

    url: str
    file: str
    member: str | None = None
    valid_member: str | None = None
    sha256: str | None = None
    distinct_characters: int | None = None


SIMPLEBOOKS = "https://dldata-public.s3.us-east-2.amazonaws.com/simplebooks.zip"

DOWNLOADS = {
    "simplebooks-92": Download(
        url=SIMPLEBOOKS,
        file="simplebooks.zip",
        member="simplebooks/simplebooks-92-raw/train.txt",
        valid_member="simplebooks/simplebooks-92-raw/valid.txt",
        distinct_characters=136,
    ),
    "simplebooks-2": Download(
        url=SIMPLEBOOKS,
        file="simplebooks.zip",
        member="simplebooks/simplebooks-2-raw/train.txt",
        valid_member="simplebooks/simplebooks-2-raw/valid.txt",
    ),
    "tinyshakespeare": Download(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        file="tinyshakespeare.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "enwik8": Download(
        url="https://mattmahoney.net/dc/enwik8.zip",
        file="enwik8.zip",
        member="enwik8",
        sha256="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
    "text8": Download(
        url="https://mattmahoney.net/dc/text8.zip",
        file="text8.zip",
        member="text8",
        sha256="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    ),
}

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def read_source(
    source: str, *, encoding: str = "utf-8", cache: Path | None = None, progress: Progress = False
) -> SourceText:
    """The text of a file, a folder or glob of files, `builtin`, or a download of DOWNLOADS.

    A path that exists comes before a name. Files may be compressed (.gz, .xz, .bz2); line ends stay as they
    are; a byte order mark is dropped. The files of a folder come in sorted order, hidden ones left out, with
    a newline between two. `encoding` is that of files; downloads are kept in `cache` (None: the user's).

    Raises UserError where there is no such source, or it cannot be read, is empty, looks binary, or is not in
    `encoding`.
    """
    if os.path.isdir(source):
        return _read_files(source, _files_below(Path(source)), encoding)
    if os.path.exists(source):
        return _read_files(source, [Path(source)], encoding)
    if source == "builtin":
        return _builtin()
    if source in DOWNLOADS:
        return _read_download(source, cache, progress)
    matches = sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())
    if matches:
        return _read_files(source, matches, encoding)
    raise UserError(_no_source(source))


def _builtin() -> SourceText:
    """The Python language reference, about 0.47 M characters."""
    from pydoc_data.topics import topics

    return SourceText("\n".join(topics[topic] for topic in sorted(topics)), "builtin", ())


def _files_below(folder: Path) -> list[Path]:
    """Regular files in `folder` and its subfolders, sorted, hidden ones left out."""
    found = []
    try:
        for place, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(place, name) for name in files if not name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; check its permissions") from error
    found = sorted(path for path in found if path.is_file())
    if not found:
        raise UserError(f"the folder {folder} holds no files; name a file, or a folder with text files")
    return found


def _raise(error: OSError) -> None:
    raise error


def _read_files(source: str, files: list[Path], encoding: str) -> SourceText:
    texts = [_decode(_read_bytes(path), str(path), encoding) for path in files]
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{source} is empty; give a text to read")
    ended = [text if text.endswith("\n") else text + "\n" for text in texts[:-1]]
    return SourceText(
        "".join([*ended, texts[-1]]), Path(source).name or str(Path(source).resolve()), tuple(map(str, files))
    )


def _read_bytes(path: Path) -> bytes:
    """Content of a file, decompressed where its name says so."""
    opener: Any = OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            return file.read()
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is damaged: it does not decompress ({error}); get it again") from error
    except OSError as error:
        # The decompressors raise an OSError without a number.
        if error.errno is None:
            raise UserError(f"{path} is damaged: it does not decompress ({error}); get it again") from error
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _decode(data: bytes, name: str, encoding: str) -> str:
    """Text of a file's bytes, without byte order mark. `name` is the file's, for errors."""
    # In UTF-16 and UTF-32 half of the bytes of ASCII text are NUL.
    nul = -1 if _codec_name(encoding).startswith(("utf-16", "utf-32")) else data.find(b"\0")
    if nul >= 0:
        raise UserError(
            f"{name} looks binary: a NUL at byte {nul}; if it is text, name its encoding: --data.encoding utf-16"
        )
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not {encoding}: byte {error.start} cannot be read ({error.reason});"
            " name its encoding with --data.encoding, such as latin-1 or utf-16"
        ) from error
    except ValueError as error:
        raise UserError(f"{name} is not {encoding}: {error}; name its encoding with --data.encoding") from error
    nul = text.find("\0")
    if nul >= 0:
        raise UserError(f"{name} looks binary: a NUL at character {nul} of its {encoding}; give a text file")
    return text.removeprefix("\ufeff")


def _codec_name(encoding: str) -> str:
    try:
        # This refuses codecs that are not text encodings, such as zlib.
        " ".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, ValueError) as error:
        raise UserError(
            f"Python knows no text encoding {encoding!r}; choose one such as utf-8, utf-16 or latin-1"
        ) from error


def _no_source(source: str) -> str:
    path = Path(source)
    near: dict[str, str] = {name: name for name in ("builtin", *DOWNLOADS)}
    with contextlib.suppress(OSError, ValueError):
        near |= {name: str(path.parent / name) for name in os.listdir(path.parent)}
    nearest = difflib.get_close_matches(path.name, near, n=1)
    hint = f"did you mean {near[nearest[0]]}?" if nearest else f"other sources are builtin, {', '.join(DOWNLOADS)}"
    return f"there is no file, folder or download {source!r}; {hint}"


def _read_download(name: str, cache: Path | None, progress: Progress) -> SourceText:
    entry = DOWNLOADS[name]
    path = _fetch(entry, cache, progress)
    text = _decode(_member(entry, path, entry.member), str(path), "utf-8")
    valid = None
    if entry.valid_member is not None:
        valid = _decode(_member(entry, path, entry.valid_member), str(path), "utf-8")
    if entry.distinct_characters is not None:
        distinct = len(set(text))
        if distinct != entry.distinct_characters:
            logger.warning(
                "%s has %d distinct characters, not the %d it should have: its text differs from the published one",
                name,
                distinct,
                entry.distinct_characters,
            )
    return SourceText(text, name, (str(path),), valid)


def _member(entry: Download, path: Path, member: str | None) -> bytes:
    if member is None:
        return _read_bytes(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except KeyError as error:
        raise UserError(f"{path} has no member {member}; {_by_hand(entry, path)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} is a damaged zip ({error}); {_by_hand(entry, path)}") from error


def _by_hand(entry: Download, path: Path) -> str:
    return f"get {entry.url} another way and place it at {path}"


def _fetch(entry: Download, cache: Path | None, progress: Progress) -> Path:
    """The file of a download, from the cache where it is there.

    Where no hash is published, that of the first download is kept beside the file and holds from then on.
    """
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    folder = Path(cache or pooch.os_cache("timemix"))
    path = folder / entry.file
    pin = folder / f"{entry.file}.sha256"
    downloader = _Downloader(folder / f"{entry.file}.part", progress)
    try:
        known = entry.sha256 or (pin.read_text().strip() if pin.exists() else None)
        pooch.retrieve(
            entry.url,
            known_hash=known and f"sha256:{known}",
            fname=entry.file,
            path=folder,
            downloader=downloader,
        )
        if known is None:
            seen = pooch.file_hash(str(path))
            write_text(pin, f"{seen}\n")
            logger.warning("no hash of %s is published; it has sha256 %s, kept in %s", entry.url, seen, pin)
    except ValueError as error:
        where = f" (kept in {pin}; delete that to take the new file)" if entry.sha256 is None else ""
        raise UserError(
            f"{entry.url} is not the file it was: its sha256 is not {known}{where}; {_by_hand(entry, path)}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {entry.url} ({error}); try again, or {_by_hand(entry, path)}") from error
    return path


class _Downloader:
    """Downloads for pooch; what a cut connection left in `part` is not asked for again."""

    ATTEMPTS = 5
    CHUNK = 1 << 18
    TIMEOUT = 30.0

    def __init__(self, part: Path, progress: Progress) -> None:
        self.part = part
        self.progress = progress

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        failure: Exception = ConnectionError("the connection was cut")
        for _ in range(self.ATTEMPTS):
            try:
                if self._complete(url):
                    self.part.replace(output_file)
                    return
            except urllib.error.HTTPError as error:
                failure = error
                if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    break
                # What is there does not belong to the file as it is now.
                self.part.unlink()
            except (OSError, http.client.HTTPException) as error:
                failure = error
        raise failure

    def _complete(self, url: str) -> bool:
        """Adds to the part what the server sends; whether it is the whole file then."""
        have = self.part.stat().st_size if self.part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=self.TIMEOUT) as response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0
            length = response.headers["Content-Length"]
            total = None if length is None else have + int(length)
            with self.part.open("ab" if have else "wb") as file, _meter(self.progress, url, have, total) as advance:
                while chunk := response.read(self.CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    advance(have)
        return total is None or have == total


@contextlib.contextmanager
def _meter(progress: Progress, url: str, have: int, total: int | None) -> Iterator[Callable[[int], object]]:
    """Gives a function that is told the bytes that are there so far."""
    if progress is False:
        yield lambda have: None
    elif progress is True and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        columns = [BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        with Bars(*columns, console=Console(stderr=True)) as bars:
            bars.print(url)
            task = bars.add_task("", total=total, completed=have)
            yield lambda have: bars.update(task, completed=have)
    else:
        yield _lines(_print if progress is True else progress, url, total)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _lines(write: Callable[[str], None], url: str, total: int | None) -> Callable[[int], object]:
    """A line at the start, then one for each tenth of the file (each 10 MB where its size is not known)."""
    step = max(1, (total or 100_000_000) // 10)
    of = f" of {total / 1e6:.1f}" if total else ""
    newest = -1

    def advance(have: int) -> None:
        nonlocal newest
        if have // step > newest:
            newest = have // step
            write(f"{url}: {have / 1e6:.1f}{of} MB")

    return advance
