"""LayerNorm with the operation that follows it, in C, forward and backward.

    norm_shift:     y[t, c] = z[t - d(c), c]
    norm_mixtures:  y_i[t]  = z[t] + (z[t-1] - z[t]) mix_i        for z = LayerNorm(x)

The files norm_shift.c and mixtures.c contain the backward formulas. The function `fused.serves` returns whether the
kernels can be used.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from timemix.ops.common import fused
from timemix.ops.common.derivatives import once_differentiable
from timemix.ops.common.kernels import check_shapes


def norm_shift(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, edges: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Apply LayerNorm, then token-shift.

    Args:
        x: Input (B, T, C), float32.
        weight: Weight of LayerNorm (C,).
        bias: Bias of LayerNorm (C,).
        eps: Number that LayerNorm adds to the variance.
        edges: Channels edges[d - 1] to edges[d] are shifted by d positions, with zeros before the first position.
            Channels from the last edge on are not shifted.
        dtype: Dtype of the result, float32 or bfloat16.

    Returns:
        y (B, T, C), in `dtype`.
    """
    result: Tensor = _NormShift.apply(x, fused.numbers(weight), fused.numbers(bias), eps, edges, dtype)  # type: ignore[no-untyped-call]
    return result


def norm_mixtures(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: tuple[Tensor, ...],
    last: Tensor | None,
    dtype: torch.dtype,
    resets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Apply LayerNorm, then interpolate between each token and the previous token, once for each mixture.

    Args:
        x: Input (B, T, C), float32.
        weight: Weight of LayerNorm (C,).
        bias: Bias of LayerNorm (C,).
        eps: Number that LayerNorm adds to the variance.
        mixes: Share of the previous token in each mixture (C,).
        last: Normalized token before x (B, 1, C); None for zeros.
        dtype: Dtype of the results, float32 or bfloat16.
        resets: Whether the previous token of each token is zero (B, T) bool; None for only the first token.

    Returns:
        A mixture (B, T, C) for each entry of `mixes`, in `dtype`.

    Raises:
        ValueError: `last` or `resets` has another shape, or `resets` is not bool.
    """
    B, T, C = x.shape
    check_shapes("x", x, {"last": (last, (B, 1, C)), "resets": (resets, (B, T))})
    apply: Any = _NormMixtures.apply
    parameters = (fused.numbers(each) for each in (weight, bias, torch.stack(mixes)))
    before = None if last is None else fused.numbers(last)
    result: tuple[Tensor, ...] = apply(x, *parameters, before, eps, dtype, resets)
    return result


class _Shift(ctypes.Structure):
    _fields_ = [
        ("groups", ctypes.c_int64),
        ("edge", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in "BTC"),
    ]


class _Mixing(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", *"BTC")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "mix", "last", "resets")),
    ]


class _NormShift(torch.autograd.Function):
    """Autograd function for the kernels of ops/common/norm_shift.c."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, edges: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        x = x.contiguous()
        ctx.shift = _Shift(len(edges) - 1, (ctypes.c_int64 * len(edges))(*edges), *x.shape)
        y, mean, scale = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
        fused.call("timemix_norm_shift", y, ctx.shift, x, weight, bias, ctypes.c_float(eps), y, mean, scale)
        ctx.save_for_backward(x, weight, mean, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        # Sums over parts of the rows: (PARTS, C)
        dweight, dbias = x.new_empty(2, fused.PARTS, x.shape[-1])
        fused.call("timemix_norm_shift_back", dy, ctx.shift, x, weight, mean, scale, dy, dx, dweight, dbias)
        return dx, dweight.sum(0), dbias.sum(0), None, None, None


class _NormMixtures(torch.autograd.Function):
    """Autograd function for the kernels of ops/common/mixtures.c."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mix: Tensor,
        last: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        resets: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x, resets = x.contiguous(), None if resets is None else resets.contiguous()
        y = [torch.empty_like(x, dtype=dtype) for _ in mix]
        mean, scale = x.new_empty(2, *x.shape[:2])
        given = _mixing(x, weight, bias, mix, last, resets)
        fused.call("timemix_mixtures", y[0], given, ctypes.c_float(eps), _addresses(y), mean, scale)
        ctx.save_for_backward(x, weight, bias, mix, last, resets, mean, scale)
        return tuple(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mix, last, resets, mean, scale = ctx.saved_tensors
        dy = tuple(each.contiguous() for each in dy)
        dx, dlast = torch.empty_like(x), None if last is None else torch.empty_like(last)
        # Sums over parts of the rows: (PARTS, mixtures, C) and (PARTS, C)
        sums = [x.new_zeros(fused.PARTS, *each.shape) for each in (mix, weight, bias)]
        given = _mixing(x, weight, bias, mix, last, resets)
        fused.call("timemix_mixtures_back", dy[0], given, mean, scale, _addresses(dy), dx, dlast, *sums)
        dmix, dweight, dbias = (each.sum(0) for each in sums)
        return dx, dweight, dbias, dmix, dlast, None, None, None


def _mixing(
    x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, last: Tensor | None, resets: Tensor | None
) -> _Mixing:
    addresses = (None if each is None else each.data_ptr() for each in (x, weight, bias, mix, last, resets))
    return _Mixing(len(mix), *x.shape, *addresses)


def _addresses(tensors: Any) -> Any:
    """Return an array of the addresses of tensors, for a C function."""
    return (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))
