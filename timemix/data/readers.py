"""Readers that decompress the bytes of a file and decode the bytes to text, piece by piece."""

import bz2
import codecs
import collections
import contextlib
import gzip
import io
import itertools
import lzma
import shlex
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timemix.errors import DamagedFile, FileError, InvalidValue, Unavailable
from timemix.runtime.progress import Advance, untold
from timemix.storage.files import cannot_read


def _open_zstandard(raw: io.BufferedReader, _: str) -> Any:
    """Open a file compressed by Zstandard."""
    try:
        # The package zstandard does not report that a file ends too early.
        import pyarrow
    except ImportError as error:
        raise Unavailable("a file compressed by Zstandard needs pyarrow: pip install 'timemix[data]'") from error
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")


OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstandard}

BEGINNINGS = {b"\x1f\x8b\x08": ".gz", b"\xfd7zXZ\0": ".xz", b"BZh91AY&SY": ".bz2", b"(\xb5/\xfd": ".zst"}
"""First bytes of compressed files. For bzip2, only files of the default block size have these bytes."""

CHUNK = 1 << 20
"""Number of bytes read at a time."""


def chunks(path: Path, held: bytes | None = None, before: int = 0, advance: Advance = untold) -> Iterator[bytes]:
    """Read a file in pieces. Decompress a file whose first bytes or suffix are those of gzip, xz, bzip2 or Zstandard.

    Args:
        path: The file.
        held: Content of the file, if it is in memory already.
        before: Number of bytes of earlier files, which `advance` also counts.
        advance: Function that receives the number of bytes read so far, `before` included.

    Raises:
        DamagedFile: The file cannot be decompressed.
        FileError: The file cannot be read.
        Unavailable: The file is compressed by Zstandard, and the package pyarrow is not installed.
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
        # The decompressors raise an OSError without an error number.
        if error.errno is None:
            raise DamagedFile(f"{path} is damaged: it does not decompress ({error}); get it again") from error
        raise FileError(cannot_read(path, error)) from error


def _opened(path: Path, held: bytes | None) -> io.BufferedReader:
    return open(path, "rb") if held is None else io.BufferedReader(io.BytesIO(held))


def _decompressed(raw: io.BufferedReader, path: Path) -> contextlib.AbstractContextManager[Any]:
    first = raw.peek(16)
    found = (suffix for beginning, suffix in BEGINNINGS.items() if first.startswith(beginning))
    opener = OPENERS.get(next(found, path.suffix.lower()))
    return opener(raw, "rb") if opener else contextlib.nullcontext(raw)


KINDS = {
    b"%PDF-": "a PDF document; extract its text first, for example with pdftotext",
    b"PK\x03\x04": "a zip archive (as docx, xlsx and epub files are); unpack it and name the text in it",
    b"\x89PNG": "an image; give a text file",
    b"\xff\xd8\xff": "an image; give a text file",
    b"GIF8": "an image; give a text file",
}
"""First bytes of file formats other than text, with the end of the error message for each format."""


def looks_binary(first: bytes, encoding: str, keep_nul: bool = False) -> bool:
    """Return whether a file is binary: its first bytes are those of a known binary format, or contain a NUL.

    Args:
        first: First bytes of the file.
        encoding: Encoding of text files.
        keep_nul: Whether a file with NUL characters counts as text instead of as binary.
    """
    if _kind(first) is not None:
        return True
    codec = _codec_name(encoding)
    return not keep_nul and ("\0" in first.decode(codec, "ignore") if _is_wide(codec) else b"\0" in first)


def _kind(first: bytes) -> str | None:
    return next((kind for beginning, kind in KINDS.items() if first.startswith(beginning)), None)


def _is_wide(codec: str) -> bool:
    """Return whether an encoding writes NUL bytes for ASCII text."""
    return codec.startswith(("utf-16", "utf-32"))


def decoded(
    data: Iterator[bytes], name: str, encoding: str, keep_nul: bool = False, *, is_alone: bool = True
) -> Iterator[str]:
    """Decode the bytes of a file to text in pieces, without byte order mark.

    Args:
        data: The bytes, in pieces.
        name: Name of the file, for error messages.
        encoding: Encoding of the file.
        keep_nul: Whether a file with NUL characters counts as text instead of as binary.
        is_alone: Whether the source has no other files, so that another encoding suits the whole source.

    Raises:
        DamagedFile: The file has a known binary format.
        InvalidValue: The file is not valid text in `encoding`, or contains a NUL.
    """
    codec = _codec_name(encoding)
    if not keep_nul:
        data = _refuse_kinds(data, name)
        if not _is_wide(codec):
            data = _without_nul(data, name)
    # punycode is the only codec of Python that cannot decode in pieces.
    if codec == "punycode":
        data = iter([b"".join(data)])
    texts = _texts(data, name, codec, encoding, is_alone)
    return texts if keep_nul else _without_nul_characters(texts, name, encoding)


def _texts(data: Iterator[bytes], name: str, codec: str, encoding: str, is_alone: bool) -> Iterator[str]:
    """Decode bytes to nonempty pieces of text, without byte order mark."""
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
            # Read to the end first: if the file is damaged or binary, the reader raises a more helpful error.
            collections.deque(data, maxlen=0)
            raise InvalidValue(
                f"{name} is not in {encoding}: byte {fed - len(error.object) + error.start} cannot be decoded"
                f" ({error.reason}); {_way_to_decode(name, codec, is_alone)}"
            ) from error
        except ValueError as error:
            collections.deque(data, maxlen=0)
            raise InvalidValue(
                f"{name} is not in {encoding}: {error}; {_way_to_decode(name, codec, is_alone)}"
            ) from error
        if text and begins:
            begins = False
            text = text.removeprefix("\ufeff")
        if text:
            yield text


def _way_to_decode(name: str, codec: str, is_alone: bool) -> str:
    """Return the advice about a file in another encoding: data.encoding applies to all files of a source."""
    if is_alone:
        return "set data.encoding to its encoding, such as latin-1 or utf-16"
    return (
        f"convert this file, for example with: iconv -f latin1 -t {codec} {shlex.quote(name)} > NEW;"
        " if all files have its encoding, set data.encoding instead"
    )


def _without_nul_characters(texts: Iterator[str], name: str, encoding: str) -> Iterator[str]:
    characters = 0
    for text in texts:
        if (nul := text.find("\0")) >= 0:
            # Read to the end first: if the file has another encoding, the decoder raises a more helpful error.
            collections.deque(texts, maxlen=0)
            raise InvalidValue(
                f"{name} looks binary: it has a NUL at character {characters + nul} in {encoding};"
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
            # Read to the end first: if the file is damaged, the reader raises a more helpful error.
            collections.deque(data, maxlen=0)
            likely = _likely_encoding(chunk)
            advice = f"set data.encoding to {likely}" if likely else "set data.keep_nul"
            raise InvalidValue(f"{name} looks binary: it has a NUL at byte {fed + nul}; if it is text, {advice}")
        fed += len(chunk)
        yield chunk


def _likely_encoding(chunk: bytes) -> str | None:
    """Return utf-16 or utf-32 if the positions of the NUL bytes fit Latin text in that encoding, else None."""
    if chunk.count(b"\0") < 4:
        return None
    few, many = sorted(2 * chunk[parity::2].count(b"\0") / len(chunk) for parity in (0, 1))
    if many < 0.5:
        return None
    return "utf-32" if 0.4 < few < 0.6 and many > 0.9 else "utf-16" if few < 0.05 else None


def _decoder(codec: str, first: bytes) -> codecs.IncrementalDecoder:
    """Return the decoder for a text that begins with the bytes `first`."""
    marks = {"utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)}
    # Incremental decoders fail without a byte order mark, so this code assumes the byte order of the machine, as
    # `bytes.decode` does.
    if codec in marks and not first.startswith(marks[codec]):
        codec += "-le" if sys.byteorder == "little" else "-be"
    return codecs.getincrementaldecoder(codec)()


def _codec_name(encoding: str) -> str:
    try:
        # Encoding a space fails for codecs that are not text encodings, such as zlib.
        " ".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, ValueError) as error:
        raise InvalidValue(
            f"encoding {encoding!r} is not a text encoding of Python; give one such as utf-8, utf-16 or latin-1"
        ) from error
