"""Progress of reading: a bar on a terminal, otherwise a line from time to time."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

ShowProgress = Callable[[str], None] | bool
"""True: a bar, or lines, on stderr. A function: it is called with a line of text from time to time. False: nothing."""

Advance = Callable[[int], object]
"""A function to call with the number of bytes done so far."""


QUIET_SECONDS = 1.0
"""Seconds of reading before progress is shown."""


def untold(done: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def passing(progress: ShowProgress, what: str, total: int) -> Iterator[Advance]:
    """Show the progress of reading a text once it takes longer than QUIET_SECONDS.

    Args:
        progress: Where to show it.
        what: What is read, in a few words.
        total: Size in bytes.

    Yields:
        A function to call with the number of bytes done so far.
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
    """Show the progress of reading.

    Args:
        progress: Where to show it.
        what: What is read, in a few words.
        have: Number of bytes done already.
        total: Size in bytes; None if unknown.

    Yields:
        A function to call with the number of bytes done so far.
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
    """Show a line of text: on stderr, by a function, or not at all, as `progress` specifies."""
    if progress is True:
        _print(line)
    elif progress is not False:
        progress(line)


def _print(line: str) -> None:
    # A closed stderr is None in Python, and printing to one without a reader fails. Neither stops the reading.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _lines(write: Callable[[str], None], what: str, total: int | None) -> Advance:
    """Write a line at the start, then one for each tenth of the file, or for each 10 MB if its size is unknown."""
    step = max(1, (total or 100_000_000) // 10)
    of = f" of {total / 1e6:.1f}" if total else ""
    newest = -1

    def advance(have: int) -> None:
        nonlocal newest
        if have // step > newest:
            newest = have // step
            write(f"{what}: {have / 1e6:.1f}{of} MB")

    return advance
