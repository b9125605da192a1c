"""Writing and reading of the file metrics.jsonl of a run."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timemix.errors import DamagedFile, FileError
from timemix.runs.folder import newest
from timemix.storage.files import append, atomic_file, cannot_read, check_regular, read_lines
from timemix.storage.json_files import is_number

Line = dict[str, Any]
"""A line of metrics.jsonl, with the step and other values by name."""


class Metrics:
    """Writer of metrics.jsonl, with one JSON object for each logged step, in the order of the steps.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[Line] = []

    def cut(self, step: int) -> None:
        """Remove all lines after a step, and all lines that are not a JSON object with a step."""
        if not self.path.exists() or all(_step_of(line) <= step for line in read_lines(self.path)):
            return
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            file.writelines(line for line in read_lines(self.path) if _step_of(line) <= step)

    def write(self, line: Line) -> None:
        """Append the lines that earlier calls could not write, and then this line.

        Raises:
            CannotWrite: The disk is full or not writable. The next call of `write` tries to append the line again.
        """
        self._unwritten.append(line)
        append(self.path, "".join(json.dumps(each) + "\n" for each in self._unwritten).encode())
        self._unwritten = []


def _step_of(line: bytes) -> float:
    """Return the step of a complete line, or infinity if the line is incomplete or has no step."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if is_number(step) and line.endswith(b"\n") else math.inf


LARGEST_METRICS = 64 * 2**20
"""Number of bytes of metrics.jsonl that are read, about 250,000 lines. Parsed lines take up to 15x the memory of the
file."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl of a run, oldest first.

    Every line has a step. Most lines also have tokens, seconds, and loss or valid_loss in nats per token. If a killed
    process left an incomplete last line, `read_metrics` skips this line.

    Args:
        run: Run folder.

    Raises:
        MissingFile: The folder or the file does not exist.
        FileError: The file has more than LARGEST_METRICS bytes.
        DamagedFile: A line before the last line is not a JSON object.
    """
    path = run / "metrics.jsonl"
    if not (path.exists() or (run / "config.toml").exists()):
        # This call raises MissingFile, with the names of the runs nearby.
        newest(run)
    check_regular(path)
    if (size := path.stat().st_size) > LARGEST_METRICS:
        raise FileError(
            f"{path} has {size:,} bytes, and timemix reads at most {LARGEST_METRICS:,}; remove some of its lines, and"
            " set a larger train.log_every"
        )
    rows: list[dict[str, Any]] = []
    damaged: int | None = None
    for number, line in enumerate(read_lines(path), 1):
        if damaged is not None:
            raise DamagedFile(f"line {damaged} of {path} is not a JSON object; repair or remove the line")
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            damaged = number
            continue
        rows.append(row)
    return rows


TAIL = 64 * 2**10
"""Number of bytes at the end of metrics.jsonl that `newest_numbers` reads first, about 250 lines."""


def newest_numbers(run: Path, names: Sequence[str]) -> dict[str, float | None]:
    """Return the newest number of each name in metrics.jsonl, None if no line has the name.

    The file is read from its end, only as far as needed, and at most LARGEST_METRICS bytes. `read_metrics` reads all
    lines.

    Args:
        run: Run folder.
        names: Names of numbers, such as "valid_loss".

    Raises:
        MissingFile: The folder or the file does not exist.
        DamagedFile: A line in the part that was read is not a JSON object, except an incomplete last line.
    """
    path, size = run / "metrics.jsonl", TAIL
    check_regular(path)
    while True:
        rows, is_whole = _last_rows(path, size)
        if rows is None:
            # The whole file is read again, because the error message names the number of the damaged line.
            rows, is_whole = read_metrics(run), True
        found = {name: next((row[name] for row in reversed(rows) if is_number(row.get(name))), None) for name in names}
        if is_whole or None not in found.values() or size == LARGEST_METRICS:
            return found
        size = min(8 * size, LARGEST_METRICS)


def _last_rows(path: Path, size: int) -> tuple[list[Line] | None, bool]:
    """Return the lines in the last `size` bytes, None if a line is damaged, and whether these are all lines."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(start)
            lines = file.read(size).splitlines(keepends=True)
    except OSError as error:
        raise FileError(cannot_read(path, error)) from error
    rows: list[Line] = []
    for number, line in enumerate(lines):
        if number == 0 and start:
            # This line may begin before the part that was read.
            continue
        try:
            row = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines) - 1:
            return None, False
    return rows, start == 0
