"""Reading of JSON files with unknown content, with checks against a dataclass."""

import dataclasses
import json
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from timemix.errors import DamagedFile
from timemix.storage.files import LARGEST, read_text

Record = TypeVar("Record")

OPTIONAL = {"optional": True}
"""Metadata of a field that `to_json` omits if the value of the field is None."""


@dataclass(frozen=True)
class Range:
    """Least and largest allowed value of a number, or least and largest allowed length of a list."""

    least: float
    most: float = sys.float_info.max


Count = Annotated[int, Range(0, 2**63 - 1)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(sys.float_info.min)]


class Misfit(ValueError):
    """Error for a value of a wrong type or range, with the message `FIELD is VALUE`."""


def parse_json(path: Path, what: str = "", largest: int = LARGEST) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        what: Words before the path in messages, such as "the tokenizer ".
        largest: Maximum size of the file in bytes.

    Raises:
        FileError: The file is missing or not JSON.
    """
    text = read_text(path, largest, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: it is not valid JSON ({error}); restore it from a copy") from error


def read_json(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: The file.
        largest: Maximum size of the file in bytes.

    Raises:
        FileError: The file is missing, not JSON or not a JSON object.
    """
    data = parse_json(path, largest=largest)
    if not isinstance(data, dict):
        raise DamagedFile(f"{path} is damaged: it is not a JSON object; restore it from a copy")
    return data


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a JSON object from a file, and convert the object to a dataclass.

    Args:
        path: The file.
        kind: The dataclass, as in `to_record`.

    Raises:
        FileError: The file is missing or not a JSON object, or a field is missing, has a wrong type or is out of range.
    """
    data = read_json(path)
    try:
        return to_record(data, kind)
    except Misfit as error:
        raise DamagedFile(f"{path} is damaged: {error}; restore it from a copy") from None


def to_record(data: Any, kind: type[Record], place: str = "") -> Record:
    """Check a JSON object against the types and ranges of a dataclass, and convert the object to that dataclass.

    Unknown fields are ignored, because newer versions of timemix may write more fields. Fields with a default may be
    missing, because older versions of timemix did not write these fields. JSON lists are converted to tuples.

    Args:
        data: A parsed JSON value.
        kind: A dataclass whose fields are numbers, strings, lists, objects, dataclasses or None. Fields that are
            numbers or lists may have a `Range`.
        place: Prefix of field names in messages.

    Raises:
        Misfit: A field is missing, has a wrong type or is out of range.
    """
    if not isinstance(data, dict):
        raise Misfit(f"{place.rstrip('.') or 'it'} is not a JSON object")
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {}
    for field in dataclasses.fields(typing.cast(Any, kind)):
        if field.name in data:
            values[field.name] = _checked(place + field.name, data[field.name], hints[field.name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Misfit(f"{place}{field.name} is missing")
    return kind(**values)


def _checked(place: str, value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found = _checked(place, value, args[0])
        size = len(found) if isinstance(found, tuple) else found
        if all(bound.least <= size <= bound.most for bound in args[1:]):
            return found
    elif origin in (types.UnionType, typing.Union):
        (other,) = (each for each in args if each is not type(None))
        return None if value is None else _checked(place, value, other)
    elif origin is tuple and isinstance(value, list):
        kinds = args[:1] * len(value) if args[-1] is ... else args
        if len(kinds) == len(value):
            pairs = enumerate(zip(value, kinds, strict=True))
            return tuple(_checked(f"{place}[{i}]", each, kind) for i, (each, kind) in pairs)
    elif origin is dict and isinstance(value, dict):
        return {key: _checked(f"{place}.{key}", each, args[1]) for key, each in value.items()}
    elif dataclasses.is_dataclass(hint):
        return to_record(value, typing.cast(type, hint), f"{place}.")
    elif hint is Any or (hint is float and is_number(value)) or (hint in (int, str, bool) and type(value) is hint):
        return value
    raise Misfit(f"{place} is {value!r}")


def is_number(value: Any) -> bool:
    """Return whether a value from a file is a finite number in the range of a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def to_json(record: Any) -> dict[str, Any]:
    """Convert a dataclass to a JSON object, without fields that are `OPTIONAL` and None."""
    fields = ((field, getattr(record, field.name)) for field in dataclasses.fields(record))
    return {f.name: _plain(value) for f, value in fields if value is not None or not f.metadata.get("optional")}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
