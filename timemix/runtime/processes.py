"""A parallel `map` in worker processes, and calls that Ctrl-C can interrupt."""

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
"""A `map` that yields results in the order of the items, and takes the next item only when needed."""


def cores() -> int:
    """Return the number of processors that this process may use."""
    if sys.platform == "darwin":
        # macOS does not restrict a process to some processors.
        return psutil.cpu_count() or 1
    return len(psutil.Process().cpu_affinity())


Result = TypeVar("Result")


def interruptible(work: Callable[[], Result]) -> Result:
    """Call a function that ignores Ctrl-C, such as compiled code, so that Ctrl-C ends the wait for its result.

    The function runs in a thread. After Ctrl-C, the thread runs until the function returns or the process ends.

    Args:
        work: The function.

    Returns:
        The result of the function.
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
    """Provide a `map` that runs in new worker processes, for a `with` block.

    At most 2 * `count` items are submitted at a time. The workers ignore Ctrl-C, because this process handles Ctrl-C.
    The workers end when this process ends, even if this process is killed. The workers are spawned, so a script that
    calls this function needs `if __name__ == "__main__"`.

    Args:
        count: Number of worker processes.
        begin: Function that each worker process calls first.
        *arguments: Arguments of `begin`.

    Yields:
        The `map`, which raises BrokenProcessPool if a worker process dies.
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
    """Block Ctrl-C in a `with` block. Processes that start in the block ignore Ctrl-C until they end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(begin: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Call `begin` in a new worker process, and make the worker end when its parent ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    """Wait for the end of the parent process, then end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
