"""The terminal of the command line: streams that take any text and outlive their reader, help that fits the width."""

import contextlib
import io
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO, cast

LEAST_COLUMNS = 40
"""Below this width tyro's help has no room for words; at 4 columns or less it never ends."""


def prepare_streams() -> None:
    """Make printing safe whatever the streams are.

    A character outside the encoding is printed as its escape, such as `\\u03a9`. A closed stream discards its text.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _open_closed_streams() -> None:
    # The lowest free numbers: a file that is opened later must not become the stdout of C code.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


class LastingStream:
    """A text stream that outlives its reader: what a full disk, a closed pipe or terminal refuses is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._discard()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        """Send what the stream still holds, and all that follows, nowhere."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let the block outlive stdout and stderr: what they refuse is dropped. For programs whose result is a folder."""
    streams = LastingStream(sys.stdout), LastingStream(sys.stderr)
    with (
        contextlib.redirect_stdout(cast(TextIO, streams[0])),
        contextlib.redirect_stderr(cast(TextIO, streams[1])),
    ):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()


def escaped(text: str) -> str:
    """Return a text with its control characters escaped, which a terminal would obey."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


@contextlib.contextmanager
def readable_help() -> Iterator[None]:
    """Have tyro print at `LEAST_COLUMNS` or more, and without colours if NO_COLOR is set.

    tyro asks the environment; it is restored at the end.
    """
    wanted = {"COLUMNS": str(max(LEAST_COLUMNS, shutil.get_terminal_size().columns))}
    if os.environ.get("NO_COLOR"):
        wanted["TERM"] = "dumb"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def without_colors(text: str) -> str:
    """Return a text without the escape sequences of colours and weights."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def discard_output() -> None:
    """Point stdout at nothing, so that the flush at exit cannot fail again."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
