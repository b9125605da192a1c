"""Tables over positions: alpha, beta, gamma."""

import torch
from torch import Tensor, nn

from timemix.models.config import ShiftedConfig
from timemix.ops.common.spread import broadcast_parameter


def time_table(config: ShiftedConfig, learned: bool) -> nn.Parameter | None:
    """Table (H, ctx_len) of ones, or None for one that is left out."""
    return nn.Parameter(torch.ones(config.heads, config.ctx_len)) if learned else None


def time_gamma(config: ShiftedConfig, learned: bool) -> nn.Parameter | None:
    """Output weight of each position (ctx_len,), or None where it is left out."""
    return nn.Parameter(torch.ones(config.ctx_len)) if learned else None


def times_gamma(x: Tensor, gamma: Tensor | None, position: Tensor | None) -> Tensor:
    """x (B, T, C) times gamma at each row's positions; `position` None: all rows start at 0."""
    if gamma is None:
        return x
    T = x.shape[1]
    if position is None:
        return x * broadcast_parameter(gamma[:T, None], x)
    gamma = gamma.to(x.dtype)
    target = position[:, None] + torch.arange(T, device=x.device)
    return x * gamma[target.clamp(max=len(gamma) - 1)][:, :, None]
