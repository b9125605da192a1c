"""Conversion of settings between dataclasses, nested dictionaries and TOML, with checks."""

import dataclasses
import math
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from timemix.errors import DamagedFile, InvalidValue, nearest
from timemix.storage.files import read_text

LARGEST_TOML = 256 * 2**10
"""Maximum size of a TOML file in bytes."""
LARGEST_VOCABULARY = 2**24
"""Maximum number of tokens in a vocabulary."""
MOST_DOTS = 200
"""Maximum number of dots in a line of a TOML file. Parsing a dotted key with n parts takes O(n^2) time."""


def check_range(name: str, value: float, least: float, most: float = sys.float_info.max) -> None:
    """Check that the value of a setting is in a range.

    Args:
        name: Dotted name of the setting, for the message.
        value: Value of the setting.
        least: Least allowed value.
        most: Largest allowed value.

    Raises:
        InvalidValue: The value is out of range.
    """
    if not value >= least:
        raise InvalidValue(f"{name} is {value}; it must be at least {least}")
    if value > most:
        raise InvalidValue(f"{name} is {value}; it must be at most {most}")


def nearest_divisors(value: int, total: int) -> str:
    """Return the nearest divisors of `total` below and above `value`, for an error message."""
    small = [d for d in range(1, math.isqrt(total) + 1) if total % d == 0]
    divisors = small + [total // d for d in reversed(small) if d * d < total]
    near = [d for d in divisors if d < value][-1:] + [d for d in divisors if d > value][:1]
    return ", ".join(map(str, near))


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config dataclass to a nested dictionary, without fields that are None."""
    return dataclasses.asdict(config, dict_factory=lambda items: {k: v for k, v in items if v is not None})


Config = TypeVar("Config")


def from_dict(cls: type[Config], data: dict[str, Any], path: str = "") -> Config:
    """Create a config dataclass from the values of a nested dictionary.

    Args:
        cls: The dataclass.
        data: Values of the fields, by name.
        path: Prefix of field names in messages.

    Raises:
        InvalidValue: A field is unknown or missing, or a value has a wrong type. The message names the known field with
            the most similar name.
    """
    types_of = typing.get_type_hints(cls)
    hints = {field.name: types_of[field.name] for field in dataclasses.fields(typing.cast(Any, cls))}
    if narrowed := getattr(cls, "narrowed", None):
        hints |= narrowed(data)
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in hints:
            raise InvalidValue(f"unknown field {path + name!r}{nearest(name, hints)}")
        values[name] = _checked(f"{path}{name}", value, hints[name])
    missing = [f.name for f in dataclasses.fields(typing.cast(Any, cls)) if f.name not in values and _required(f)]
    if missing:
        raise InvalidValue(f"{path + missing[0]} is missing; give a value")
    return cls(**values)


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _checked(name: str, value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) or origin is dict:
        if not isinstance(value, dict):
            raise InvalidValue(f"{name} is {value!r}; it must be a table")
        return value if origin is dict else from_dict(typing.cast(type, hint), value, f"{name}.")
    if origin is Literal:
        if value not in args:
            raise InvalidValue(f"{name} is {value!r}{nearest(str(value), args)}")
        return value
    is_union = origin in (types.UnionType, typing.Union)
    if is_union and value is None and type(None) in args:
        return None
    if is_union:
        kinds = [kind for kind in args if kind is not type(None)]
        return _checked(name, value, type(value) if type(value) in kinds else kinds[-1])
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InvalidValue(f"{name} is {value!r}; it must be a list")
        return tuple(_checked(name, item, args[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise InvalidValue(f"{name} is {value!r}; it must be of type {hint.__name__}")
    return value


def parse_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        FileError: The file is missing, not TOML, or larger than `LARGEST_TOML`.
    """
    text = read_text(path, LARGEST_TOML)
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MOST_DOTS:
            raise DamagedFile(
                f"line {number} of {path} has {line.count('.')} dots, more than {MOST_DOTS}; split the line"
            )
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: it is not valid TOML ({error}); correct it") from error


UNFIT = (ValueError, ArithmeticError, RecursionError)
"""Errors that `from_dict` raises for bad values from a file, such as ArithmeticError for a number that is too large."""
