"""Activation functions of the feed-forward sublayers, by their names in the config."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _Mish(torch.autograd.Function):
    """Mish, x n / d, with derivative n / d + 4 x e (1 + e) / d^2, where e = exp(x), n = e (e + 2) and d = n + 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide, _, n, inverse = _Mish.parts(x)
        return (wide * n * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide, e, n, inverse = _Mish.parts(x)
        slope = (n + 4 * wide * e * (1 + e) * inverse) * inverse
        return (gradient.to(slope.dtype) * slope).to(x.dtype)

    @staticmethod
    def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float() if x.dtype == torch.bfloat16 else x
        # From x = 20 on, the derivative of mish is exactly 1 in float32. The clamp prevents an overflow of d^2.
        e = wide.clamp(max=20 if wide.dtype == torch.float32 else 40).exp()
        n = e * (e + 2)
        return wide, e, n, 1 / (n + 2)


def mish(x: Tensor) -> Tensor:
    """Compute x tanh(softplus(x)) with one exponential and one division.

    PyTorch's own mish computes a logarithm, an exponential and a hyperbolic tangent, and takes 14 times as long as
    PyTorch's gelu.

    Source:
        arXiv 1908.08681.
    """
    result: Tensor = _Mish.apply(x)  # type: ignore[no-untyped-call]
    return result


def relu2(x: Tensor) -> Tensor:
    """Compute max(x, 0)^2 (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "mish": mish, "relu2": relu2, "silu": F.silu}
