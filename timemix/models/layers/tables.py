"""Tables over positions: alpha, beta, gamma."""

import torch
from torch import Tensor, nn

from timemix.models.config import ShiftedConfig
from timemix.ops.common.spread import broadcast_parameter


def time_table(config: ShiftedConfig, learned: bool) -> nn.Parameter | None:
    """Create a table (H, ctx_len) of ones. Return None if `learned` is false."""
    return nn.Parameter(torch.ones(config.heads, config.ctx_len)) if learned else None


def time_gamma(config: ShiftedConfig, learned: bool) -> nn.Parameter | None:
    """Create gamma (ctx_len,) of ones, the output weight of each position. Return None if `learned` is false."""
    return nn.Parameter(torch.ones(config.ctx_len)) if learned else None


def times_gamma(x: Tensor, gamma: Tensor | None, position: Tensor | None) -> Tensor:
    """Multiply the activations of each position by gamma.

    Args:
        x: Input (B, T, C).
        gamma: Table (ctx_len,), whose last entry applies to all later positions; None: gamma is 1.
        position: Number of earlier tokens of each row (B,); None: no earlier tokens.

    Returns:
        Output (B, T, C).
    """
    if gamma is None:
        return x
    T = x.shape[1]
    if position is None:
        return x * broadcast_parameter(gamma[:T, None], x)
    gamma = gamma.to(x.dtype)
    # (B, T)
    target = position[:, None] + torch.arange(T, device=x.device)
    return x * gamma[target.clamp(max=len(gamma) - 1)][:, :, None]
