"""The terminal of the command line: streams that can always be printed to, and help that fits its width."""

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator

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
