"""The state of wkv1, and the range and precision of its computations."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Denominator = Literal["plain", "weighted"]

K_MIN, K_MAX = -60.0, 30.0
"""Bounds to which k is clamped, so that sums of exp(k) stay in the range of float32."""


class Wkv1State(NamedTuple):
    """State of wkv1, in at least float32.

    Args:
        numerators: alpha exp(k) v of every past position (B, H, ctx_len, N); zeros at later positions.
        denominators: Sum of exp(k) over the past (B, H, N). With a weighted denominator: alpha exp(k) of every past
            position (B, H, ctx_len, N).
        position: Number of earlier tokens of each row (B,).
    """

    numerators: Tensor
    denominators: Tensor
    position: Tensor


def wkv1_state(
    batch: int,
    heads: int,
    head_size: int,
    ctx_len: int,
    *,
    denominator: Denominator = "plain",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Wkv1State:
    """Create the state before the first token.

    Args:
        batch: B, number of rows.
        heads: H, number of heads.
        head_size: N, number of channels of a head.
        ctx_len: Maximum number of positions.
        denominator: "plain" or "weighted".
        dtype: Dtype of the sums, float32 or float64.
        device: Device of the tensors.

    Returns:
        A state of zeros, at position 0.
    """
    history = torch.zeros(batch, heads, ctx_len, head_size, dtype=dtype, device=device)
    sums = torch.zeros(batch, heads, head_size, dtype=dtype, device=device)
    return Wkv1State(
        history,
        torch.zeros_like(history) if denominator == "weighted" else sums,
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of exp, sums and states in wkv1.

    Args:
        x: The values v.

    Returns:
        float64 if x is float64, else float32.
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32
