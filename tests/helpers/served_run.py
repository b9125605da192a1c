"""`timemix serve` in a process of its own, which starts in little time: a fork server has imported torch already."""

import contextlib
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import timemix.server.app  # noqa: F401 (the fork server imports it)
from tests.helpers.serving import Running
from timemix.cli.main import main
from timemix.generation.engine import Engine


@dataclass
class ServedRun:
    """A process of `timemix serve`.

    Args:
        process: The process.
        log: File with its output and its messages.
        http: Calls of its API.
    """

    process: BaseProcess
    log: Path
    http: Running

    def status(self, seconds: float = 20) -> int | None:
        """Wait for the end of the process; return its exit status, or None if it still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text()


@contextlib.contextmanager
def served_run(run: Path, log: Path, *options: str, fails_after: int | None = None) -> Iterator[ServedRun]:
    """Run `timemix serve` for a run, on a free port.

    Args:
        run: Run folder.
        log: File for its output.
        options: Further options.
        fails_after: Number of steps of the engine after which a step raises an error; None: no step does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    words = ["serve", str(run), "--port", "0", *options]
    process = context.Process(target=_serve, args=(words, log, fails_after))
    process.start()
    try:
        yield ServedRun(process, log, Running(_url(process, log), [], None))
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _url(process: BaseProcess, log: Path) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.is_alive():
        if log.exists() and (found := re.search(r"serving at (http://\S+)/ ", log.read_text())):
            return found[1]
        time.sleep(0.01)
    raise AssertionError(log.read_text() if log.exists() else "the server did not start")


def _serve(words: list[str], log: Path, fails_after: int | None) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if fails_after is not None:
        _break(fails_after)
    main(words)


def _break(steps: int) -> None:
    step, count = Engine.step, 0

    def counted(engine: Engine) -> object:
        nonlocal count
        count += 1
        if count > steps:
            raise RuntimeError("the memory is broken")
        return step(engine)

    Engine.step = counted  # type: ignore[method-assign, assignment]
