"""The same function on many things, in processes of their own."""

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

import psutil

MOST_PROCESSES = 16

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""A `map`: results come in order, and things are taken only as they are needed."""


def cores() -> int:
    """Return the number of processors that this process may use."""
    if sys.platform == "darwin":
        # macOS binds no process to processors.
        return psutil.cpu_count() or 1
    return len(psutil.Process().cpu_affinity())


Result = TypeVar("Result")


def interruptible(work: Callable[[], Result]) -> Result:
    """Call a function of compiled code that ignores Ctrl-C, and return its result; Ctrl-C ends the wait for it.

    It runs in a thread. After Ctrl-C the thread runs until the function returns or the process ends.
    """
    done: Future[Result] = Future()

    def call() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return done.result()


@contextlib.contextmanager
def in_processes(count: int, begin: Callable[..., object], *arguments: object) -> Iterator[Each]:
    """Gives a `map` that works in `count` new processes, each of which first calls begin(*arguments).

    At most twice as many things as there are processes are under way. The processes leave Ctrl-C to this one, and end
    with it however it ends. Raises BrokenProcessPool where one of them dies.

    They are spawned: a script that calls this has its own work under `if __name__ == "__main__"`.
    """
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(count, spawn, initializer=_begin, initargs=(begin, arguments))

    def each(function: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[Any]:
        waiting: collections.deque[Future[Any]] = collections.deque()
        for thing in things:
            with _without_interrupts():
                waiting.append(executor.submit(function, thing))
            if len(waiting) == 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield each
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Holds Ctrl-C back; processes that begin meanwhile never see it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(begin: Callable[..., object], arguments: tuple[object, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
