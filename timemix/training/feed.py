"""Upload of the batches of a process to its device, one step ahead of the computation."""

import torch
from torch import Tensor

from timemix.data.batches import Batches
from timemix.runtime.distributed import World, my_rows


class Feed:
    """Upload the rows of each batch that one process trains on.

    While a GPU computes a step, `prepare` assembles the next batch on the CPU and uploads it.

    Args:
        batches: Function that returns the batch of a step.
        batch_size: Number of rows of a batch, over all processes.
        world: The processes of the run.
        device: Device of this process.
    """

    def __init__(self, batches: Batches, batch_size: int, world: World, device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._rows = my_rows(batch_size, world)
        self._ready: tuple[int, tuple[Tensor, Tensor]] | None = None

    def prepare(self, step: int) -> None:
        """Assemble and upload the batch of a step."""
        inputs, targets = (self._upload(torch.from_numpy(rows)) for rows in self._batches(step, self._rows))
        self._ready = step, (inputs, targets)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (rows, T) int64 of a step, on the device."""
        if self._ready is None or self._ready[0] != step:
            self.prepare(step)
        assert self._ready is not None
        return self._ready[1]

    def _upload(self, rows: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return rows.to(self._device)
        # A copy runs in parallel with the computation only if its source is pinned memory.
        return rows.pin_memory().to(self._device, non_blocking=True)
