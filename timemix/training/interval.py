"""Measurements over the steps between two lines of metrics.jsonl."""

import numpy as np
import torch

from timemix.config.run import RunConfig
from timemix.models.size import flops_per_token
from timemix.runs.metrics import Line
from timemix.runtime.machine import peak_memory


class Interval:
    """The steps since the previous line of metrics.jsonl.

    Args:
        config: Config of the run.
        device: Device of the model.

    Attributes:
        losses: Training loss of each step with counted tokens, in nats per token, to which the training loop appends.
        tokens_per_second: Speed in the previous interval, None before the first line.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._step, self._seconds, self._peak = 0, 0.0, 1.0
        self.losses: list[float] = []
        self.tokens_per_second: float | None = None

    def begin(self, step: int, seconds: float, peak: float) -> None:
        """Begin to measure, before the first step of a process.

        The losses of a resumed run stay, but the steps before its checkpoint do not count for the speed.

        Args:
            step: Number of finished steps.
            seconds: Seconds of training so far.
            peak: Peak speed of the device, in floating-point operations per second.
        """
        self._step, self._seconds, self._peak = step, seconds, peak

    def measure(self, step: int, seconds: float, lr: float, grad_norm: float) -> Line:
        """Return the fields of a line about this interval, and begin the next interval.

        The line has no loss if no step had counted tokens.

        Args:
            step: Number of finished steps.
            seconds: Seconds of training so far.
            lr: Learning rate of the last step.
            grad_norm: Gradient norm of the last step before clipping.
        """
        tokens = (step - self._step) * self._config.train.batch_size * self._config.window
        speed = self.tokens_per_second = tokens / (seconds - self._seconds)
        loss: Line = {"loss": float(np.mean(self.losses))} if self.losses else {}
        self.losses, self._step, self._seconds = [], step, seconds
        return loss | {
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": speed,
            "peak_share": 3 * flops_per_token(self._config.model) * speed / self._peak,
            "memory": peak_memory(self._device),
        }
