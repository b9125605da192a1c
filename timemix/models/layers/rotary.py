"""Rotary position encoding (arXiv 2104.09864)."""

import torch
from torch import Tensor

from timemix.ops.common.operators import operator


@operator("timemix::rotary_turns")
def rotary_turns(position: Tensor, base: float, dims: int) -> Tensor:
    """Compute cos and sin of position * base^(-2i/R) for i < R/2.

    Args:
        position: Positions (...).
        base: Base of the frequencies.
        dims: R, number of rotated dimensions, even.

    Returns:
        The values of cos and sin (2, ..., R/2) in float64, since angles in float32 have errors of 1e-4 after a thousand
        positions.
    """
    exponent = torch.arange(0, dims, 2, device=position.device, dtype=torch.float64) / dims
    angle = position[..., None] * base**-exponent
    return torch.stack([angle.cos(), angle.sin()])


@rotary_turns.register_fake
def _(position: Tensor, base: float, dims: int) -> Tensor:
    return position.new_empty((2, *position.shape, dims // 2), dtype=torch.float64)


def rotary(x: Tensor, position: Tensor, base: float, dims: int) -> Tensor:
    """Rotate pairs of dimensions of each head by angles that grow with the position.

    With R = dims, dimensions i and i + R/2 are a pair, rotated by position * base^(-2i/R). Dimensions from R on stay
    unchanged.

    Args:
        x: Queries or keys (B, H, T, N).
        position: Positions (T,) or (B, 1, T).
        base: Base of the frequencies.
        dims: R, number of rotated dimensions, even, at most N.

    Returns:
        Rotated x (B, H, T, N).

    Source:
        arXiv 2104.09864.
    """
    R = dims
    if R == 0:
        return x
    # `rotary_turns` is an operator because compiled code would otherwise compute the angles again for every row and
    # head. On a GPU, the repeated computation takes a third of the time of a training step.
    turns = rotary_turns if torch.compiler.is_compiling() else rotary_turns.function
    # (2, T, R/2) or (2, B, 1, T, R/2)
    cos, sin = turns(position, base, R).to(x.dtype)
    a, b, rest = x[..., : R // 2], x[..., R // 2 : R], x[..., R:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
