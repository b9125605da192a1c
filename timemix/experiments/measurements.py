"""Measured training steps of the variants of a comparison: each is measured once and saved in a JSON file."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from timemix.bench.measure import StepFailure, measure_training
from timemix.config.run import RunConfig
from timemix.errors import DamagedFile, FileError, TimemixError
from timemix.experiments.identity import settings_key
from timemix.storage.files import write_text
from timemix.storage.json_files import Misfit, Range, read_json, to_json, to_record

Measured = TypeVar("Measured")

BUDGET_STEPS = 20
"""Number of measured steps for a budget of seconds."""


@dataclass(frozen=True)
class Budget:
    """Content of budget.json: the number of steps that fit into a budget of seconds."""

    steps: Annotated[int, Range(1, 2**63 - 1)]
    step_seconds: float | None = None
    """Measured time of a step, in seconds."""


@dataclass(frozen=True)
class StepCost:
    """Content of memory.json, reduced to the fields that a comparison reads."""

    peak_memory: float | None = None
    """Peak memory of a training step, in bytes."""
    step_seconds: float | None = None
    """Measured time of a step, in seconds."""


def steps_within(seconds: float, config: RunConfig, path: Path, variant: str) -> int:
    """Return the number of training steps that fit into a number of seconds, at least 1, measured only once.

    Args:
        seconds: Number of seconds.
        config: Config of a run, with the size of the vocabulary.
        path: JSON file of the measurement.
        variant: Name of the variant for an error message.

    Returns:
        The number of steps.

    Raises:
        FileError: The file is damaged, or has the measurement of other settings.
        TimemixError: A training step failed.
    """
    key = settings_key(config, seconds)
    budget = _measured_before(path, Budget, key)
    if budget is None:
        measured = measure_training(config, steps=BUDGET_STEPS)
        if isinstance(measured, StepFailure):
            raise TimemixError(f"a training step of variant {variant!r} failed: {measured.error}")
        budget = Budget(max(1, int(seconds / measured.step_seconds)), measured.step_seconds)
        write_text(path, json.dumps(to_json(budget) | {"key": key}) + "\n")
    return budget.steps


def step_cost(config: RunConfig, path: Path) -> StepCost:
    """Return the time and the peak memory of a training step, measured only once.

    Args:
        config: Config of a run, with the size of the vocabulary.
        path: JSON file of the measurement.

    Returns:
        The measurement, without values if the step fails. A failed step leaves no file.

    Raises:
        FileError: The file is damaged, or has the measurement of other settings.
    """
    key = settings_key(config)
    found = _measured_before(path, StepCost, key)
    if found is not None:
        return found
    measured = measure_training(config, steps=1)
    if isinstance(measured, StepFailure):
        return StepCost()
    write_text(path, json.dumps(to_json(measured) | {"key": key}) + "\n")
    return StepCost(measured.peak_memory, measured.step_seconds)


def saved_measurements(path: Path, *kinds: type[Any]) -> dict[str, Any]:
    """Return saved measurements by name, without damaged entries, which the experiment repeats; none without a file.

    Args:
        path: JSON file of the measurements.
        kinds: Dataclasses of a measurement.

    Raises:
        DamagedFile: The file is damaged as a whole.
    """
    found: dict[str, Any] = {}
    try:
        entries = read_json(path) if path.exists() else {}
    except DamagedFile:
        raise DamagedFile(f"{path} is damaged; remove it to measure again") from None
    for key, data in entries.items():
        for kind in kinds:
            with contextlib.suppress(Misfit):
                found[key] = to_record(data, kind)
    return found


def _measured_before(path: Path, kind: type[Measured], key: str) -> Measured | None:
    """Read an earlier measurement as a dataclass.

    Args:
        path: JSON file of the measurement.
        kind: Dataclass of the result.
        key: Hash of the measured settings.

    Returns:
        The measurement; None if there is no file. Earlier versions wrote no key.

    Raises:
        FileError: The file is damaged, or has the measurement of other settings.
    """
    if not path.exists():
        return None
    try:
        found = read_json(path)
        measured = to_record(found, kind)
    except (Misfit, DamagedFile):
        raise DamagedFile(f"{path} is damaged; remove it to measure again") from None
    if found.get("key", key) != key:
        raise FileError(
            f"{path} has the measurement of other settings; remove it to measure again, or choose another folder"
        )
    return measured
