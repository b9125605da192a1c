"""Checkpoints of a run folder: which there are, the newest, the best."""

import contextlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from timemix.errors import DamagedFile, FileError, MissingFile
from timemix.storage.files import remove_folder
from timemix.storage.index import index_path, read_index
from timemix.storage.json_files import Count, NotNegative, read_record

logger = logging.getLogger("timemix")

Found = TypeVar("Found")

NEEDED = ("config.toml", "model.safetensors", "tokenizer.json", "training.json")
"""Files of a whole checkpoint. Training makes it appear with all of them; a copy may have been cut off.

A sharded checkpoint has an index and the files that it names instead of model.safetensors.
"""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """training.json of a checkpoint: what resuming needs besides tensors.

    losses_since_line: of the steps after the newest line of metrics.jsonl, nats per token.
    usual_loss: mean, variance and number of losses, as `SpikeWatch.state`.
    validations_without_gain: since the lowest validation loss.
    data: sha256 of both splits and of the tokenizer.
    """

    step: Count
    tokens: Count = 0
    seconds: NotNegative
    valid_loss: float | None
    valid_step: Count | None
    losses_since_line: tuple[float, ...] = ()
    usual_loss: tuple[float, NotNegative, NotNegative] = (0.0, 0.0, 0)
    validations_without_gain: Count = 0
    data: dict[str, str] = field(default_factory=dict)


def read_progress(folder: Path) -> Progress:
    """training.json of a checkpoint. Raises FileError when it is missing, damaged, or a value cannot be."""
    path = folder / "training.json"
    progress = read_record(path, Progress)
    if len(progress.losses_since_line) > progress.step:
        raise DamagedFile(f"{path} is damaged: it holds more losses than steps")
    return progress


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-" + 8 * "[0-9]"))


def _lacking(checkpoint: Path) -> list[str]:
    needed = list(NEEDED)
    if index_path(checkpoint, "model").exists():
        needed.remove("model.safetensors")
        # A damaged index is reported by those who read it.
        with contextlib.suppress(FileError):
            needed += read_index(checkpoint, "model").files
    return [name for name in needed if not (checkpoint / name).exists()]


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoint folders of a run, oldest first."""
    while True:
        found = _folders(run)
        whole = [folder for folder in found if not _lacking(folder)]
        # Training may have removed one since, after a newer one appeared.
        if all(os.path.lexists(folder) for folder in found):
            return whole


def warn_of_unfinished(run: Path) -> None:
    """Log each checkpoint that is passed over because files are missing."""
    for folder in _folders(run):
        lacking = _lacking(folder)
        if lacking and os.path.lexists(folder):
            logger.warning("%s lacks %s and is passed over; restore or remove it", folder, ", ".join(lacking))


def newest(run: Path) -> Path:
    """Newest whole checkpoint. Raises MissingFile when the run has none."""
    found = checkpoints(run)
    if not found:
        raise MissingFile(_no_checkpoint(run))
    return found[-1]


def _validated(run: Path) -> list[tuple[float, Path]]:
    """Validation loss and folder of the checkpoints that were validated at their own step.

    If the run's training removes one meanwhile, of those that are left.
    """
    found = []
    for folder in checkpoints(run):
        try:
            progress = read_progress(folder)
        except FileError:
            if folder.exists():
                raise
            return _validated(run)
        if progress.valid_step == progress.step and progress.valid_loss is not None:
            found.append((progress.valid_loss, folder))
    return found


def best(run: Path) -> Path:
    """Checkpoint of the lowest validation loss, the newest where none was validated at its own step."""
    return min(_validated(run), default=(0.0, None))[1] or newest(run)


def best_loss(run: Path) -> float:
    """Lowest validation loss of a run's checkpoints in nats per token, infinite where none was validated."""
    return min((loss for loss, _ in _validated(run)), default=math.inf)


def prune(run: Path) -> None:
    """Removes every checkpoint but the newest and the best."""
    keep = {newest(run), best(run)}
    for folder in checkpoints(run):
        if folder not in keep:
            remove_folder(folder)


def find(run: str | Path, checkpoint: str | int = "best") -> Path:
    """Folder of a checkpoint: of a run folder ("best", of the lowest validation loss, "newest", or a step), or itself.

    Raises MissingFile when there is none.
    """
    path = Path(run)
    if not path.is_dir():
        raise MissingFile(f"there is no run folder {path}{_similar(path)}")
    if (path / "model.safetensors").exists() or index_path(path, "model").exists():
        return path
    warn_of_unfinished(path)
    if checkpoint == "best":
        return best(path)
    if checkpoint == "newest":
        return newest(path)
    newest(path)
    steps = {str(int(c.name.removeprefix("step-"))): c for c in checkpoints(path)}
    if str(checkpoint) not in steps:
        raise MissingFile(f"{path} has no checkpoint {checkpoint!r}; it has best, newest, {', '.join(steps)}")
    return steps[str(checkpoint)]


def read_checkpoint(run: str | Path, checkpoint: str | int, read: Callable[[Path], Found]) -> Found:
    """Find a checkpoint as `find` does and read it; if the run's training removes it meanwhile, its successor.

    Raises what `find` and `read` raise.
    """
    while True:
        folder = find(run, checkpoint)
        try:
            return read(folder)
        except FileError:
            if folder.exists():
                raise


def _no_checkpoint(run: Path) -> str:
    if not run.is_dir():
        return f"there is no run folder {run}{_similar(run)}"
    if not (run / "config.toml").exists():
        return f"{run} is no run folder: it has no config.toml"
    if unfinished := _folders(run):
        return f"{run} has no whole checkpoint: {unfinished[-1].name} lacks {', '.join(_lacking(unfinished[-1]))}"
    return f"{run} has no checkpoint yet"


def _similar(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return ""
    runs = sorted(p.name for p in parent.iterdir() if (p / "config.toml").exists())
    return f"; {parent} has {', '.join(runs[:8])}" if runs else ""
