"""Functions that find, read and remove the checkpoints of a run folder."""

import contextlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TypeVar

from timemix.errors import DamagedFile, FileError, InvalidValue, MissingFile, NotFinite
from timemix.storage.files import remove_folder
from timemix.storage.index import index_path, is_sharded, read_index
from timemix.storage.json_files import Count, NotNegative, read_record

logger = logging.getLogger("timemix")

Found = TypeVar("Found")

NEEDED = ("config.toml", "model.safetensors", "tokenizer.json", "training.json")
"""Files of a complete checkpoint. Training writes all files atomically, but a copied checkpoint may be incomplete.

Instead of model.safetensors, a sharded checkpoint has an index and the files that the index names.
"""


def checkpoint_name(step: int) -> str:
    """Return the folder name of a checkpoint, such as step-00000500."""
    return f"step-{step:08d}"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a run without its tensors, as training.json of a checkpoint stores it."""

    step: Count
    """Number of finished steps."""
    tokens: Count = 0
    """Number of training tokens so far."""
    seconds: NotNegative
    """Training time so far in seconds, without validation and saving."""
    valid_loss: float | None
    """Newest validation loss, in nats per token."""
    valid_step: Count | None
    """Step of `valid_loss`."""
    losses_since_line: tuple[float, ...] = ()
    """Training losses of the steps after the newest line of metrics.jsonl, in nats per token."""
    usual_loss: tuple[float, NotNegative, NotNegative] = (0.0, 0.0, 0)
    """Mean of the losses, variance of the losses, and number of losses, as in `SpikeWatch.state`."""
    validations_without_gain: Count = 0
    """Number of validations since the lowest validation loss."""
    data: dict[str, str] = field(default_factory=dict)
    """Hashes (sha256) of the training split, the validation split and the tokenizer."""


def read_progress(folder: Path) -> Progress:
    """Read training.json of a checkpoint.

    Raises:
        FileError: The file is missing or damaged, or a value in the file is out of range.
    """
    path = folder / "training.json"
    progress = read_record(path, Progress)
    if len(progress.losses_since_line) > progress.step:
        raise DamagedFile(f"{path} is damaged: it has more losses than steps; restore it from a copy")
    return progress


def _folders(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-" + 8 * "[0-9]"))


def _shards(checkpoint: Path) -> list[Path]:
    return list(checkpoint.glob("model-*-of-*.safetensors"))


def _lacking(checkpoint: Path) -> list[str]:
    needed = list(NEEDED)
    index = index_path(checkpoint, "model")
    if not (checkpoint / "model.safetensors").exists() and (index.exists() or _shards(checkpoint)):
        needed[needed.index("model.safetensors")] = index.name
        # Functions that load the checkpoint report a damaged index.
        with contextlib.suppress(FileError):
            needed += read_index(checkpoint, "model").files
    return [name for name in needed if not (checkpoint / name).exists()]


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of the complete checkpoints of a run, oldest first."""
    while True:
        found = _folders(run)
        whole = [folder for folder in found if not _lacking(folder)]
        # If training removed a checkpoint during the loop, a newer checkpoint exists, so the loop repeats.
        if all(os.path.lexists(folder) for folder in found):
            return whole


def last_good(run: Path) -> str:
    """Return a clause about the newest complete checkpoint of a run, for messages."""
    kept = checkpoints(run)
    return f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"


def not_finite(run: Path, what: str, step: int) -> NotFinite:
    """Return the error of a run with a value that is not finite.

    Args:
        run: Run folder.
        what: Name of the value, such as "loss".
        step: Number of the step, counted from 1.
    """
    return NotFinite(f"the {what} is not finite at step {step}; {last_good(run)}; try a smaller train.lr")


def warn_of_unfinished(run: Path) -> None:
    """Warn of each checkpoint that is skipped because some of its files are missing."""
    for folder in _folders(run):
        lacking = _lacking(folder)
        if lacking and os.path.lexists(folder):
            logger.warning("%s lacks %s and is skipped; restore or remove it", folder, ", ".join(lacking))


def check_run(folder: Path) -> None:
    """Check that a folder to resume is a run folder, and not a checkpoint, which has a config.toml too.

    Args:
        folder: The folder.

    Raises:
        InvalidValue: The folder is a checkpoint.
        MissingFile: The folder is no run folder.
    """
    if not (folder / "config.toml").exists():
        newest(folder)
    if any(folder.glob("model*.safetensors")):
        run = (folder if folder.parent.name == "checkpoints" else folder.resolve()).parent.parent
        raise InvalidValue(
            f"{folder} is a checkpoint, not a run; resume its run with: timemix train --resume {quote(str(run))}, or"
            f" start a new run from it with: timemix train --from {quote(str(folder))} --out NEXT"
        )


def check_resumable(run: Path, start: str | None) -> None:
    """Check that a run has a complete checkpoint, or can begin again at step 0.

    If every checkpoint lacked a file, the run would begin again at step 0, and replace its checkpoints. Without a
    checkpoint, a run that started from the weights of another model would begin with random weights.

    Args:
        run: Run folder.
        start: Model from whose weights the run started; None: random weights.

    Raises:
        MissingFile: Every checkpoint of the run lacks a file, or the checkpoint with the weights of `start` is missing.
    """
    if checkpoints(run):
        return
    if start is not None:
        raise MissingFile(
            f"{run} has no complete checkpoint with the weights of {start}, from which it started; start it again:"
            f" timemix train --config {quote(str(run / 'config.toml'))} --out NEXT"
        )
    if _folders(run):
        raise MissingFile(f"{_no_checkpoint(run)}, or remove {run / 'checkpoints'} to begin at step 0")


def newest(run: Path) -> Path:
    """Return the newest complete checkpoint of a run.

    Raises:
        MissingFile: The run does not exist or has no complete checkpoint.
    """
    found = checkpoints(run)
    if not found:
        raise MissingFile(_no_checkpoint(run))
    return found[-1]


def _validated(run: Path) -> list[tuple[float, Path]]:
    """Return the validation loss and folder of each checkpoint that was saved at the step of a validation.

    Checkpoints that training removes during the call are left out.
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
    """Return the checkpoint with the lowest validation loss, or the newest checkpoint if no checkpoint was validated.

    Raises:
        MissingFile: The run does not exist or has no complete checkpoint.
        FileError: The training.json of a checkpoint is damaged.
    """
    return min(_validated(run), default=(0.0, None))[1] or newest(run)


def best_loss(run: Path) -> float:
    """Return the lowest validation loss of the checkpoints in nats per token; infinity without any."""
    return min((loss for loss, _ in _validated(run)), default=math.inf)


def prune(run: Path) -> None:
    """Remove all checkpoints of a run except the newest and the best."""
    keep = {newest(run), best(run)}
    for folder in checkpoints(run):
        if folder not in keep:
            remove_folder(folder)


def find(run: str | Path, checkpoint: str | int = "best") -> Path:
    """Return the folder of a checkpoint.

    Args:
        run: Run folder, or a checkpoint folder, which `find` returns unchanged.
        checkpoint: "best" (lowest validation loss), "newest", or a step. `checkpoint` has no effect if `run` is a
            checkpoint folder.

    Raises:
        MissingFile: The run or the checkpoint does not exist.
        FileError: The training.json of a checkpoint is damaged.
    """
    path = Path(run)
    if not path.is_dir():
        raise MissingFile(_no_run(path))
    if (path / "model.safetensors").exists() or is_sharded(path, "model"):
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
    """Find a checkpoint and read it. If training removes the checkpoint during the call, read a newer checkpoint.

    Args:
        run: Run folder or checkpoint folder, as for `find`.
        checkpoint: "best", "newest" or a step, as for `find`.
        read: Function that reads the checkpoint; its argument is the checkpoint folder.

    Returns:
        The result of `read`.

    Raises:
        MissingFile: The run or the checkpoint does not exist.
        FileError: A file is damaged, or `read` raises a FileError.
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
        return _no_run(run)
    if (run / "training.json").exists():
        return f"{run} is a checkpoint that lacks {', '.join(_lacking(run))}; restore the missing files"
    if not (run / "config.toml").exists():
        return f"{run} is not a run folder: it has no config.toml; {_known_runs(run)}"
    if unfinished := _folders(run):
        lacking = ", ".join(_lacking(unfinished[-1]))
        return f"{run} has no complete checkpoint: {unfinished[-1].name} lacks {lacking}; restore the missing files"
    return f"{run} has no checkpoint yet; resume its training, or wait for the first checkpoint"


def _no_run(path: Path) -> str:
    known = _known_runs(path.parent)
    if path.is_file():
        return f"{path} is a file, not a run folder; {known}"
    return f"there is no run folder {path}; {known}"


def _known_runs(folder: Path) -> str:
    """Return the end of a message, with up to eight runs of a folder."""
    runs: list[str] = []
    # os.path.exists raises no error in a neighbouring folder without permission.
    with contextlib.suppress(OSError):
        runs = sorted(path.name for path in folder.iterdir() if os.path.exists(path / "config.toml"))
    return f"the runs in {folder} are {', '.join(runs[:8])}" if runs else "name a folder that training has written"
