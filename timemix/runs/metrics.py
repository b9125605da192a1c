"""What a run writes down about itself: metrics.jsonl, and wherever else its lines should go."""

import json
import math
import os
from pathlib import Path
from typing import Any

from timemix.errors import CannotWrite, DamagedFile, MissingFile
from timemix.storage.files import atomic_file, cannot_write, read_lines
from timemix.storage.json_files import is_number

Line = dict[str, Any]


class Metrics:
    """metrics.jsonl of a run: a line of JSON for each logged step, in order, no step twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[Line] = []

    def cut(self, step: int) -> None:
        """Removes what comes after a step, and lines that are no such line."""
        if not self.path.exists() or all(_step_of(line) <= step for line in read_lines(self.path)):
            return
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            file.writelines(line for line in read_lines(self.path) if _step_of(line) <= step)

    def write(self, line: Line) -> None:
        """Appends a line, after those that could not be written before.

        Raises CannotWrite, and keeps the line for the next call, when the disk is full.
        """
        self._unwritten.append(line)
        raw = "".join(json.dumps(each) + "\n" for each in self._unwritten).encode()
        try:
            # Unbuffered: what a full disk refuses must not be tried again on closing.
            with self.path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(raw) != len(raw):
                    file.truncate(end)
                    raise OSError(28, os.strerror(28))
        except OSError as error:
            raise CannotWrite(cannot_write(self.path, error)) from error
        self._unwritten = []


def _step_of(line: bytes) -> float:
    """Step of a whole line, infinite for anything else."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if is_number(step) and line.endswith(b"\n") else math.inf


LARGEST_METRICS = 64 * 2**20
"""Bytes of metrics.jsonl at most, a quarter of a million lines: what it holds takes up to 15 times as much memory."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl, oldest first: step, tokens, seconds, loss and valid_loss (nats per
    token), and whatever else was logged. A last line cut short by a kill is skipped.

    Raises FileError where the folder or the file is missing, or another line is not a JSON object.
    """
    if not run.is_dir():
        raise MissingFile(f"there is no run folder {run}; name the folder of a run")
    path = run / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    damaged: int | None = None
    for number, line in enumerate(read_lines(path, LARGEST_METRICS), 1):
        if damaged is not None:
            raise DamagedFile(f"line {damaged} of {path} is not a JSON object; remove or repair it")
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            damaged = number
            continue
        rows.append(row)
    return rows
