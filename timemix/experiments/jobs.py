"""Jobs of a comparison: one run each, and the files that hold what it reached or measured."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from timemix.errors import DamagedFile
from timemix.experiments.spec import Variant
from timemix.storage.json_files import OPTIONAL, Count, Misfit, Range, read_json, to_record


@dataclass(frozen=True, kw_only=True)
class Result:
    """result.json of a job that has ended well. Losses in nats per token.

    train_loss: mean over the last tenth of the logged losses. valid_at: held-out loss by step.
    key: identifies the run. taken_from: folder of the comparison's run that it is a copy of.
    """

    steps: Count
    tokens: Count
    seconds: float
    tokens_per_second: float
    parameters: Count
    train_loss: float
    valid_loss: float
    valid_at: dict[str, float]
    by_position: tuple[float, ...] | None = field(default=None, metadata=OPTIONAL)
    key: str | None = field(default=None, metadata=OPTIONAL)
    taken_from: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Failure:
    """result.json of a job that failed.

    diverged: it would fail again. call: the call of `timemix compare` that ran it.
    """

    error: str
    diverged: bool | None = field(default=None, metadata=OPTIONAL)
    call: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Budget:
    """budget.json: the steps that fit into a budget of seconds."""

    steps: Annotated[int, Range(1, 2**63 - 1)]
    step_seconds: float | None = None


@dataclass(frozen=True)
class StepMemory:
    """What counts in memory.json."""

    peak_memory: float | None = None


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    variant: Variant
    number: int
    """Of the tuning point, or the seed."""
    tuning: bool

    @property
    def name(self) -> str:
        return f"{self.variant.name} {'tuning' if self.tuning else 'seed'} {self.number}"


def read_result(data: dict[str, Any]) -> Result | Failure:
    """The content of a result.json. Raises Misfit where it is damaged."""
    return to_record(data, Failure) if "error" in data else to_record(data, Result)


Measured = TypeVar("Measured")


def measured_before(path: Path, kind: type[Measured]) -> Measured:
    try:
        return to_record(read_json(path), kind)
    except Misfit:
        raise DamagedFile(f"{path} is damaged: remove it to measure again") from None
