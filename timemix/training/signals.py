"""Signals that stop a run after its current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timemix.errors import ProcessLost

# Windows has no SIGHUP.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals of Ctrl-C, of a scheduler that ends a job, and of a terminal or connection that closes."""


@contextmanager
def collected_signals(received: list[int], *, escalate: bool) -> Iterator[None]:
    """Collect stop signals in a list during the `with` block, so that they do not end the process.

    Signals that the process ignores stay ignored, as `nohup` requires. Under torchrun one Ctrl-C arrives twice:
    from the terminal and from torchrun. torchrun itself kills a process that does not end.

    Args:
        received: List that is emptied, and then filled with the numbers of the signals.
        escalate: Whether a second signal has its usual effect, such as KeyboardInterrupt.
    """
    received.clear()
    old: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        # A closing terminal sends SIGHUP twice: directly and through its shell.
        if escalate and number != getattr(signal, "SIGHUP", None):
            for each, handler in old.items():
                signal.signal(each, handler)

    try:
        for each in STOP_SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:
                old[each] = signal.signal(each, note)
    except ValueError:
        pass  # Only the main thread may set signal handlers, so signals keep their effect in other threads.
    try:
        yield
    except ProcessLost:
        # After ProcessLost, torchrun ends all processes with SIGTERM. The handlers stay, so that this process reports
        # its error first.
        old.clear()
        raise
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


@contextmanager
def signals_raised() -> Iterator[None]:
    """Raise SystemExit for stop signals during the `with` block, so that `finally` clauses remove unfinished files.

    Only signals that would otherwise end the process at once get a new handler.
    """

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    taken = []
    try:
        for each in STOP_SIGNALS:
            if signal.getsignal(each) is signal.SIG_DFL:
                signal.signal(each, leave)
                taken.append(each)
    except ValueError:
        pass  # Only the main thread may set signal handlers.
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
