"""Named texts on the internet, which timemix downloads once, caches, and checks by their hashes."""

import contextlib
import http.client
import logging
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from timemix.errors import DamagedFile, Unavailable
from timemix.runtime.cache import cache_folder
from timemix.runtime.progress import ShowProgress, meter
from timemix.storage.files import write_text
from timemix.storage.locks import claimed

logger = logging.getLogger("timemix")


@dataclass(frozen=True)
class Download:
    """A text on the internet."""

    url: str
    file: str
    """Name of the file in the cache."""
    member: str | None = None
    """Name of the text in the zip archive, or None if the file itself is the text."""
    valid_member: str | None = None
    """Name of the validation text in the zip archive, or None if there is no validation text."""
    sha256: str | None = None
    """Hash of the file in hexadecimal, or None if no hash is published."""
    distinct_characters: int | None = None
    """Number of distinct characters of the text, None if unknown."""


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


@contextlib.contextmanager
def opened_member(entry: Download, path: Path, member: str) -> Iterator[tuple[IO[bytes], int]]:
    """Open a member of a zip archive, and yield the open file and the size in bytes.

    Raises:
        DamagedFile: The zip archive is damaged or has no member of this name.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file, archive.getinfo(member).file_size
    except KeyError as error:
        raise DamagedFile(f"{path} has no member {member}; {_by_hand(entry, path)}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DamagedFile(f"{path} is a damaged zip ({error}); {_by_hand(entry, path)}") from error


def _by_hand(entry: Download, path: Path) -> str:
    return f"download {entry.url} by other means and save it as {path}"


def fetch(entry: Download, cache: Path | None, progress: ShowProgress) -> Path:
    """Return the path of a downloaded file, and download it if it is not in the cache.

    If no hash is published, timemix saves the hash of the first download beside the file. Later downloads must have the
    same hash as the first download.

    Args:
        entry: The text.
        cache: Folder of the cache. Default: the cache folder of the user.
        progress: Whether to show the progress of the download on standard error, or a function for progress lines.

    Raises:
        DamagedFile: The hash of the file is not the expected hash.
        Unavailable: The download failed.
    """
    folder = cache or cache_folder()
    if (folder / entry.file).exists():
        return _checked(entry, folder, progress)
    # Without the lock, two processes would append to one partial file.
    with claimed(folder / f".{entry.file}.lock", wait=True):
        return _checked(entry, folder, progress)


def _checked(entry: Download, folder: Path, progress: ShowProgress) -> Path:
    """Check the hash of a file in a folder, and download the file if it is missing or damaged."""
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
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
            logger.warning(
                "no hash of %s is published; later downloads are checked against the sha256 of this file, %s, in %s",
                entry.url,
                seen,
                pin,
            )
    except ValueError as error:
        accept = f"delete {pin} to accept a new version, or " if entry.sha256 is None else ""
        raise DamagedFile(
            f"{entry.url} is damaged or has changed: its sha256 is not {known}; {accept}{_by_hand(entry, path)}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"cannot download {entry.url} ({error}); try again, or {_by_hand(entry, path)}") from error
    return path


class _Downloader:
    """Downloader for pooch that resumes after a lost connection. The file `part` holds the bytes received so far."""

    ATTEMPTS = 5
    CHUNK = 1 << 18
    TIMEOUT = 30.0

    def __init__(self, part: Path, progress: ShowProgress) -> None:
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
                # The file on the server has changed since `part` was received.
                self.part.unlink()
            except (OSError, http.client.HTTPException) as error:
                failure = error
        raise failure

    def _complete(self, url: str) -> bool:
        """Append the received bytes to `part`, and return whether the file is complete."""
        have = self.part.stat().st_size if self.part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=self.TIMEOUT) as response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                have = 0
            length = response.headers["Content-Length"]
            total = None if length is None else have + int(length)
            with self.part.open("ab" if have else "wb") as file, meter(self.progress, url, have, total) as advance:
                while chunk := response.read(self.CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    advance(have)
        return total is None or have == total
