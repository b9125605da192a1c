"""Loss of a batch of which a loss mask counts only a part of the targets."""

import math

from torch import Tensor

from timemix.data.shards import IGNORED


def counted_only(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Select the positions whose targets the loss counts.

    Args:
        logits: Logits (B, T, V).
        targets: Token ids, or IGNORED, (B, T) int64.

    Returns:
        Logits (1, n, V) and token ids (1, n) of the n counted targets.
    """
    counted = targets != IGNORED
    # (B, T, V) -> (1, n, V)
    return logits[counted][None], targets[counted][None]


def piece_divisor(targets: Tensor, counted: int, processes: int) -> float:
    """Return the divisor of the mean loss of a piece, with which the pieces add up to the mean loss of their batch.

    The gradients of a step are the mean over the processes, so the divisor is smaller by the number of processes.

    Args:
        targets: Targets of the piece, (rows, T) int64.
        counted: Number of targets of the whole batch that the loss counts.
        processes: Number of processes that share the batch.

    Returns:
        The divisor; infinity for a piece without counted targets, whose loss is 0.
    """
    own = int((targets != IGNORED).sum()) * processes
    return counted / own if own else math.inf
