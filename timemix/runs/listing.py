"""List of the runs below a folder, with state, progress and losses. This module does not import torch."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import Literal

from timemix.config.run import MOST_STEPS, read_toml
from timemix.errors import DamagedFile, FileError, MissingFile
from timemix.runs.folder import checkpoints, read_checkpoint, read_progress
from timemix.runs.metrics import newest_numbers
from timemix.storage.files import cannot_read, check_regular
from timemix.storage.index import is_sharded, read_index
from timemix.storage.locks import is_held


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run.

    Args:
        folder: Run folder.
        state: "running" if a process trains the run, "complete" after the last step or an early stop, "damaged" if a
            file cannot be read (see `error`), else "stopped".
        arch: Architecture.
        parameters: Number of parameters in the newest checkpoint, which has only the trained parameters of a run with
            `train.tune` "state" or "lora"; None before the first checkpoint.
        step: Number of finished steps that metrics.jsonl or a checkpoint records.
        steps: Number of steps of the whole run.
        loss: Newest training loss in nats per token.
        valid_loss: Newest validation loss in nats per token.
        age: Seconds since the run last wrote to metrics.jsonl.
        error: Error message if the run is damaged, else None.
    """

    folder: str
    state: Literal["running", "complete", "stopped", "damaged"]
    arch: str | None = None
    parameters: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    valid_loss: float | None = None
    age: float | None = None
    error: str | None = None


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs at or below a folder, sorted by name.

    Args:
        folder: A run folder, or a folder with runs at any depth.

    Raises:
        MissingFile: The folder does not exist.
        FileError: The folder cannot be read.
    """
    if not folder.is_dir():
        raise MissingFile(f"there is no folder {folder}; name the folder of your runs")
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise FileError(cannot_read(folder, error)) from error
    return [summarize(run) for run in _run_folders(folder)]


def _run_folders(folder: Path) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
        return
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        # The folder belongs to another user, or was removed meanwhile.
        return
    for each in inside:
        # The search follows a link only if it points to a run, so the search cannot loop forever.
        if not each.name.startswith(".") and isdir(each) and (_is_run(each) or not each.is_symlink()):
            yield from _run_folders(each)


def _is_run(folder: Path) -> bool:
    # The methods of Path raise an error in a folder without permission.
    return isfile(folder / "config.toml") and any(
        exists(folder / name) for name in ("metrics.jsonl", "checkpoints", ".lock")
    )


def summarize(run: Path) -> RunSummary:
    """Return the summary of a run folder. A file that cannot be read gives the state "damaged"."""
    try:
        config = read_toml(run / "config.toml")
        metrics = run / "metrics.jsonl"
        numbers = newest_numbers(run, ("step", "loss", "valid_loss")) if metrics.exists() else {}
        if not 0 <= (numbers.get("step") or 0) <= MOST_STEPS:
            raise DamagedFile(f"{metrics} is damaged: its newest step is {numbers['step']:g}; restore it from a copy")
        kept = checkpoints(run)
        saved = int(kept[-1].name.removeprefix("step-")) if kept else 0
        step = max(int(numbers.get("step") or 0), saved)
        written = (metrics if metrics.exists() else run / "config.toml").stat().st_mtime
        progress = read_progress(kept[-1]) if kept else None
        gainless = progress.validations_without_gain if progress else 0
        # A converted run without fine-tuning has 0 steps: it is complete at its first checkpoint.
        is_complete = (bool(kept) and saved >= config.train.steps) or 0 < config.train.patience <= gainless
        state: Literal["running", "complete", "stopped"] = "complete" if is_complete else "stopped"
        return RunSummary(
            folder=str(run),
            state="running" if is_held(run) else state,
            arch=config.model.arch,
            parameters=read_checkpoint(run, "newest", stored_parameters) if kept else None,
            step=step,
            steps=config.train.steps,
            loss=numbers.get("loss"),
            # A run without training has no metrics.
            valid_loss=numbers.get("valid_loss") if numbers or progress is None else progress.valid_loss,
            age=max(0.0, time.time() - written),
        )
    except (FileError, OSError) as error:
        return RunSummary(str(run), "damaged", error=str(error))


def stored_parameters(checkpoint: Path) -> int:
    """Return the number of parameters in a checkpoint, from the header or the index of its weights.

    Raises:
        FileError: The file is missing, damaged or not a safetensors file.
    """
    if is_sharded(checkpoint, "model"):
        return sum(map(math.prod, read_index(checkpoint, "model").shapes.values()))
    from safetensors import SafetensorError, safe_open

    path = checkpoint / "model.safetensors"
    check_regular(path)
    try:
        with safe_open(path, framework="numpy") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path} is damaged or not a safetensors file: {error}; restore it from a copy") from error
