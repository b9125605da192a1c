"""Loss spikes, and the batches that they came from."""

import json
import math
from pathlib import Path

import numpy as np

from timemix.storage.files import write_text
from timemix.tokenizers.base import Tokenizer


class SpikeWatch:
    """Tells losses far above those before, by their exponential mean and deviation over about 100 steps.

    `state`: mean, variance and number of losses seen, to resume from.
    """

    DECAY = 0.99
    WARM_UP = 50

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self.state: tuple[float, float, float] = (0.0, 0.0, 0)

    def __call__(self, loss: float) -> str | None:
        """A sentence's end that tells of a spike, None where this loss is none. A report needs 50 losses before it."""
        mean, variance, seen = self.state
        deviation = math.sqrt(variance)
        highest = mean + self._deviations * deviation
        spike = self._deviations > 0 and seen >= self.WARM_UP and loss > highest
        # A spike counts as the highest usual loss, so that a lasting rise is reported a few times, not for ever.
        usual = highest if spike else loss
        weight = max(1 - self.DECAY, 1 / (seen + 1))
        self.state = (
            mean + weight * (usual - mean),
            (1 - weight) * (variance + weight * (usual - mean) ** 2),
            seen + 1,
        )
        return f"the loss is {loss:.3f}, after {mean:.3f} ± {deviation:.3f} in the steps before" if spike else None


def write_bad_batch(
    path: Path, step: int, why: str, batch: tuple[np.ndarray, np.ndarray], tokenizer: Tokenizer
) -> None:
    """Write the inputs and targets of a step, as tokens and as text, to a JSON file."""
    inputs, targets = batch
    windows = np.concatenate([inputs, targets[:, -1:]], 1)
    texts = [tokenizer.decode(row) for row in windows]
    record = {"step": step, "why": why, "tokens": windows.tolist(), "texts": texts}
    write_text(path, json.dumps(record, ensure_ascii=False, indent=1))
