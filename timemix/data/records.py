"""Readers of files with one text per record: JSON lines, tables (CSV, TSV), and Parquet."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from timemix.data.chats import CHAT_KEYS, marked_conversation, refuse_lone_surrogate
from timemix.data.readers import CHUNK, OPENERS
from timemix.data.templates import ChatTemplate
from timemix.errors import DamagedFile, InvalidValue, Unavailable, nearest
from timemix.tokenizers.base import DOCUMENT_END

DEFAULT_KEY = "text"
"""Key of the text in JSON lines and Parquet, unless data.text_key names another key."""
LONGEST_LINE = 1 << 26
"""Largest number of characters of a line. A longer line is probably damaged, and would fill the memory."""

# Python refuses to parse integers of thousands of digits.
_DECODER = json.JSONDecoder(parse_int=float)

_JSON_LINES, _TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}


def format_of(path: Path, key: str | None) -> str | None:
    """Return the suffix of a format of records, or None for plain text.

    Args:
        path: The file. A suffix of a compression is left out.
        key: Value of data.text_key. Without a key, CSV and TSV files are plain text.
    """
    name = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    suffix = name.suffix.lower()
    if suffix in _JSON_LINES or suffix == ".parquet" or (suffix in _TABLES and key is not None):
        return suffix
    return None


def joined(records: Iterator[str], documents: bool) -> Iterator[str]:
    """Join the texts of records.

    Args:
        records: The texts. Empty texts are left out.
        documents: Whether DOCUMENT_END ends each text. Otherwise, a newline is between two texts unless the first one
            ends with a newline.

    Yields:
        Pieces of the joined text, each of about CHUNK characters.
    """
    piece: list[str] = []
    size, last = 0, ""
    for text in records:
        if not text:
            continue
        if not documents and last not in ("", "\n"):
            piece.append("\n")
        # One piece of a huge record would later take several times its memory.
        for start in range(0, len(text), CHUNK):
            part = text[start : start + CHUNK]
            piece.append(part)
            size += len(part)
            if size >= CHUNK:
                yield "".join(piece)
                piece, size = [], 0
        if documents:
            piece.append(DOCUMENT_END)
        last = text[-1]
    if piece:
        yield "".join(piece)


def records(
    texts: Iterator[str], path: Path, suffix: str, key: str | None, template: ChatTemplate | None = None
) -> Iterator[str]:
    """Read the records of JSON lines or of a table.

    Args:
        texts: The decoded file, in pieces.
        path: The file, for messages.
        suffix: Format, as from `format_of`.
        key: Key of the text; None: DEFAULT_KEY.
        template: Chat template of the conversations; None: the records have texts.

    Yields:
        The text of each record, with loss marks if it is a conversation.

    Raises:
        DamagedFile: A line is no record, or too long. The message names the line.
        InvalidValue: A record has no text under the key, or no conversation for the template.
    """
    lines = _lines(texts, path)
    if suffix in _TABLES:
        yield from _table(lines, path, _TABLES[suffix], key or DEFAULT_KEY)
        return
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            record = _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise DamagedFile(f"{path}, line {number}, is no JSON: {error}; correct or remove the line") from error
        if not isinstance(record, dict):
            raise DamagedFile(f"{path}, line {number}, is no JSON object; correct or remove the line")
        text = _of_record(record, key, template, f"{path}, line {number},")
        # Decoded bytes have no lone surrogates, but an escape sequence may be one.
        if template is None and "\\u" in line:
            refuse_lone_surrogate(text, key or DEFAULT_KEY, f"{path}, line {number},")
        yield text


def _lines(texts: Iterator[str], path: Path) -> Iterator[str]:
    """Yield the lines of a text, with their line ends. Only a newline ends a line."""
    rest: list[str] = []
    size = number = 0
    for text in texts:
        *whole, last = text.split("\n")
        for line in whole:
            yield "".join([*rest, line, "\n"])
            rest, size, number = [], 0, number + 1
        rest.append(last)
        size += len(last)
        if size > LONGEST_LINE:
            raise DamagedFile(f"{path}, line {number + 1}, has more than {LONGEST_LINE:,} characters; split the line")
    if last := "".join(rest):
        yield last


def _of_record(record: dict[str, Any], key: str | None, template: ChatTemplate | None, place: str) -> str:
    """Return the text of a record, or its conversation."""
    return record_text(record, key, place) if template is None else marked_conversation(record, template, place)


def record_text(record: dict[str, Any], given: str | None, place: str) -> str:
    """Return the text of a record.

    Args:
        record: The record.
        given: Key of the text; None: DEFAULT_KEY.
        place: File and line of the record, for messages.

    Raises:
        InvalidValue: The record has no text under the key.
    """
    key = given or DEFAULT_KEY
    if key not in record:
        _refuse_chat(record, given, place)
        raise InvalidValue(f"{place} has no key {key!r}{nearest(key, record)}; set data.text_key")
    text = record[key]
    if not isinstance(text, str):
        kind = {type(None): "null", float: "as a number"}.get(type(text), f"of type {type(text).__name__}")
        raise InvalidValue(f"{place} has {key!r} {kind}; it must be a text")
    return text


def _refuse_chat(names: Iterable[str], given: str | None, place: str) -> None:
    """Raise InvalidValue if the keys of a record without a text are those of a conversation."""
    if given is None and (chat := [name for name in CHAT_KEYS if name in names]):
        raise InvalidValue(
            f"{place} has no {DEFAULT_KEY!r}, but {chat[0]!r}, as conversations have; set data.template to world, or"
            " data.text_key to the key of a text"
        )


def _column(path: Path, names: list[str], key: str) -> int:
    """Return the number of the column with a name."""
    if key not in names:
        raise InvalidValue(f"{path} has no column {key!r}{nearest(key, names)}; set data.text_key")
    if names.count(key) > 1:
        raise InvalidValue(f"{path} has {names.count(key)} columns {key!r}; rename all but one of these columns")
    return names.index(key)


def _table(lines: Iterator[str], path: Path, delimiter: str, key: str) -> Iterator[str]:
    """Yield the texts in a column of a table, whose first line has the names of the columns."""
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = next(reader, None)
        if names is None:
            return
        column = _column(path, names, key)
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise DamagedFile(
                    f"{path}, line {reader.line_num}, has {len(row)} columns, not {len(names)}; correct the line"
                )
            yield row[column]
    except csv.Error as error:
        raise DamagedFile(f"{path}, line {reader.line_num}, is no row of a table: {error}; correct the line") from error


def is_text_type(kind: Any) -> bool:
    """Return whether a column of a type of pyarrow has texts."""
    import pyarrow

    # A column with few distinct texts may be stored as a dictionary of these texts.
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return plain in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


def parquet(
    path: Path, key: str | None, template: ChatTemplate | None, advance: Callable[[float], object]
) -> Iterator[str]:
    """Read the texts or the conversations of a Parquet file, one row group after another.

    Args:
        path: The file.
        key: Name of the column; None: DEFAULT_KEY.
        template: Chat template of the conversations; None: the column has texts.
        advance: Function that receives the share of the rows that was read so far.

    Yields:
        The text of each row, with loss marks if it is a conversation.

    Raises:
        Unavailable: The package pyarrow is not installed.
        DamagedFile: The file is damaged.
        InvalidValue: The whole file is compressed, the column is missing, or a row has no text, or no conversation for
            the template.
    """
    try:
        import pyarrow
        from pyarrow import parquet as reader
    except ImportError as error:
        raise Unavailable(f"{path} is a Parquet file, which needs pyarrow: pip install 'timemix[data]'") from error
    if path.suffix.lower() in OPENERS:
        raise InvalidValue(f"{path} is a compressed Parquet file; decompress it, and name the .parquet file")
    done = 0
    try:
        with reader.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if template is None:
                _refuse_chat(names if DEFAULT_KEY not in names else (), key, str(path))
                columns = [key or DEFAULT_KEY]
                kind = file.schema_arrow.field(_column(path, names, columns[0])).type
                if not is_text_type(kind):
                    raise InvalidValue(
                        f"{path} has the column {columns[0]!r} of type {kind}; it must be a column of texts"
                    )
            else:
                columns = [name for name in CHAT_KEYS if name in names]
                if not columns:
                    raise InvalidValue(
                        f"{path} has neither a column 'messages' nor 'prompt' and 'completion', which data.template"
                        " needs; leave data.template out, or rename the columns"
                    )
                for name in columns:
                    _column(path, names, name)
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                try:
                    found = batch.to_pylist()
                except (pyarrow.ArrowException, UnicodeDecodeError):
                    raise
                except (OverflowError, ValueError) as error:
                    # Python has no value for some dates of Arrow.
                    raise InvalidValue(
                        f"{path} has {' or '.join(map(repr, columns))} of a wrong type: {error}; correct the columns"
                    ) from error
                for row, record in enumerate(found, done + 1):
                    yield _of_record(record, key, template, f"{path}, row {row},")
                done += batch.num_rows
                advance(done / max(1, file.metadata.num_rows))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFile(f"{path} is damaged or no Parquet file: {words}; get it again") from error
