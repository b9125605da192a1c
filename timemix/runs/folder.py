"""Checkpoints of a run folder: which there are, the newest, the best."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from timemix.errors import DamagedFile, MissingFile
from timemix.storage.files import remove_folder
from timemix.storage.json_files import Count, NotNegative, read_record


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


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-" + 8 * "[0-9]"))


def newest(run: Path) -> Path:
    """Newest checkpoint. Raises MissingFile when the run has none."""
    found = checkpoints(run)
    if not found:
        raise MissingFile(_no_checkpoint(run))
    return found[-1]


def _validated(run: Path) -> list[tuple[float, Path]]:
    """Validation loss and folder of the checkpoints that were validated at their own step."""
    found = [(read_progress(folder), folder) for folder in checkpoints(run)]
    own = [(p.valid_loss, folder) for p, folder in found if p.valid_step == p.step]
    return [(loss, folder) for loss, folder in own if loss is not None]


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
    if (path / "model.safetensors").exists():
        return path
    if checkpoint == "best":
        return best(path)
    if checkpoint == "newest":
        return newest(path)
    newest(path)
    steps = {str(int(c.name.removeprefix("step-"))): c for c in checkpoints(path)}
    if str(checkpoint) not in steps:
        raise MissingFile(f"{path} has no checkpoint {checkpoint!r}; it has best, newest, {', '.join(steps)}")
    return steps[str(checkpoint)]


def _no_checkpoint(run: Path) -> str:
    if not run.is_dir():
        return f"there is no run folder {run}{_similar(run)}"
    if not (run / "config.toml").exists():
        return f"{run} is no run folder: it has no config.toml"
    return f"{run} has no checkpoint yet"


def _similar(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return ""
    runs = sorted(p.name for p in parent.iterdir() if (p / "config.toml").exists())
    return f"; {parent} has {', '.join(runs[:8])}" if runs else ""
