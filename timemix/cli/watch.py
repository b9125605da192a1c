"""What a person sees while a model trains: a live bar on a terminal, plain lines elsewhere, and no reason to stop."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from timemix.training.progress import TrainingProgress, Watch

SECONDS_BETWEEN_LINES = 10.0

WIDTH_OF_BAR = 20
"""Columns that a bar needs beside its numbers to be worth them."""


class LastingStream:
    """A text stream that outlives its reader: what a full disk, a closed pipe or terminal refuses is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._discard()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        """Send what the stream still holds, and all that follows, nowhere."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let the block outlive stdout and stderr: what they refuse is dropped. For programs whose result is a folder."""
    with contextlib.ExitStack() as stack:
        for name, redirect in (("stdout", contextlib.redirect_stdout), ("stderr", contextlib.redirect_stderr)):
            stream = getattr(sys, name)
            # Python has no stream where its descriptor was closed.
            held = stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            lasting = LastingStream(held)
            stack.callback(lasting.flush)
            stack.enter_context(redirect(cast(TextIO, lasting)))
        yield


@contextlib.contextmanager
def watching(first_step: int, steps: int, *, quiet: bool = False) -> "Iterator[Watch]":
    """Gives the function that `Trainer.run` calls after each step."""
    if quiet:
        yield lambda progress: None
    elif sys.stderr.isatty():
        with _bar(first_step, steps) as watch:
            yield watch
    else:
        yield _lines()


def _lines() -> "Watch":
    newest = -SECONDS_BETWEEN_LINES

    def watch(progress: "TrainingProgress") -> None:
        nonlocal newest
        if progress.sample is not None:
            print(sample_words(progress), file=sys.stderr, flush=True)
        now = time.monotonic()
        if now - newest < SECONDS_BETWEEN_LINES and progress.step < progress.steps:
            return
        newest = now
        print(progress_line(progress), file=sys.stderr, flush=True)

    return watch


@contextlib.contextmanager
def _bar(first_step: int, steps: int) -> "Iterator[Watch]":
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns: list[str | ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    if console.width >= len(f"step {steps}/{steps}") + WIDTH_OF_BAR + 60:
        columns.append(BarColumn(bar_width=None))
    with Bars(*columns, console=console) as bars:
        task = bars.add_task(f"step {first_step}/{steps}", total=steps, completed=first_step)

        def watch(progress: "TrainingProgress") -> None:
            if progress.sample is not None:
                bars.console.print(sample_words(progress), markup=False, highlight=False)
            room = console.width - (WIDTH_OF_BAR if len(columns) > 1 else 0)
            bars.update(task, completed=progress.step, description=progress_line(progress, room))

        yield watch


def progress_line(progress: "TrainingProgress", width: int | None = None) -> str:
    """Return one line of numbers; where `width` columns are too few, without the least important ones and labels."""
    step, loss = f"{progress.step}/{progress.steps}", f"{progress.loss:.3f}"
    valid = "-" if progress.valid_loss is None else f"{progress.valid_loss:.3f} at {progress.valid_step}"
    left = _minutes(_seconds_left(progress))
    named = [f"step {step}", f"loss {loss}", f"valid {valid}"]
    forms = [
        [*named, f"{progress.tokens_per_second:,.0f} tokens/s", f"{left} left"],
        [*named, f"{left} left"],
        [*named[:2], f"{left} left"],
        [step, loss, left],
        [step, loss],
        [loss],
    ]
    lines = ["  ".join(form) for form in forms]
    return next((line for line in lines if width is None or len(line) <= width), lines[-1])


def sample_words(progress: "TrainingProgress") -> str:
    """Return the sample of a step under a line that names the step."""
    return f"--- step {progress.step}\n{shown(progress.sample or '')}\n"


def shown(text: str) -> str:
    """Return a generated text with its control characters escaped, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _seconds_left(progress: "TrainingProgress") -> float:
    tokens_left = progress.tokens / progress.step * (progress.steps - progress.step)
    return tokens_left / progress.tokens_per_second


def _minutes(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
