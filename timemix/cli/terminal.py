"""The terminal of the command line: safe streams, and help that fits the width."""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

LEAST_COLUMNS = 40
"""Smallest width of tyro's help in columns. At 4 columns or fewer, tyro never finishes."""

WIDE = 10_000
"""A width in columns at which no line is wrapped."""


def prepare_streams() -> None:
    """Make printing safe on streams of every kind.

    A character outside the encoding is printed as its escape, such as `\\u03a9`. A closed stream discards its text.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _open_closed_streams() -> None:
    # Occupy the file descriptors 0 to 2: otherwise a file that is opened later becomes the stdout of C code.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


class LastingStream:
    """A text stream that discards its text after a full disk, a closed pipe or a closed terminal."""

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
        """Discard the buffered text and all later text."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let the block continue after a write error on stdout or stderr, because its result is a folder."""
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
    """Return a text with its control characters escaped: a terminal would execute them."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


@contextlib.contextmanager
def readable_help(columns: int | None = None) -> Iterator[None]:
    """Set the width at which tyro prints, and turn its colours off if NO_COLOR is set.

    tyro reads the width and the colours from environment variables. The end of the block restores these variables.

    Args:
        columns: Width in columns. Default: the width of the terminal, at least `LEAST_COLUMNS`.
    """
    wanted = {"COLUMNS": str(columns or max(LEAST_COLUMNS, shutil.get_terminal_size().columns))}
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


class Captured(io.StringIO):
    """A replacement of stdout, with the properties from which tyro chooses colours and box characters.

    Args:
        is_terminal: Whether tyro uses colours.
        encoding: Encoding that tyro sees. tyro draws boxes with Unicode lines for "utf-8", and with ASCII lines for
            other encodings.
    """

    def __init__(self, *, is_terminal: bool, encoding: str) -> None:
        super().__init__()
        self._is_terminal, self._encoding = is_terminal, encoding

    def isatty(self) -> bool:
        return self._is_terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def wrapped(text: str) -> str:
    """Return the help of tyro with its long lines wrapped: tyro prints each paragraph of a description on one line."""
    width = max(LEAST_COLUMNS, shutil.get_terminal_size().columns)
    lines = [
        textwrap.fill(line, width, break_on_hyphens=False) if len(without_colors(line)) > width else line.rstrip()
        for line in text.splitlines()
    ]
    # tyro prints two blank lines before a list.
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def without_colors(text: str) -> str:
    """Return a text without the escape sequences of colours and weights."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def own_command() -> str:
    """Return the command that starts this timemix: `timemix` if PATH leads to it, otherwise a command with a path."""
    found, script = shutil.which("timemix"), Path(sys.argv[0])
    if script.parts[-2:] == ("timemix", "__main__.py"):
        # The process was started by `python -m timemix`.
        is_found = found is not None and Path(found).parent == Path(sys.executable).parent
        return "timemix" if is_found else shlex.join([sys.executable, "-m", "timemix"])
    if script.stem != "timemix" or (found is not None and script.exists() and script.samefile(found)):
        return "timemix"
    return shlex.quote(sys.argv[0])


def discard_output() -> None:
    """Connect stdout to the null device, so that the flush at exit cannot fail again."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_process(status: int) -> NoReturn:
    """Exit with this status. If torchrun started this process, end at once, without the finalization of Python.

    A thread of gloo that deletes a tensor waits for the global interpreter lock. If Python finalizes at this moment,
    the process aborts (SIGABRT) after its work is done. Caches of torch keep the process groups, and a process group
    keeps its threads, until Python has ended.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)
