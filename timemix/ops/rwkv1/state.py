"""What wkv1 keeps of the past, and the numbers in which it computes."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Denominator = Literal["plain", "weighted"]

K_MIN, K_MAX = -60.0, 30.0
"""Bounds of k: sums of exp(k) stay in the range of float32."""


class Wkv1State(NamedTuple):
    """State of wkv1; at least float32.

    Args:
        numerators: alpha exp(k) v of every past position (B, H, ctx_len, N), zeros after them.
        denominators: sum of exp(k) so far (B, H, N); if weighted, alpha exp(k) of every past position
            (B, H, ctx_len, N).
        position: tokens seen by each row (B,).
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
        batch: rows B.
        heads: H.
        head_size: N.
        ctx_len: largest number of positions.
        denominator: "plain" or "weighted".
        dtype: float32 or float64.
        device: device of the tensors.

    Returns:
        Zeros at position 0.
    """
    history = torch.zeros(batch, heads, ctx_len, head_size, dtype=dtype, device=device)
    sums = torch.zeros(batch, heads, head_size, dtype=dtype, device=device)
    return Wkv1State(
        history,
        torch.zeros_like(history) if denominator == "weighted" else sums,
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of exp, sums and states for x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
