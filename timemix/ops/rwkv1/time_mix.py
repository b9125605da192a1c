"""C kernels of the time-mix of 2021 around its causal sums, forward and backward.

    weigh:   source = alpha exp(k) v,   total[t] = sum_{u<=t} exp(k[u]),   gate = sigmoid(r)
    divide:  y = gate beta numerator / total

The kernels are in time_mix.c. A model uses them if `ops.common.fused.serves(x)` is true for its input x.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common import fused
from timemix.ops.common.derivatives import once_differentiable


class _Sizes(ctypes.Structure):
    """The structure `sizes` of time_mix.c, field by field."""

    _fields_ = [*((name, ctypes.c_int64) for name in ("B", "T", "H", "N", "positions")), ("table", ctypes.c_void_p)]


def weigh(kvr: Tensor, bias: Tensor, alpha: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the sources, denominator and gate of a time-mix. k is clamped as in `wkv1`.

    Args:
        kvr: k, v and r side by side, without bias (B, T, 3 C).
        bias: Biases of k, v and r (3 C,).
        alpha: Weight of each source position (H, ctx_len); None: all weights are 1.
        heads: H.

    Returns:
        The tuple (source, total, gate). source is alpha exp(k) v (H, T, B, N). total is the running sum of exp(k) (B,
        T, H, N) in float32. gate is sigmoid(r) (B, T, H, N).
    """
    result: tuple[Tensor, Tensor, Tensor] = _Weigh.apply(  # type: ignore[no-untyped-call]
        kvr, fused.numbers(bias), None if alpha is None else fused.numbers(alpha), heads
    )
    return result


def divide(numerator: Tensor, total: Tensor, gate: Tensor, beta: Tensor | None) -> Tensor:
    """Compute gate beta numerator / total, the output of a time-mix.

    Args:
        numerator: Weighted sums of the sources (H, T, B, N).
        total: Denominator (B, T, H, N), from `weigh`.
        gate: Gate (B, T, H, N), from `weigh`.
        beta: Weight of each target position (H, ctx_len); None: all weights are 1.

    Returns:
        y (B, T, H, N), in the dtype of `gate`.
    """
    result: Tensor = _Divide.apply(numerator, total, gate, None if beta is None else fused.numbers(beta))  # type: ignore[no-untyped-call]
    return result


class _Weigh(torch.autograd.Function):
    """Autograd function for the kernels `weigh` of ops/rwkv1/time_mix.c."""

    @staticmethod
    def forward(ctx: Any, kvr: Tensor, bias: Tensor, alpha: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        kvr = kvr.contiguous()
        B, T, H, N = *kvr.shape[:2], heads, kvr.shape[2] // 3 // heads
        source, gate = kvr.new_empty(H, T, B, N), kvr.new_empty(B, T, H, N)
        total = torch.empty_like(gate, dtype=torch.float32)
        fused.call("timemix_weigh", kvr, _sizes(gate, alpha), kvr, bias, source, total, gate)
        ctx.save_for_backward(kvr, bias, alpha, gate)
        return source, total, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsource: Tensor, dtotal: Tensor, dgate: Tensor) -> tuple[Tensor | None, ...]:
        kvr, bias, alpha, gate = ctx.saved_tensors
        # dbias (B, 3 C) and dalpha (B, H, T): sums over the positions of each sequence.
        dkvr, dbias, dalpha = torch.empty_like(kvr), bias.new_empty(len(kvr), len(bias)), _by_sequence(alpha, gate)
        gradients = (each.contiguous() for each in (dsource, dtotal, dgate))
        fused.call("timemix_weigh_back", kvr, _sizes(gate, alpha), kvr, bias, gate, *gradients, dkvr, dbias, dalpha)
        return dkvr, dbias.sum(0), _sum_of_table(dalpha, alpha), None


class _Divide(torch.autograd.Function):
    """Autograd function for the kernels `divide` of ops/rwkv1/time_mix.c."""

    @staticmethod
    def forward(ctx: Any, numerator: Tensor, total: Tensor, gate: Tensor, beta: Tensor | None) -> Tensor:
        numerator, y = numerator.contiguous(), torch.empty_like(gate)
        fused.call("timemix_divide", gate, _sizes(gate, beta), numerator, total, gate, y)
        ctx.save_for_backward(numerator, total, gate, beta)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        numerator, total, gate, beta = ctx.saved_tensors
        dnumerator, dtotal, dgate = torch.empty_like(numerator), torch.empty_like(total), torch.empty_like(gate)
        dbeta, given = _by_sequence(beta, gate), (numerator, total, gate, dy.contiguous())
        fused.call("timemix_divide_back", gate, _sizes(gate, beta), *given, dnumerator, dtotal, dgate, dbeta)
        return dnumerator, dtotal, dgate, _sum_of_table(dbeta, beta)


def _sizes(gate: Tensor, table: Tensor | None) -> _Sizes:
    """Return the sizes of gate (B, T, H, N) and the address of alpha or beta, in a C structure."""
    return _Sizes(*gate.shape, *((0, None) if table is None else (table.shape[1], table.data_ptr())))


def _by_sequence(table: Tensor | None, gate: Tensor) -> Tensor | None:
    """Allocate the gradient of a table for each sequence (B, H, T)."""
    B, T, H, _ = gate.shape
    return None if table is None else table.new_empty(B, H, T)


def _sum_of_table(by_sequence: Tensor | None, table: Tensor | None) -> Tensor | None:
    """Sum the gradient of a table over the sequences."""
    if by_sequence is None or table is None:
        return None
    # (B, H, T) -> (H, ctx_len)
    return F.pad(by_sequence.sum(0), (0, table.shape[1] - by_sequence.shape[2]))
