"""Signals that stop a run after its step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timemix.errors import ProcessLost

# Windows has no SIGHUP.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, a scheduler that ends a job, and a terminal or connection that closes."""


@contextmanager
def collected_signals(received: list[int], *, escalate: bool) -> Iterator[None]:
    """Collects signals that stop a run in `received`, not to die of them; to `escalate`, a second one acts as usual.

    A signal that the process ignores stays ignored, as `nohup` wants it. Under torchrun one Ctrl-C comes twice, from
    the terminal and from torchrun, which ends by itself what does not end.
    """
    received.clear()
    old: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        # A terminal that closes sends SIGHUP twice, itself and through its shell.
        if escalate and number != getattr(signal, "SIGHUP", None):
            for each, handler in old.items():
                signal.signal(each, handler)

    try:
        for each in STOP_SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:
                old[each] = signal.signal(each, note)
    except ValueError:
        pass  # Only the main thread may take signals; elsewhere they are not ours.
    try:
        yield
    except ProcessLost:
        # torchrun then ends the others too, with SIGTERM; this one has something to say first.
        old.clear()
        raise
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)


@contextmanager
def signals_raised() -> Iterator[None]:
    """Raise SystemExit for a signal that would end the process at once, so that what was begun is tidied up."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    taken = []
    try:
        for each in STOP_SIGNALS:
            if signal.getsignal(each) is signal.SIG_DFL:
                signal.signal(each, leave)
                taken.append(each)
    except ValueError:
        pass  # As above.
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)
