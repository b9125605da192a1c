"""Curves over lags that are sums of K decaying exponentials. Each exponential is real or belongs to a rotating pair.

f(lag) = sum_j c_j phi_j(lag)
phi_j(lag) = exp(-rate_j lag)                                  a real slot
phi_2i, phi_2i+1 (lag) = exp(-rate lag) (cos, sin)(angle lag)  a pair
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_RATE, MOST_FORGET = 1e-4, 0.3
"""Lower bound to which rate is clamped, and upper bound to which forget is clamped.

With these bounds, every exponential decays, and the largest term of a chunk, exp(K_MAX + MOST_FORGET * CHUNK), is in
the range of float32."""


class Curves(NamedTuple):
    """Parameters of the curves.

    Args:
        rate: Decay per token (H, K). In a rotating pair, the rate of slot 2i+1 is unused.
        angle: Rotation per token in radians (H, K // 2). The angle is exactly 0 if slots 2i and 2i+1 are real.
        coefficients: Weights of the slots (H, K).
        forget: -log rho (H,), where rho is the decay per token past ctx_len.
        taps: Values added to f at the first M lags (H, M); None if nothing is added.
    """

    rate: Tensor
    angle: Tensor
    coefficients: Tensor
    forget: Tensor
    taps: Tensor | None = None


def turned(curves: Curves, lags: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors c and s that move slots d lags further into the past.

        phi_2i(lag + d)   = c phi_2i(lag)   - s phi_2i+1(lag)        c = exp(-rate d) cos(angle d)
        phi_2i+1(lag + d) = c phi_2i+1(lag) + s phi_2i(lag)          s = exp(-rate d) sin(angle d), 0 for a real slot

    With the function `partners`, a state S that is moved by d lags is turn^d(S) = c S + s partners(S).

    Args:
        curves: Parameters of the curves.
        lags: d, of any shape.

    Returns:
        c and s, each (H, K, *lags), in float64, because angle * d would lose digits in float32.
    """
    K = curves.rate.shape[1]
    paired, angle = _paired(curves)
    rate = curves.rate.double().clamp(min=LEAST_RATE)
    # Both slots of a pair use the rate of the first slot.
    first = torch.arange(K, device=rate.device) // 2 * 2
    rate = torch.where(paired, rate[:, first], rate)
    shape = (*rate.shape, *[1] * lags.ndim)
    lags = lags.double()
    decay = (-rate.view(shape) * lags).exp()
    phase = angle.view(shape) * lags
    return decay * phase.cos(), torch.where(paired.view(shape), decay * phase.sin(), 0)


def _paired(curves: Curves) -> tuple[Tensor, Tensor]:
    """Return a mask of the slots in a pair (H, K), and the angle of each slot, without a gradient for angles of 0."""
    K = curves.rate.shape[1]
    angle = F.pad(curves.angle.double().repeat_interleave(2, 1), (0, K % 2))
    paired = angle != 0
    return paired, torch.where(paired, angle, 0)


def basis(curves: Curves, lags: Tensor) -> Tensor:
    """Evaluate the exponentials phi_j of the curves at given lags.

    Args:
        curves: Parameters of the curves.
        lags: Lags, of any shape.

    Returns:
        phi (H, K, *lags), in float64.
    """
    cosines, sines = turned(curves, lags)
    paired, _ = _paired(curves)
    odd = torch.arange(paired.shape[1], device=paired.device) % 2 == 1
    return torch.where((paired & odd).view(*paired.shape, *[1] * lags.ndim), sines, cosines)


def curve(curves: Curves, length: int) -> Tensor:
    """Evaluate the curves f at the lags from 0 to length - 1.

    Args:
        curves: Parameters of the curves.
        length: Number of lags.

    Returns:
        f (H, length) by lag.
    """
    lags = torch.arange(length, device=curves.rate.device)
    # Sum over slots: (H, K, length) -> (H, length)
    f = (curves.coefficients.double()[:, :, None] * basis(curves, lags)).sum(1)
    if curves.taps is not None:
        taps = curves.taps.double()[:, :length]
        f = f + F.pad(taps, (0, length - taps.shape[1]))
    return f.to(curves.coefficients.dtype)


def unfading(curves: Curves, ctx_len: int) -> Tensor:
    """Evaluate the curves for texts within ctx_len, where `forget` has no effect.

    Args:
        curves: Parameters of the curves.
        ctx_len: Number of lags.

    Returns:
        f (H, ctx_len) by lag.
    """
    # The term 0 * forget gives `forget` a gradient of 0. Without a gradient, `forget` would have no optimizer state.
    return curve(curves, ctx_len) + 0 * curves.forget[:, None]


def initial_forget(ctx_len: int) -> float:
    """Return -log(1 - 1 / ctx_len) clamped to [0, MOST_FORGET], for which the past weighs as much as ctx_len tokens.

    Args:
        ctx_len: Context length in tokens, at least 1.

    Returns:
        A number from 0 to MOST_FORGET.
    """
    return min(-math.log1p(-1 / ctx_len), MOST_FORGET) if ctx_len > 1 else MOST_FORGET


def fading(forget: Tensor) -> Tensor:
    """Return -log rho, which is `forget` clamped to [0, MOST_FORGET].

    Args:
        forget: Parameter (H,).

    Returns:
        -log rho (H,), from 0 to MOST_FORGET.
    """
    return forget.clamp(0.0, MOST_FORGET)


def partners(x: Tensor, dim: int) -> Tensor:
    """Exchange the slots of each pair: slot 2i becomes -x[2i+1], slot 2i+1 becomes x[2i].

    Args:
        x: A tensor with K slots in `dim`.
        dim: The dimension of the slots.

    Returns:
        A tensor of the shape of x. If K is odd, the last slot is 0.
    """
    K = x.shape[dim]
    # (..., K, ...) -> (..., K // 2, 2, ...) -> two of (..., K // 2, ...)
    even, odd = x.narrow(dim, 0, K // 2 * 2).unflatten(dim, (K // 2, 2)).unbind(dim + 1)
    swapped = torch.stack([-odd, even], dim + 1).flatten(dim, dim + 1)
    return swapped if K % 2 == 0 else torch.cat([swapped, torch.zeros_like(x.narrow(dim, K - 1, 1))], dim)
