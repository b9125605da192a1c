"""What lies between the matrix products of a training step, in C: one pass over memory each.

For products in float32 and bfloat16 on the CPU, where a C compiler is found, and for code that torch does not compile.
The modules that call these functions say the same in torch, for all else.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from timemix.runtime.native import library

ACTIVATION_KINDS = ("gelu", "mish", "relu2", "silu")
"""In the order of the C code, here and in models/step.c."""

_TYPES = (torch.float32, torch.bfloat16)
_PARTS = 16

ENOUGH_ROWS = 64
"""Rows from which it pays without gradients too, where weights are joined for each call."""

_left_out = False


def serves(x: Tensor) -> bool:
    """Whether the fused form is to be taken for x (..., C)."""
    return (
        (torch.is_grad_enabled() or x.shape[:-1].numel() >= ENOUGH_ROWS)
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") not in _TYPES)
        and _takes(x)
    )


def serves_lags(x: Tensor, rows: int) -> bool:
    """Whether `toeplitz` and `diagonal_sums` here are to be taken for matrices of so many rows, of the type of x."""
    return rows >= ENOUGH_ROWS and _takes(x)


def _takes(x: Tensor) -> bool:
    return (
        x.dtype in _TYPES
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _left_out
        and available()
    )


def available() -> bool:
    """Whether the C code could be compiled."""
    return _library()[0] is not None


@contextmanager
def left_out() -> Iterator[None]:
    """Within it nothing is fused: for hooks on single maps, and for torch's own speed."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


def norm_shift(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, edges: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """LayerNorm of x (B, T, C) float32, then token-shift, in `dtype`.

    Channels edges[d - 1] to edges[d] come from d positions back, zeros before the first; those after the last edge from
    their own.
    """
    return _NormShift.apply(x, _numbers(weight), _numbers(bias), eps, edges, dtype)


def weigh(kvr: Tensor, bias: Tensor, alpha: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of k, v and r side by side, kvr (B, T, 3 C) + bias (3 C,), what time-mix sums, what it divides by, and its gate.

    alpha exp(k) v (H, T, B, N), the running sum of exp(k), in float32, and sigmoid(r), both (B, T, H, N). k is clamped
    as in `wkv1`; alpha (H, ctx_len), None for 1.
    """
    return _Weigh.apply(kvr, _numbers(bias), None if alpha is None else _numbers(alpha), heads)


def divide(numerator: Tensor, total: Tensor, gate: Tensor, beta: Tensor | None) -> Tensor:
    """gate beta numerator / total (B, T, H, N), from numerator (H, T, B, N); beta (H, ctx_len), None for 1."""
    return _Divide.apply(numerator, total, gate, None if beta is None else _numbers(beta))


def gates(kvr: Tensor, bias: Tensor, channels: int, activation: str) -> tuple[Tensor, Tensor]:
    """Of k (F), v (F) and r (`channels`) side by side, kvr + bias: activation(k) v (..., F), and sigmoid(r)."""
    return _Gates.apply(kvr, _numbers(bias), channels, activation)


def scaled(x: Tensor, bias: Tensor, by: Tensor) -> Tensor:
    """(x + bias) by, for x (..., C) and `by` of its shape; or x (B, T, C) and one number for each position (ctx_len,).

    Raises ValueError for fewer numbers than positions.
    """
    if by.ndim == 1 and len(by) < x.shape[1]:
        raise ValueError(f"{len(by)} numbers are too few for {x.shape[1]} positions")
    return _Scaled.apply(x, _numbers(bias), _numbers(by) if by.ndim == 1 else by.to(x.dtype))


def toeplitz(f: Tensor, rows: int, columns: int) -> Tensor:
    """As `causal.toeplitz`, without gradients; at most as many rows as columns."""
    matrices = f.new_empty(len(f), rows, columns)
    _call("timemix_toeplitz", f, *map(ctypes.c_int64, (*matrices.shape, f.shape[1])), f.contiguous(), matrices)
    return matrices


def diagonal_sums(pairs: Tensor) -> Tensor:
    """As `causal.diagonal_sums`, in float32, without gradients."""
    H, rows, columns = pairs.shape
    sums = pairs.new_empty(H, rows + columns - 1, dtype=torch.float32)
    _call("timemix_diagonal_sums", pairs, *map(ctypes.c_int64, pairs.shape), pairs.contiguous(), sums)
    return sums


def _numbers(x: Tensor) -> Tensor:
    """What the C code reads as float32, one after the other."""
    return x.float().contiguous()


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    # What is not a number must stay so: it tells of a run that diverged.
    return library(Path(__file__).with_name("fused.c"), "-fno-finite-math-only", f"-DPARTS={_PARTS}")


def _call(name: str, like: Tensor, *arguments: Any) -> Any:
    """A function of fused.c, for products of the type of `like`; tensors are passed by their address, None as NULL."""
    code, _ = _library()
    assert code is not None
    first = (_TYPES.index(like.dtype), torch.get_num_threads())
    return getattr(code, name)(*map(ctypes.c_int64, first), *map(_passed, arguments))


def _passed(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument


def _integers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


class _Shift(ctypes.Structure):
    _fields_ = [*_integers("groups"), ("edge", ctypes.POINTER(ctypes.c_int64)), *_integers("B", "T", "C")]


class _Sizes(ctypes.Structure):
    _fields_ = [*_integers("B", "T", "H", "N", "positions"), ("table", ctypes.c_void_p)]


class _Ffn(ctypes.Structure):
    _fields_ = _integers("rows", "F", "C", "activation")


class _NormShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, edges: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        x = x.contiguous()
        ctx.shift = _Shift(len(edges) - 1, (ctypes.c_int64 * len(edges))(*edges), *x.shape)
        y, mean, scale = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
        _call("timemix_norm_shift", y, ctx.shift, x, weight, bias, ctypes.c_float(eps), y, mean, scale)
        ctx.save_for_backward(x, weight, mean, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        dweight, dbias = x.new_empty(2, _PARTS, x.shape[-1])
        _call("timemix_norm_shift_back", dy, ctx.shift, x, weight, mean, scale, dy, dx, dweight, dbias)
        return dx, dweight.sum(0), dbias.sum(0), None, None, None


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kvr: Tensor, bias: Tensor, alpha: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        kvr = kvr.contiguous()
        B, T, H, N = *kvr.shape[:2], heads, kvr.shape[2] // 3 // heads
        source, gate = kvr.new_empty(H, T, B, N), kvr.new_empty(B, T, H, N)
        total = torch.empty_like(gate, dtype=torch.float32)
        _call("timemix_weigh", kvr, _sizes(gate, alpha), kvr, bias, source, total, gate)
        ctx.save_for_backward(kvr, bias, alpha, gate)
        return source, total, gate

    @staticmethod
    @once_differentiable
    def backward(ctx, dsource: Tensor, dtotal: Tensor, dgate: Tensor) -> tuple[Tensor | None, ...]:
        kvr, bias, alpha, gate = ctx.saved_tensors
        dkvr, dbias, dalpha = torch.empty_like(kvr), bias.new_empty(len(kvr), len(bias)), _by_text(alpha, gate)
        gradients = (each.contiguous() for each in (dsource, dtotal, dgate))
        _call("timemix_weigh_back", kvr, _sizes(gate, alpha), kvr, bias, gate, *gradients, dkvr, dbias, dalpha)
        return dkvr, dbias.sum(0), _of_table(dalpha, alpha), None


class _Divide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numerator: Tensor, total: Tensor, gate: Tensor, beta: Tensor | None) -> Tensor:
        numerator, y = numerator.contiguous(), torch.empty_like(gate)
        _call("timemix_divide", gate, _sizes(gate, beta), numerator, total, gate, y)
        ctx.save_for_backward(numerator, total, gate, beta)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        numerator, total, gate, beta = ctx.saved_tensors
        dnumerator, dtotal, dgate = torch.empty_like(numerator), torch.empty_like(total), torch.empty_like(gate)
        dbeta, given = _by_text(beta, gate), (numerator, total, gate, dy.contiguous())
        _call("timemix_divide_back", gate, _sizes(gate, beta), *given, dnumerator, dtotal, dgate, dbeta)
        return dnumerator, dtotal, dgate, _of_table(dbeta, beta)


def _sizes(gate: Tensor, table: Tensor | None) -> _Sizes:
    return _Sizes(*gate.shape, *((0, None) if table is None else (table.shape[1], table.data_ptr())))


def _by_text(table: Tensor | None, gate: Tensor) -> Tensor | None:
    """Room for each text's part of the gradient of a table (B, H, T)."""
    B, T, H, _ = gate.shape
    return None if table is None else table.new_empty(B, H, T)


def _of_table(by_text: Tensor | None, table: Tensor | None) -> Tensor | None:
    if by_text is None or table is None:
        return None
    return F.pad(by_text.sum(0), (0, table.shape[1] - by_text.shape[2]))


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kvr: Tensor, bias: Tensor, channels: int, activation: str) -> tuple[Tensor, Tensor]:
        kvr = kvr.contiguous()
        rows, hidden_size = kvr.shape[:-1], (kvr.shape[-1] - channels) // 2
        hidden, gate = kvr.new_empty(*rows, hidden_size), kvr.new_empty(*rows, channels)
        ctx.ffn = _Ffn(rows.numel(), hidden_size, channels, ACTIVATION_KINDS.index(activation))
        _call("timemix_gates", kvr, ctx.ffn, kvr, bias, hidden, gate)
        ctx.save_for_backward(kvr, bias, gate)
        return hidden, gate

    @staticmethod
    @once_differentiable
    def backward(ctx, dhidden: Tensor, dgate: Tensor) -> tuple[Tensor | None, ...]:
        kvr, bias, gate = ctx.saved_tensors
        dkvr, dbias = torch.empty_like(kvr), bias.new_empty(_PARTS, len(bias))
        gradients = (each.contiguous() for each in (dhidden, dgate))
        _call("timemix_gates_back", kvr, ctx.ffn, kvr, bias, gate, *gradients, dkvr, dbias)
        return dkvr, dbias.sum(0), None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor, by: Tensor) -> Tensor:
        x, by = x.contiguous(), by.contiguous()
        y = torch.empty_like(x)
        _call("timemix_scale", x, *_rows(x, by), x, bias, *_gate_and_gamma(by, by), y)
        ctx.save_for_backward(x, bias, by)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, by = ctx.saved_tensors
        dy, dx, dbias = dy.contiguous(), torch.empty_like(x), bias.new_empty(_PARTS, len(bias))
        dby = by.new_empty(x.shape[:2] if by.ndim == 1 else x.shape)
        outputs = (dx, dbias, *_gate_and_gamma(dby, by))
        _call("timemix_scale_back", x, *_rows(x, by), x, bias, *_gate_and_gamma(by, by), dy, *outputs)
        if by.ndim == 1:
            dby = F.pad(dby.sum(0), (0, len(by) - dby.shape[1]))
        return dx, dbias.sum(0), dby


def _rows(x: Tensor, by: Tensor) -> Iterator[ctypes.c_int64]:
    """B, T and C, as far as the rows differ by position."""
    sizes = x.shape if by.ndim == 1 else (x.shape[:-1].numel(), 1, x.shape[-1])
    return map(ctypes.c_int64, sizes)


def _gate_and_gamma(x: Tensor, by: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """x in the place of the two that is that of `by`."""
    return (None, x) if by.ndim == 1 else (x, None)
