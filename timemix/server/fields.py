"""Reading of JSON bodies: each fault is a 400 that names the field."""

import gc
import json
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from timemix.errors import InvalidValue
from timemix.server.errors import ApiError

Value = TypeVar("Value")

LONG_BODY = 2**16
"""Size in bytes from which the garbage collector waits while a body is parsed."""


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    Args:
        request: The request.
        limit: Largest size in bytes.

    Raises:
        ApiError: The body is larger, with status 413, or the connection ended.
    """
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise ApiError(413, f"the body is larger than {limit:,} bytes; send less", code="body_too_large")
            parts.append(part)
    except ClientDisconnect:
        raise ApiError(400, "the connection ended before the body; send the whole body") from None
    return b"".join(parts)


class Fields:
    """The fields of a JSON object. A field with the value null counts as absent.

    Args:
        body: The object.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body

    @staticmethod
    async def read(request: Request, limit: int, empty: bytes = b"") -> "Fields":
        """Read the JSON object in the body of a request.

        Args:
            request: The request.
            limit: Largest size of the body in bytes.
            empty: Body that an empty body stands for.

        Raises:
            ApiError: The body is too large, or no JSON object.
        """
        try:
            data = await read_body(request, limit) or empty
            body = _parsed(data)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not valid JSON ({error}); send a JSON object in UTF-8") from None
        if not isinstance(body, dict):
            raise ApiError(400, f"the body is {_kind(body)}; send a JSON object")
        return Fields(body)

    def get(self, name: str) -> Any:
        """Return the value of a field, or None."""
        return self._body.get(name)

    def text(self, name: str, default: str | None = None) -> str | None:
        """Return a string."""
        words = "a string without lone surrogates" if isinstance(self.get(name), str) else "a string"
        return self._typed(name, default, words, lambda x: isinstance(x, str) and _is_unicode(x))

    def flag(self, name: str) -> bool:
        """Return true or false; false if the field is absent."""
        return self._typed(name, False, "true or false", lambda x: isinstance(x, bool))

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""
        words = f"a whole number from {low} to {high}"
        found = self._typed(name, default, words, lambda x: _is_whole(x) and low <= x <= high)
        return int(found)

    def number(self, name: str, default: float) -> float:
        """Return a number."""
        return float(self._typed(name, default, "a number", _is_number))

    def one_of(self, name: str, default: str, known: Collection[str]) -> str:
        """Return one of several strings."""
        return self._typed(name, default, f"one of {', '.join(known)}", lambda x: isinstance(x, str) and x in known)

    def ids(self, name: str) -> tuple[int, ...]:
        """Return a list of token ids; empty if the field is absent."""
        none: list[Any] = []
        found = self._typed(name, none, "a list of token ids", lambda x: isinstance(x, list) and _are_whole(x))
        return tuple(map(int, found))

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """Return the strings of a field that holds a string or a list of strings; empty if the field is absent."""
        found = self.get(name)
        found = [] if found is None else [found] if isinstance(found, str) else found
        if not (isinstance(found, list) and all(isinstance(x, str) and x and _is_unicode(x) for x in found)):
            self.refuse(name, "a string or a list of strings, none of them empty")
        if len(found) > most:
            raise ApiError(400, f"{name} has {len(found)} strings; give at most {most}", name)
        return tuple(found)

    def unsupported(self, name: str, harmless: Collection[Any] = ()) -> None:
        """Refuse a field that is not supported, unless the value changes nothing.

        Args:
            name: Name of the field.
            harmless: Values that change nothing.

        Raises:
            ApiError: The field has another value.
        """
        found = self.get(name)
        # In Python, True equals 1.
        is_same = (found == each and isinstance(found, bool) == isinstance(each, bool) for each in harmless)
        if found is not None and not any(is_same):
            raise ApiError(400, f"{name} is not supported; leave {name} out", name, "unsupported_parameter")

    def refuse(self, name: str, wanted: str) -> NoReturn:
        """Raise an ApiError about the value of a field."""
        raise ApiError(400, f"{name} is {_kind(self.get(name))}; it must be {wanted}", name)

    def _typed(self, name: str, default: Value, wanted: str, accepts: Callable[[Any], bool]) -> Value:
        found = self.get(name)
        if found is None:
            return default
        if not accepts(found):
            self.refuse(name, wanted)
        value: Value = found
        return value


def checked(name: str | None, build: Callable[[], Value]) -> Value:
    """Call a function of timemix whose InvalidValue concerns a field of a request.

    Args:
        name: Field that is wrong if the call fails; None: the first word of the message names the field.
        build: The call.

    Raises:
        ApiError: The call raised InvalidValue.
    """
    try:
        return build()
    except InvalidValue as error:
        first = str(error).split(" ", 1)[0]
        raise ApiError(400, str(error), name or (first if first.isidentifier() else None)) from None


def _parsed(data: bytes) -> Any:
    """Return the value of JSON. During a long body, the garbage collector would take two thirds of the time."""
    is_long = len(data) > LONG_BODY
    if is_long:
        gc.disable()
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    finally:
        if is_long:
            gc.enable()


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number of JSON")


def _is_whole(x: object) -> bool:
    return (isinstance(x, int) and not isinstance(x, bool)) or (isinstance(x, float) and x.is_integer())


def _are_whole(values: list[Any]) -> bool:
    # The usual case. A check of each number of a long prompt takes 20 times as long.
    return set(map(type, values)) <= {int} or all(map(_is_whole, values))


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300


def _is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    """Return a short description of a JSON value."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
