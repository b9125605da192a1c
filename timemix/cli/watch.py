"""What a person sees while a model trains: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timemix.training.trainer import TrainingProgress, Watch

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def watching(first_step: int, steps: int) -> "Iterator[Watch]":
    """Gives the function that `Trainer.run` calls after each step."""
    if sys.stderr.isatty():
        with _bar(first_step, steps) as watch:
            yield watch
    else:
        yield _lines()


def _lines() -> "Watch":
    newest = -SECONDS_BETWEEN_LINES

    def watch(progress: "TrainingProgress") -> None:
        nonlocal newest
        now = time.monotonic()
        if now - newest < SECONDS_BETWEEN_LINES and progress.step < progress.steps:
            return
        newest = now
        # Whoever read the lines may have gone; the training goes on.
        with contextlib.suppress(BrokenPipeError):
            print(
                f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}"
                f"  valid {_loss(progress.valid_loss)}  {progress.tokens_per_second:,.0f} tokens/s"
                f"  {_minutes(_seconds_left(progress))} left",
                file=sys.stderr,
                flush=True,
            )

    return watch


@contextlib.contextmanager
def _bar(first_step: int, steps: int) -> "Iterator[Watch]":
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = [
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TextColumn("loss {task.fields[loss]}  valid {task.fields[valid]}  {task.fields[speed]} tokens/s"),
        TextColumn("{task.fields[left]} left"),
    ]
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=steps, completed=first_step, loss="-", valid="-", speed="-", left="-")

        def watch(progress: "TrainingProgress") -> None:
            bars.update(
                task,
                completed=progress.step,
                loss=f"{progress.loss:.3f}",
                valid=_loss(progress.valid_loss),
                speed=f"{progress.tokens_per_second:,.0f}",
                left=_minutes(_seconds_left(progress)),
            )

        yield watch


def _seconds_left(progress: "TrainingProgress") -> float:
    tokens_left = progress.tokens / progress.step * (progress.steps - progress.step)
    return tokens_left / progress.tokens_per_second


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _minutes(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
