"""Display of reading progress, as a bar on a terminal, otherwise as a line from time to time."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

ShowProgress = Callable[[str], None] | bool
"""Destination of progress: True for a bar or lines on stderr, False for none, or a function that receives each line."""

Advance = Callable[[int], object]
"""A function that the caller calls with the number of bytes read so far."""


QUIET_SECONDS = 1.0
"""Number of seconds of reading before progress is shown."""


def untold(done: int) -> None:
    """Do nothing with the number of bytes read so far."""


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds, such as 3:36, or as hours, minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


@contextlib.contextmanager
def passing(progress: ShowProgress, what: str, total: int) -> Iterator[Advance]:
    """After QUIET_SECONDS, show the progress of reading a text.

    Args:
        progress: Destination of the progress.
        what: Short description of the text that is read.
        total: Size of the text in bytes.

    Yields:
        A function that the caller calls with the number of bytes read so far.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        shown: Advance | None = None

        def advance(done: int) -> None:
            nonlocal shown
            if shown is None and time.monotonic() - began > QUIET_SECONDS:
                shown = stack.enter_context(meter(progress, what, done, total))
            if shown is not None:
                shown(done)

        yield advance


@contextlib.contextmanager
def meter(progress: ShowProgress, what: str, have: int, total: int | None) -> Iterator[Advance]:
    """Show the progress of reading a text.

    Args:
        progress: Destination of the progress.
        what: Short description of the text that is read.
        have: Number of bytes that have been read already.
        total: Size of the text in bytes; None if unknown.

    Yields:
        A function that the caller calls with the number of bytes read so far.
    """
    if progress is False:
        yield untold
    elif progress is True and sys.stderr is not None and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        columns = [BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        with Bars(*columns, console=Console(stderr=True)) as bars:
            bars.print(what)
            task = bars.add_task("", total=total, completed=have)
            yield lambda have: bars.update(task, completed=have)
    else:
        yield _lines(_print if progress is True else progress, what, total)


def show(progress: ShowProgress, line: str) -> None:
    """Print a line of text to stderr, pass it to a function, or do nothing, as `progress` specifies."""
    if progress is True:
        _print(line)
    elif progress is not False:
        progress(line)


def _print(line: str) -> None:
    # In Python, a closed stderr is None. Printing to a stderr without a reader fails. Reading continues without a
    # working stderr.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _lines(write: Callable[[str], None], what: str, total: int | None) -> Advance:
    """Write a line at the start and after each tenth of the text, or after each 10 MB if the size is unknown."""
    step = max(1, (total or 100_000_000) // 10)
    of = f" of {total / 1e6:.1f}" if total else ""
    newest = -1

    def advance(have: int) -> None:
        nonlocal newest
        if have // step > newest:
            newest = have // step
            write(f"{what}: {have / 1e6:.1f}{of} MB")

    return advance
