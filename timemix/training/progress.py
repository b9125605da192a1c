"""Progress of a training run, which the trainer reports after each step."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class TrainingProgress:
    """Progress after a step, for a progress bar, a log or a test."""

    step: int
    """Number of finished steps."""
    steps: int
    """Number of steps of the whole run."""
    tokens: int
    """Number of tokens trained on so far."""
    seconds: float
    """Seconds of training so far, without validation and saving."""
    loss: float
    """Training loss of this step, in nats per token."""
    tokens_per_second: float
    """Mean speed of the last steps in tokens per second, without validation and saving."""
    valid_loss: float | None
    """Newest validation loss, in nats per token."""
    valid_step: int | None
    """Step of the newest validation."""
    sample: str | None
    """Text generated at this step, None if `train.sample_every` asks for no sample."""


Watch = Callable[[TrainingProgress], None]
"""A function that is called with the progress after each step."""
