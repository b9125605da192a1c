"""What a run writes down about itself: metrics.jsonl, and wherever else its lines should go."""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from timemix.errors import UserError
from timemix.storage.files import CannotWrite, atomic_file, cannot_write, read_lines
from timemix.storage.json_files import is_number

Line = dict[str, Any]
Hook = Callable[[Line], object]
"""Gets each line of metrics.jsonl when it is written. That is all a tracking service needs:
`trainer.run(hook=lambda line: wandb.log(line, step=line["step"]))`."""


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


class SpikeWatch:
    """Tells losses far above those before, by their exponential mean and deviation over about 100 steps.

    `state`: mean, variance and number of losses seen, to go on from after a stop.
    """

    DECAY = 0.99
    WARM_UP = 50

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self.state = [0.0, 0.0, 0]

    def __call__(self, loss: float) -> str | None:
        """A sentence's end that tells of a spike, None where this loss is none. A report needs 50 losses before it."""
        mean, variance, seen = self.state
        deviation = math.sqrt(variance)
        highest = mean + self._deviations * deviation
        spike = self._deviations > 0 and seen >= self.WARM_UP and loss > highest
        # A spike counts as the highest usual loss, so that a lasting rise is told a few times, not for ever.
        usual = highest if spike else loss
        weight = max(1 - self.DECAY, 1 / (seen + 1))
        self.state = [
            mean + weight * (usual - mean),
            (1 - weight) * (variance + weight * (usual - mean) ** 2),
            seen + 1,
        ]
        return f"the loss is {loss:.3f}, after {mean:.3f} ± {deviation:.3f} in the steps before" if spike else None


def peak_memory(device: torch.device) -> int | None:
    """Most memory of this process so far in bytes: allocated on a GPU, else resident; None where no one tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load_hook(name: str) -> Hook:
    """The function that "module:function" names. Raises UserError where there is none."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(f"--hook {name}: {error}; name a function as module:function") from None
    if not callable(found):
        raise UserError(f"--hook {name}: it is no function; name one as module:function")
    return found


def tensorboard(folder: Path, step: int) -> Hook:
    """A hook that writes the numbers of each line for TensorBoard; what `folder` holds after `step` is dropped.

    Raises UserError where TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed; pip install 'timemix[tensorboard]'") from None
    writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(line: Line) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write
