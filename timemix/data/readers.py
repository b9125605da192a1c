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

CHUNK = 1 << 20
"""Bytes read at a time."""


def chunks(path: Path, held: bytes | None = None, before: int = 0, advance: Advance = untold) -> Iterator[bytes]:
    """Content of a file (or what is `held` of it), decompressed where its name says so.

    `advance` gets the bytes read of it and `before` it.
    """
    opener: Any = OPENERS.get(path.suffix.lower()) if held is None else None
    done = before
    try:
        with (
            open(path, "rb") if held is None else io.BytesIO(held) as raw,
            opener(raw, "rb") if opener else contextlib.nullcontext(raw) as file,
        ):
            while chunk := file.read(CHUNK):
                done = before + raw.tell() if opener else done + len(chunk)
                advance(done)
                yield chunk
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DamagedFile(f"{path} is damaged: it does not decompress ({error}); get it again") from error
    except OSError as error:
        # The decompressors raise an OSError without a number.
        if error.errno is None:
            raise DamagedFile(f"{path} is damaged: it does not decompress ({error}); get it again") from error
        raise FileError(f"cannot read {path}: {error.strerror}") from error


def decoded(data: Iterator[bytes], name: str, encoding: str) -> Iterator[str]:
    """Text of a file's bytes, without byte order mark, in pieces. `name` is the file's, for errors."""
    codec = _codec_name(encoding)
    # In UTF-16 and UTF-32 half of the bytes of ASCII text are NUL.
    if not codec.startswith(("utf-16", "utf-32")):
        data = _without_nul(data, name)
    # The only codec of Python whose decoder cannot decode piece by piece.
    if codec == "punycode":
        data = iter([b"".join(data)])
    first = b""
    while len(first) < 4 and (chunk := next(data, b"")):
        first += chunk
    decoder = _decoder(codec, first)
    fed = characters = 0
    nul = -1
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
        if nul < 0 and (found := text.find("\0")) >= 0:
            nul = characters + found
        begins = characters == 0
        characters += len(text)
        if begins:
            text = text.removeprefix("\ufeff")
        if text and nul < 0:
            yield text
    if nul >= 0:
        raise DamagedFile(f"{name} looks binary: a NUL at character {nul} of its {encoding}; give a text file")


def _without_nul(data: Iterator[bytes], name: str) -> Iterator[bytes]:
    fed = 0
    for chunk in data:
        nul = chunk.find(b"\0")
        if nul >= 0:
            # A file that is also damaged is said to be that.
            collections.deque(data, maxlen=0)
            raise InvalidValue(
                f"{name} looks binary: a NUL at byte {fed + nul};"
                " if it is text, name its encoding: data.encoding utf-16"
            )
        fed += len(chunk)
        yield chunk


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
