"""The channel-mix of RWKV-4, RWKV-5 and RWKV-6."""

import torch
from torch import Tensor, nn

from timemix.models.layers.activations import relu2
from timemix.models.layers.linear import Linear
from timemix.ops.common import fused

MIXED = ("key", "receptance")
"""The vectors of a channel-mix, each of which reads its own mixture of a token and the previous token."""


class ReceptanceChannelMix(nn.Module):
    """The channel-mix sigmoid(receptance(x_r)) * value(relu(key(x_k))^2) of two mixtures x_k and x_r.

    Args:
        channels: Number C of channels.
        hidden: Number of hidden channels.
        shifted: Whether the mixtures have parameters. Without parameters, a mixture is the token itself.
    """

    def __init__(self, channels: int, hidden: int, *, shifted: bool = True) -> None:
        super().__init__()
        self.mix = nn.ParameterDict({name: torch.zeros(channels) for name in MIXED if shifted})
        self.key = Linear(channels, hidden, bias=False)
        self.receptance = Linear(channels, channels, bias=False)
        self.value = Linear(hidden, channels, bias=False)

    def forward(self, mixed_key: Tensor, mixed_receptance: Tensor) -> Tensor:
        """Map two mixtures of each token and the previous token, (B, T, C) each, to (B, T, C)."""
        k = self.key(mixed_key)
        hidden = fused.activated(k, "relu2") if fused.serves(k) else relu2(k)
        result: Tensor = self.receptance(mixed_receptance).sigmoid() * self.value(hidden)
        return result
