"""Signals that stop a run after its step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timemix.errors import ProcessLost

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def collected_signals(received: list[int], *, escalate: bool) -> Iterator[None]:
    """Collects SIGINT and SIGTERM in `received` instead of dying of them; to `escalate`, a second one acts as usual.

    Under torchrun one Ctrl-C comes twice, from the terminal and from torchrun, which ends by itself what does not end.
    """
    received.clear()
    old: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if escalate:
            for each, handler in old.items():
                signal.signal(each, handler)

    try:
        for each in STOP_SIGNALS:
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
