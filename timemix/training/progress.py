"""What a step reports to whoever watches."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class TrainingProgress:
    """What a step reports to whoever watches: a progress bar, a log, a test."""

    step: int
    steps: int
    tokens: int
    seconds: float
    loss: float
    """Nats per token, of this step."""
    tokens_per_second: float
    """Over the last steps, validation and saving left out."""
    valid_loss: float | None
    """The newest, nats per token."""
    valid_step: int | None
    """Step of valid_loss."""
    sample: str | None
    """Text drawn at this step, where train.sample_every wants one."""


Watch = Callable[[TrainingProgress], None]
