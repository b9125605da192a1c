"""The progress of a training run: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from timemix.cli.terminal import escaped
from timemix.runtime.progress import clock

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from timemix.training.progress import Sample, TrainingProgress, Watch

SECONDS_BETWEEN_LINES = 10.0

WIDTH_OF_BAR = 20
"""Smallest useful width of the bar beside its numbers, in columns."""


@contextlib.contextmanager
def watching(first_step: int, steps: int, *, quiet: bool = False) -> "Iterator[Watch]":
    """Yield the function that `Trainer.run` calls after each step.

    Args:
        first_step: Number of steps that are already done.
        steps: Number of steps of the whole run.
        quiet: Whether to show nothing.
    """
    if quiet:
        yield lambda progress: None
    elif sys.stderr.isatty():
        with _bar(first_step, steps) as watch:
            yield watch
    else:
        yield _lines()


def _lines() -> "Watch":
    newest, last_step = -SECONDS_BETWEEN_LINES, -1

    def watch(progress: "TrainingProgress") -> None:
        nonlocal newest, last_step
        for sample in progress.samples:
            print(sample_words(sample), file=sys.stderr, flush=True)
        # The samples at the end of a run come with a second call for the last step.
        if progress.step == last_step:
            return
        last_step = progress.step
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
            for sample in progress.samples:
                bars.console.print(sample_words(sample), markup=False, highlight=False)
            room = console.width - (WIDTH_OF_BAR if len(columns) > 1 else 0)
            bars.update(task, completed=progress.step, description=progress_line(progress, room))

        yield watch


def progress_line(progress: "TrainingProgress", width: int | None = None) -> str:
    """Return one line of numbers; a line over `width` columns loses the least important numbers and labels."""
    step, loss = f"{progress.step}/{progress.steps}", f"{progress.loss:.3f}"
    valid = "-" if progress.valid_loss is None else f"{progress.valid_loss:.3f} at {progress.valid_step}"
    left = clock(_seconds_left(progress))
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


def sample_words(sample: "Sample") -> str:
    """Return a sample below a line with its step and prompt."""
    return f"{escaped(sample.heading)}\n{escaped(sample.text)}\n"


def _seconds_left(progress: "TrainingProgress") -> float:
    tokens_left = progress.tokens / progress.step * (progress.steps - progress.step)
    return tokens_left / progress.tokens_per_second
