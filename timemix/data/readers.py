"""Bytes of files and the text in them, piece by piece."""

import bz2
import codecs
import collections
import contextlib
import gzip
import io
import itertools
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timemix.errors import DamagedFile, FileError, InvalidValue
from timemix.runtime.progress import Advance, untold

OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

BEGINNINGS = {b"\x1f\x8b\x08": ".gz", b"\xfd7zXZ\0": ".xz", b"BZh91AY&SY": ".bz2"}
"""First bytes of compressed files; bzip2's are those of its usual block size."""

CHUNK = 1 << 20
"""Bytes read at a time."""


def chunks(path: Path, held: bytes | None = None, before: int = 0, advance: Advance = untold) -> Iterator[bytes]:
    """Content of a file (or what is `held` of it), decompressed where its name or its first bytes say so.

    `advance` gets the bytes read of it and `before` it.
    """
    done = before
    try:
        with _opened(path, held) as raw, _decompressed(raw, path) as file:
            while chunk := file.read(CHUNK):
                done = done + len(chunk) if file is raw else before + raw.tell()
                advance(done)
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DamagedFile(f"{path} is damaged: it does not decompress ({error}); get it again") from error
    except OSError as error:
        # The decompressors raise an OSError without a number.
        if error.errno is None:
            raise DamagedFile(f"{path} is damaged: it does not decompress ({error}); get it again") from error
        raise FileError(f"cannot read {path}: {error.strerror}") from error


def _opened(path: Path, held: bytes | None) -> io.BufferedReader:
    return open(path, "rb") if held is None else io.BufferedReader(io.BytesIO(held))


def _decompressed(raw: io.BufferedReader, path: Path) -> contextlib.AbstractContextManager[Any]:
    first = raw.peek(16)
    found = (suffix for beginning, suffix in BEGINNINGS.items() if first.startswith(beginning))
    opener: Any = OPENERS.get(next(found, path.suffix.lower()))
    return opener(raw, "rb") if opener else contextlib.nullcontext(raw)


KINDS = {
    b"%PDF-": "a PDF document; extract its text first, with pdftotext say",
    b"PK\x03\x04": "a zip archive (as docx, xlsx and epub files are); unpack it, and name the text in it",
    b"\x89PNG": "an image; give a text file",
    b"\xff\xd8\xff": "an image; give a text file",
    b"GIF8": "an image; give a text file",
}
"""What a file is by its first bytes, and the way out."""


def looks_binary(first: bytes, encoding: str, keep_nul: bool = False) -> bool:
    """Whether a file that begins with some bytes is no text: of a known kind, or with a NUL that is no character."""
    if _kind(first) is not None:
        return True
    codec = _codec_name(encoding)
    return not keep_nul and ("\0" in first.decode(codec, "ignore") if _is_wide(codec) else b"\0" in first)


def _kind(first: bytes) -> str | None:
    return next((kind for beginning, kind in KINDS.items() if first.startswith(beginning)), None)


def _is_wide(codec: str) -> bool:
    """Whether half of the bytes of ASCII text are NUL."""
    return codec.startswith(("utf-16", "utf-32"))


def decoded(data: Iterator[bytes], name: str, encoding: str, keep_nul: bool = False) -> Iterator[str]:
    """Text of a file's bytes, without byte order mark, in pieces.

    Args:
        data: The bytes.
        name: Name of the file, for errors.
        encoding: Its encoding.
        keep_nul: Whether a NUL is a character as any other, rather than the sign of a binary file.

    Raises:
        DamagedFile: The file is of a known kind that is no text.
        InvalidValue: It is not in `encoding`, or holds a NUL.
    """
    codec = _codec_name(encoding)
    if not keep_nul:
        data = _refuse_kinds(data, name)
        if not _is_wide(codec):
            data = _without_nul(data, name)
    # The only codec of Python whose decoder cannot decode piece by piece.
    if codec == "punycode":
        data = iter([b"".join(data)])
    texts = _texts(data, name, codec, encoding)
    return texts if keep_nul else _without_nul_characters(texts, name, encoding)


def _texts(data: Iterator[bytes], name: str, codec: str, encoding: str) -> Iterator[str]:
    """The text of bytes in pieces that are not empty, without byte order mark."""
    first = b""
    while len(first) < 4 and (chunk := next(data, b"")):
        first += chunk
    decoder = _decoder(codec, first)
    fed = 0
    begins = True
    for chunk in itertools.chain([first], data, [b""]):
        fed += len(chunk)
        try:
            text = decoder.decode(chunk, not chunk)
        except UnicodeDecodeError as error:
            # What follows may be damaged, or show that this is no text at all: that is said first.
            collections.deque(data, maxlen=0)
            raise InvalidValue(
                f"{name} is not {encoding}: byte {fed - len(error.object) + error.start} cannot be read"
                f" ({error.reason}); name its encoding with data.encoding, such as latin-1 or utf-16"
            ) from error
        except ValueError as error:
            collections.deque(data, maxlen=0)
            raise InvalidValue(f"{name} is not {encoding}: {error}; name its encoding with data.encoding") from error
        if text and begins:
            begins = False
            text = text.removeprefix("\ufeff")
        if text:
            yield text


def _without_nul_characters(texts: Iterator[str], name: str, encoding: str) -> Iterator[str]:
    characters = 0
    for text in texts:
        if (nul := text.find("\0")) >= 0:
            # What follows may not be in this encoding at all: that is said first.
            collections.deque(texts, maxlen=0)
            raise InvalidValue(
                f"{name} looks binary: a NUL at character {characters + nul} of its {encoding};"
                " if it is text, set data.keep_nul"
            )
        characters += len(text)
        yield text


def _refuse_kinds(data: Iterator[bytes], name: str) -> Iterator[bytes]:
    first = next(data, b"")
    if kind := _kind(first):
        raise DamagedFile(f"{name} is {kind}")
    yield from itertools.chain([first], data)


def _without_nul(data: Iterator[bytes], name: str) -> Iterator[bytes]:
    fed = 0
    for chunk in data:
        nul = chunk.find(b"\0")
        if nul >= 0:
            # A file that is also damaged is said to be that.
            collections.deque(data, maxlen=0)
            likely = _likely_encoding(chunk)
            advice = f"name its encoding: data.encoding {likely}" if likely else "set data.keep_nul"
            raise InvalidValue(f"{name} looks binary: a NUL at byte {fed + nul}; if it is text, {advice}")
        fed += len(chunk)
        yield chunk


def _likely_encoding(chunk: bytes) -> str | None:
    """UTF-16 or UTF-32 where NULs lie as in Latin text in it, else None."""
    if chunk.count(b"\0") < 4:
        return None
    few, many = sorted(2 * chunk[parity::2].count(b"\0") / len(chunk) for parity in (0, 1))
    if many < 0.5:
        return None
    return "utf-32" if 0.4 < few < 0.6 and many > 0.9 else "utf-16" if few < 0.05 else None


def _decoder(codec: str, first: bytes) -> codecs.IncrementalDecoder:
    """Decoder of a text that begins with the bytes `first`."""
    marks = {"utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)}
    # Without a mark these decoders give up, where `bytes.decode` takes the machine's own byte order.
    if codec in marks and not first.startswith(marks[codec]):
        codec += "-le" if sys.byteorder == "little" else "-be"
    return codecs.getincrementaldecoder(codec)()


def _codec_name(encoding: str) -> str:
    try:
        # This refuses codecs that are not text encodings, such as zlib.
        " ".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, ValueError) as error:
        raise InvalidValue(
            f"Python knows no text encoding {encoding!r}; choose one such as utf-8, utf-16 or latin-1"
        ) from error
