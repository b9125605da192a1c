"""How far reading has come: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

ShowProgress = Callable[[str], None] | bool
"""True shows a bar on stderr; a function gets a line of text now and then; False is quiet."""

Advance = Callable[[int], object]
"""Called with the bytes done so far."""


QUIET_SECONDS = 1.0
"""A reading of a text that takes no longer shows nothing."""


def untold(done: int) -> None:
    pass


@contextlib.contextmanager
def passing(progress: ShowProgress, what: str, total: int) -> Iterator[Advance]:
    """Shows how far a reading of a text has come, where it takes longer than a moment."""
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
    """Give a function to call with the bytes done so far."""
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
    """Show a line of text as `progress` says."""
    if progress is True:
        _print(line)
    elif progress is not False:
        progress(line)


def _print(line: str) -> None:
    # A closed stderr is None in Python, and one without a reader fails. Neither stops the reading.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _lines(write: Callable[[str], None], what: str, total: int | None) -> Advance:
    """A line at the start, then one for each tenth of the file (each 10 MB where its size is not known)."""
    step = max(1, (total or 100_000_000) // 10)
    of = f" of {total / 1e6:.1f}" if total else ""
    newest = -1

    def advance(have: int) -> None:
        nonlocal newest
        if have // step > newest:
            newest = have // step
            write(f"{what}: {have / 1e6:.1f}{of} MB")

    return advance
