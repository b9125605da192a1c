"""Loss curves of runs in training, drawn again when new losses arrive."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from timemix.cli.terminal import own_command
from timemix.errors import MissingFile
from timemix.runs.folder import newest
from timemix.runs.listing import summarize
from timemix.storage.locks import is_held

SECONDS_BETWEEN_LOOKS = 1.0
"""Seconds between two looks at the files of the runs."""
LARGEST_SHARE = 0.1
"""Largest share of the time that drawing may take, so that the training does not become much slower."""


def follow(runs: Sequence[Path], out: Path, draw: Callable[[], None]) -> None:
    """Draw at once and after each new line of metrics.jsonl, until no process trains any of the runs.

    Print a sentence for each run that ends. Runs without losses are drawn from their first loss on.

    Args:
        runs: Run folders.
        out: The picture.
        draw: Function that draws the runs to `out`.

    Raises:
        MissingFile: A run folder does not exist, or was removed meanwhile.
        FileError: A file of a run is damaged, or the picture cannot be written.
    """
    for run in runs:
        if not (run / "config.toml").exists() and not is_held(run):
            # This call raises MissingFile, with the names of the runs nearby.
            newest(run)
    if any(map(is_held, runs)):
        print(f"{out} shows the newest losses; Ctrl-C ends the drawing, not the training", file=sys.stderr)
    ended: set[Path] = set()
    drawn, next_time, has_waited = None, 0.0, False
    while True:
        _refuse_removed(runs)
        # The locks are read before the losses, so the last picture has all losses of a run that ended.
        newly_ended = [run for run in dict.fromkeys(runs) if run not in ended and not is_held(run)]
        ended.update(newly_ended)
        sizes = [_size(run / "metrics.jsonl") for run in runs]
        is_last = len(ended) == len(set(runs))
        if sizes != drawn and (is_last or time.monotonic() >= next_time):
            began = time.monotonic()
            try:
                draw()
                drawn = sizes
            except MissingFile as error:
                if is_last:
                    raise
                if not has_waited:
                    print(f"{_reason(error)}; waiting for the first losses", file=sys.stderr)
                has_waited = True
            next_time = time.monotonic() + (time.monotonic() - began) / LARGEST_SHARE
        for run in newly_ended:
            print(_end(run), file=sys.stderr)
        if is_last:
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _refuse_removed(runs: Sequence[Path]) -> None:
    left = [run for run in runs if (run / "config.toml").exists() or is_held(run)]
    if removed := [run for run in runs if run not in left]:
        way = f"draw the others with: {own_command()} plot {shlex.join(map(str, left))} --follow"
        raise MissingFile(f"{removed[0]} was removed meanwhile; {way if left else 'name another run'}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _reason(error: MissingFile) -> str:
    return str(error).partition(";")[0]


def _end(run: Path) -> str:
    """Return the sentence about a run that no process trains."""
    summary = summarize(run)
    if summary.state == "damaged":
        return f"{run} is damaged: {summary.error}"
    if summary.state == "complete":
        return f"{run} is complete: {summary.step} steps"
    return (
        f"{run} is stopped at step {summary.step} of {summary.steps}, and no process trains it; resume it with:"
        f" {own_command()} train --resume {shlex.quote(str(run))}"
    )
