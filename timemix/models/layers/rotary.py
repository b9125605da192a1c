"""Rotary position encoding (arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary(x: Tensor, position: Tensor, base: float, dims: int) -> Tensor:
    """Turn pairs of dims of each head by angles that grow with the position.

    With R = dims, dims i and i + R/2 form a pair, turned by position * base^(-2i/R). Dims from R on stay as they are.

    Args:
        x: (B, H, T, N).
        position: (T,) or (B, 1, T).
        base: Base of the frequencies.
        dims: Number of turned dims R, even, at most N.

    Returns:
        (B, H, T, N).
    """
    R = dims
    if R == 0:
        return x
    exponent = torch.arange(0, R, 2, device=x.device, dtype=torch.float64) / R
    angle = position[..., None] * base**-exponent
    # Angles in float64: in float32 the turn is off by 1e-4 after a thousand positions.
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., : R // 2], x[..., R // 2 : R], x[..., R:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
