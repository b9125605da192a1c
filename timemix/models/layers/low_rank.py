"""Maps through few hidden channels: of RWKV-6 and RWKV-7."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from timemix.models.layers.mixtures import wide
from timemix.ops.common.spread import broadcast_parameter


class LowRank(nn.Module):
    """The map act(x down) up through few hidden channels, without its bias.

    Args:
        channels: Number C of channels of input and output.
        rank: Number R of hidden channels.
        act: Activation of the hidden channels; None: the identity.
    """

    low_rank_weights = ("down_weight", "up_weight")
    """Names of the weights (inputs, outputs) that generation rounds (models/quantize.py)."""

    def __init__(self, channels: int, rank: int, act: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.act = act
        # The names do not end in ".weight", because weight decay does not apply to these matrices.
        self.down_weight = nn.Parameter(torch.zeros(channels, rank))
        self.up_weight = nn.Parameter(torch.zeros(rank, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, C) to (B, T, C), in the dtype of products."""
        # (B, T, C) -> (B, T, R)
        hidden = x @ self.down_weight
        return (hidden if self.act is None else self.act(hidden)) @ self.up_weight


class LowRankWithBias(LowRank):
    """A low-rank map with a bias, which the caller adds to the result of `forward` in at least float32."""

    def __init__(self, channels: int, rank: int, act: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(channels, rank, act)
        self.bias = nn.Parameter(torch.zeros(channels))

    def sigmoid(self, product: Tensor) -> Tensor:
        """Return sigmoid(product + bias) (B, T, C) for a result of `forward`, in at least float32."""
        product = wide(product)
        return torch.sigmoid(product + broadcast_parameter(self.bias, product))
