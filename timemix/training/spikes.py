"""Detection of loss spikes, and files with the batches that caused the spikes."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from timemix.data.batches import Batches
from timemix.data.shards import IGNORED
from timemix.errors import CannotWrite
from timemix.storage.files import write_text
from timemix.tokenizers.base import Tokenizer


class SpikeWatch:
    """Detector of losses far above the preceding losses.

    A loss is a spike if it exceeds the exponential moving average of earlier losses, over about 100 steps, by more than
    `deviations` standard deviations. The first 50 losses are never reported.

    Args:
        deviations: Threshold in standard deviations; 0: no loss is a spike.

    Attributes:
        state: Mean, variance and number of losses so far. A resumed run sets `state`.
    """

    DECAY = 0.99
    WARM_UP = 50

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self.state: tuple[float, float, float] = (0.0, 0.0, 0)

    def __call__(self, loss: float) -> str | None:
        """Add a loss in nats per token. Return a clause about the loss if the loss is a spike, otherwise None."""
        mean, variance, seen = self.state
        deviation = math.sqrt(variance)
        highest = mean + self._deviations * deviation
        spike = self._deviations > 0 and seen >= self.WARM_UP and loss > highest
        # A spike enters the mean with the value of the threshold, so that a lasting rise is reported only a few times.
        usual = highest if spike else loss
        weight = max(1 - self.DECAY, 1 / (seen + 1))
        self.state = (
            mean + weight * (usual - mean),
            (1 - weight) * (variance + weight * (usual - mean) ** 2),
            seen + 1,
        )
        return f"the loss is {loss:.3f}, after {mean:.3f} ± {deviation:.3f} in the steps before" if spike else None


class BadBatches:
    """A folder of batches whose loss was a spike or not finite.

    Args:
        folder: The folder, which the first batch creates.
        batches: Batches of the run.
        tokenizer: Tokenizer of the run.
        warn: Function that is called with a warning if a batch cannot be written.
        is_on: Whether batches are written.
    """

    def __init__(
        self, folder: Path, batches: Batches, tokenizer: Tokenizer, warn: Callable[[str], None], *, is_on: bool
    ) -> None:
        self._folder, self._batches, self._tokenizer, self._warn, self._is_on = folder, batches, tokenizer, warn, is_on

    def keep(self, step: int, why: str) -> None:
        """Write the batch of a step, unless this is off.

        Args:
            step: Number of the step, counted from 0.
            why: The reason, such as "the loss is not finite".
        """
        if not self._is_on:
            return
        path = self._folder / f"step-{step + 1:08d}.json"
        try:
            write_bad_batch(path, step + 1, why, self._batches(step), self._tokenizer)
        except CannotWrite as error:
            self._warn(f"step {step + 1}: {error}; the batch is not saved")


def write_bad_batch(
    path: Path, step: int, why: str, batch: tuple[np.ndarray, np.ndarray], tokenizer: Tokenizer
) -> None:
    """Write the batch of a step, as tokens and as text, to a JSON file.

    Args:
        path: The file.
        step: Number of the step, counted from 1.
        why: The reason, such as "the loss is not finite".
        batch: Inputs and targets, each (B, T). The file has no last token of a window whose last target does not count.
        tokenizer: Tokenizer of the run.
    """
    inputs, targets = batch
    rows = np.concatenate([inputs, targets[:, -1:]], 1)
    windows = [row[row != IGNORED] for row in rows]
    texts = [tokenizer.decode(row) for row in windows]
    record = {"step": step, "why": why, "tokens": [row.tolist() for row in windows], "texts": texts}
    write_text(path, json.dumps(record, ensure_ascii=False, indent=1))
