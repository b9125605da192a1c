"""Progress of a training run, which the trainer reports after each step."""

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A text that the model generated during the training."""

    step: int
    """Number of finished steps."""
    prompt: str | None
    """Prompt of the text, None for the default prompt."""
    text: str
    """The text, which begins with the prompt."""

    @property
    def heading(self) -> str:
        """The line above the text in samples.txt, with the step and the prompt."""
        # As JSON, a prompt with several lines takes one line.
        prompt = "" if self.prompt is None else f", prompt {json.dumps(self.prompt, ensure_ascii=False)}"
        return f"--- step {self.step}{prompt}"


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
    samples: tuple[Sample, ...] = ()
    """Texts generated at this step, empty if no sample is due."""


Watch = Callable[[TrainingProgress], None]
"""A function that is called with the progress after each step."""
