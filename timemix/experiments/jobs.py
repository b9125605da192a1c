"""Jobs of a comparison, one run each, and the files with their results and measurements."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from timemix.errors import DamagedFile
from timemix.experiments.spec import Variant
from timemix.storage.json_files import OPTIONAL, Count, Misfit, Range, read_json, to_record


@dataclass(frozen=True, kw_only=True)
class Result:
    """Content of result.json after a successful job. Losses are in nats per token."""

    steps: Count
    """Number of trained steps."""
    tokens: Count
    """Number of trained tokens."""
    seconds: float
    """Seconds of training, without validation and saving."""
    tokens_per_second: float
    parameters: Count
    """Number of parameters."""
    train_loss: float
    """Mean of the last tenth of the logged training losses."""
    valid_loss: float
    """Last held-out loss."""
    valid_at: dict[str, float]
    """Held-out loss by step."""
    by_position: tuple[float, ...] | None = field(default=None, metadata=OPTIONAL)
    """Held-out loss by position in the window, if the experiment asks for it."""
    key: str | None = field(default=None, metadata=OPTIONAL)
    """Hash that identifies the run."""
    taken_from: str | None = field(default=None, metadata=OPTIONAL)
    """Run folder of another comparison that the run was copied from."""


@dataclass(frozen=True)
class Failure:
    """Content of result.json after a failed job."""

    error: str
    """Message of the error."""
    diverged: bool | None = field(default=None, metadata=OPTIONAL)
    """Whether the loss diverged, so that the job would fail again."""
    call: str | None = field(default=None, metadata=OPTIONAL)
    """Name of the call of `timemix compare` that ran the job."""


@dataclass(frozen=True)
class Budget:
    """Content of budget.json: the steps that fit into a budget of seconds."""

    steps: Annotated[int, Range(1, 2**63 - 1)]
    step_seconds: float | None = None
    """Measured seconds of a step."""


@dataclass(frozen=True)
class StepMemory:
    """The used field of memory.json."""

    peak_memory: float | None = None
    """Peak memory of a training step, in bytes."""


@dataclass(frozen=True)
class Job:
    """A run of a comparison."""

    variant: Variant
    number: int
    """Number of the tuning point, or the seed."""
    tuning: bool
    """Whether it is a tuning run."""

    @property
    def name(self) -> str:
        """Name for messages, such as "rwkv1 seed 2"."""
        return f"{self.variant.name} {'tuning' if self.tuning else 'seed'} {self.number}"


def read_result(data: dict[str, Any]) -> Result | Failure:
    """Return the content of a result.json as a dataclass.

    Raises:
        Misfit: A field is missing or does not fit.
    """
    return to_record(data, Failure) if "error" in data else to_record(data, Result)


Measured = TypeVar("Measured")


def measured_before(path: Path, kind: type[Measured]) -> Measured:
    """Read an earlier measurement as a dataclass.

    Args:
        path: JSON file of the measurement.
        kind: The dataclass.

    Raises:
        FileError: The file is missing or damaged.
    """
    try:
        return to_record(read_json(path), kind)
    except Misfit:
        raise DamagedFile(f"{path} is damaged; remove it to measure again") from None
