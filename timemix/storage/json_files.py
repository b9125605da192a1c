"""JSON files of any content: read, and checked by shape."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timemix.errors import DamagedFile
from timemix.storage.files import read_text


def parse_json(path: Path, what: str = "") -> Any:
    """What a JSON file holds. Raises DamagedFile when it is missing or damaged; `what` as for `check_regular`."""
    text = read_text(path, what=what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: it is not whole JSON ({error}); restore it from a copy") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DamagedFile as `parse_json` does, and for another value."""
    data = parse_json(path)
    if not isinstance(data, dict):
        raise DamagedFile(f"{path} is damaged: it holds no JSON object")
    return data


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    """Whether a value from a file is an integer from 0 that 64 bits hold."""
    return type(value) is int and 0 <= value < 2**63


def are_numbers(value: Any) -> bool:
    """Whether a value from a file is a list of numbers."""
    return isinstance(value, list) and all(map(is_number, value))


def misfit(data: Any, checks: dict[str, Callable[[Any], bool]]) -> str | None:
    """Name of the first field of a JSON object that is missing or fails its check, None where all serve."""
    return next(
        (n for n, check in checks.items() if not (isinstance(data, dict) and n in data and check(data[n]))), None
    )
