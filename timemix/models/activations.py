"""Activations of the feed-forward halves, by the names of the config."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "mish": F.mish, "relu2": relu2}
