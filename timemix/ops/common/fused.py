"""C kernels for the operations between the matrix products of a training step, forward and backward.

Each kernel makes one pass over memory:

    gates:       hidden = act(k) v,   gate = sigmoid(r)
    scaled:      y = (x + bias) by
    activated:   y = act(x)
    toeplitz, diagonal_sums:  as in ops.common.causal
    norm_shift, norm_mixtures:  in ops.common.norms
    weigh, divide:  in ops.rwkv1.time_mix

The file fused.c lists the C files, which contain the backward formulas. The kernels also add the biases of linear maps,
and so save a pass over memory.

The kernels support matrix products in float32 and bfloat16 on the CPU. The kernels require a C compiler, and are not
used in code that torch.compile compiles. If the kernels cannot be used, the calling modules use PyTorch instead.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common.derivatives import once_differentiable
from timemix.runtime.native import library, passed

ACTIVATION_KINDS = ("gelu", "mish", "relu2", "silu")
"""Names of the activations, in the order of `enum activation` (ops/common/activations.h)."""

_TYPES = (torch.float32, torch.bfloat16)
"""Dtypes of matrix products, in the order of `enum type` (ops/common/types.h)."""

PARTS = 16
"""Number of parts in which C code sums over rows. The sums are bit-identical for any number of threads."""

ENOUGH_ROWS = 64
"""Least number of rows at which the kernels are faster than PyTorch if no gradients are needed.

Each call of the kernels concatenates weights. With fewer rows, the concatenation takes longer than the kernels save."""

_left_out = False


def serves(x: Tensor) -> bool:
    """Return whether to use the C kernels of this module in a model.

    Args:
        x: Input of a sublayer (..., C).

    Returns:
        False if the kernels do not support the tensor or are slower than PyTorch.
    """
    return (
        _takes(x)
        and (torch.is_grad_enabled() or x.shape[:-1].numel() >= ENOUGH_ROWS)
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") not in _TYPES)
    )


def serves_lags(x: Tensor, rows: int) -> bool:
    """Return whether to use `toeplitz` and `diagonal_sums` of this module.

    Args:
        x: A tensor with the dtype and device of the matrices.
        rows: Number of rows of a matrix.

    Returns:
        False if the kernels do not support the tensor or are slower than PyTorch.
    """
    return rows >= ENOUGH_ROWS and _takes(x)


def _takes(x: Tensor) -> bool:
    """Return whether the kernels are enabled and available, and support the dtype and device of x."""
    return (
        x.dtype in _TYPES
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _left_out
        and available()
    )


def available() -> bool:
    """Return whether the C code can be compiled and loaded.

    Returns:
        False if there is no C compiler, or compiling or loading failed.
    """
    return _library()[0] is not None


def trains(precision: str, device: torch.device) -> bool:
    """Return whether the C code computes training steps.

    Args:
        precision: Precision of matrix products, such as "bfloat16".
        device: Device of the model.

    Returns:
        False if the precision or the device is not supported, or the C code cannot be compiled or loaded.
    """
    return precision in ("float32", "bfloat16") and device.type == "cpu" and available()


@contextmanager
def left_out() -> Iterator[None]:
    """Disable the C kernels in a `with` block, for hooks on single linear maps or to measure PyTorch alone."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


def gates(kvr: Tensor, bias: Tensor, channels: int, activation: str) -> tuple[Tensor, Tensor]:
    """Compute the hidden values and gate of a channel-mix.

    Args:
        kvr: k (F), v (F) and r (C) side by side, without bias (..., 2 F + C).
        bias: Biases of k, v and r (2 F + C,).
        channels: C.
        activation: A name in `ACTIVATION_KINDS`.

    Returns:
        hidden = act(k) v (..., F), and gate = sigmoid(r) (..., C).
    """
    result: tuple[Tensor, Tensor] = _Gates.apply(kvr, numbers(bias), channels, activation)  # type: ignore[no-untyped-call]
    return result


def scaled(x: Tensor, bias: Tensor, by: Tensor) -> Tensor:
    """Add a bias to x, then multiply by a factor: y = (x + bias) * by.

    Args:
        x: Input (..., C), or (B, T, C) if `by` has one factor for each position.
        bias: Bias (C,).
        by: Factors in the shape of x, or one factor for each position (ctx_len,), ctx_len >= T.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        ValueError: There are fewer factors than positions.
    """
    if by.ndim == 1 and len(by) < x.shape[1]:
        raise ValueError(f"by has {len(by)} factors for {x.shape[1]} positions; pass one for each position")
    result: Tensor = _Scaled.apply(x, numbers(bias), numbers(by) if by.ndim == 1 else by.to(x.dtype))  # type: ignore[no-untyped-call]
    return result


def activated(x: Tensor, activation: str) -> Tensor:
    """Apply an activation.

    Args:
        x: Input of any shape, float32 or bfloat16.
        activation: A name in `ACTIVATION_KINDS`.

    Returns:
        act(x), in the shape and dtype of x.
    """
    result: Tensor = _Activated.apply(x, ACTIVATION_KINDS.index(activation))  # type: ignore[no-untyped-call]
    return result


def toeplitz(f: Tensor, rows: int, columns: int) -> Tensor:
    """Create matrices from curves, as `causal.toeplitz` does, without gradients.

    Args:
        f: Curves (H, ctx_len) by lag.
        rows: Number of rows, at most `columns`.
        columns: Number of positions.

    Returns:
        W (H, rows, columns).
    """
    matrices = f.new_empty(len(f), rows, columns)
    call("timemix_toeplitz", f, *map(ctypes.c_int64, (*matrices.shape, f.shape[1])), f.contiguous(), matrices)
    return matrices


def diagonal_sums(pairs: Tensor) -> Tensor:
    """Sum over diagonals, as `causal.diagonal_sums` does, without gradients.

    Args:
        pairs: Matrices (H, rows, columns).

    Returns:
        Sums (H, rows + columns - 1), float32.
    """
    H, rows, columns = pairs.shape
    sums = pairs.new_empty(H, rows + columns - 1, dtype=torch.float32)
    call("timemix_diagonal_sums", pairs, *map(ctypes.c_int64, pairs.shape), pairs.contiguous(), sums)
    return sums


def numbers(x: Tensor) -> Tensor:
    """Convert a parameter to contiguous float32, the format of parameters in the C code.

    Args:
        x: The parameter.

    Returns:
        x, or a copy of x.
    """
    return x.float().contiguous()


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """Compile and load fused.c. Return the library and the compiler, or None and the reason for the failure."""
    # The flag -fno-finite-math-only preserves NaN, because a NaN shows that a run diverged.
    return library(Path(__file__).with_name("fused.c"), "-fno-finite-math-only", f"-DPARTS={PARTS}")


def call(name: str, like: Tensor, *arguments: Any) -> Any:
    """Call a C function of fused.c.

    Args:
        name: Name of the function.
        like: Tensor whose dtype the function gets as `type`.
        *arguments: Contiguous tensors and structures, passed by address; None, passed as NULL; numbers of ctypes.

    Returns:
        The result of the function.
    """
    code, _ = _library()
    assert code is not None
    first = (_TYPES.index(like.dtype), torch.get_num_threads())
    return getattr(code, name)(*map(ctypes.c_int64, first), *map(passed, arguments))


class _Ffn(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "F", "C", "activation")]


class _Gates(torch.autograd.Function):
    """Autograd function for the kernels of ops/common/gates.c."""

    @staticmethod
    def forward(ctx: Any, kvr: Tensor, bias: Tensor, channels: int, activation: str) -> tuple[Tensor, Tensor]:
        kvr = kvr.contiguous()
        rows, hidden_size = kvr.shape[:-1], (kvr.shape[-1] - channels) // 2
        hidden, gate = kvr.new_empty(*rows, hidden_size), kvr.new_empty(*rows, channels)
        ctx.ffn = _Ffn(rows.numel(), hidden_size, channels, ACTIVATION_KINDS.index(activation))
        call("timemix_gates", kvr, ctx.ffn, kvr, bias, hidden, gate)
        ctx.save_for_backward(kvr, bias, gate)
        return hidden, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor, dgate: Tensor) -> tuple[Tensor | None, ...]:
        kvr, bias, gate = ctx.saved_tensors
        dkvr, dbias = torch.empty_like(kvr), bias.new_empty(PARTS, len(bias))
        gradients = (each.contiguous() for each in (dhidden, dgate))
        call("timemix_gates_back", kvr, ctx.ffn, kvr, bias, gate, *gradients, dkvr, dbias)
        return dkvr, dbias.sum(0), None, None


class _Scaled(torch.autograd.Function):
    """Autograd function for the kernels of ops/common/scale.c."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, by: Tensor) -> Tensor:
        x, by = x.contiguous(), by.contiguous()
        y = torch.empty_like(x)
        call("timemix_scale", x, *_rows(x, by), x, bias, *_gate_and_gamma(by, by), y)
        ctx.save_for_backward(x, bias, by)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, by = ctx.saved_tensors
        dy, dx, dbias = dy.contiguous(), torch.empty_like(x), bias.new_empty(PARTS, len(bias))
        dby = by.new_empty(x.shape[:2] if by.ndim == 1 else x.shape)
        outputs = (dx, dbias, *_gate_and_gamma(dby, by))
        call("timemix_scale_back", x, *_rows(x, by), x, bias, *_gate_and_gamma(by, by), dy, *outputs)
        if by.ndim == 1:
            # (B, T) -> (ctx_len,)
            dby = F.pad(dby.sum(0), (0, len(by) - dby.shape[1]))
        return dx, dbias.sum(0), dby


def _rows(x: Tensor, by: Tensor) -> Iterator[ctypes.c_int64]:
    """Return B, T and C if `by` has one factor for each position, else B T, 1 and C."""
    sizes = x.shape if by.ndim == 1 else (x.shape[:-1].numel(), 1, x.shape[-1])
    return map(ctypes.c_int64, sizes)


def _gate_and_gamma(x: Tensor, by: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return (None, x) if `by` is a gamma (ctx_len,), or (x, None) if `by` is a gate."""
    return (None, x) if by.ndim == 1 else (x, None)


class _Activated(torch.autograd.Function):
    """Autograd function for the kernels of ops/common/activate.c."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int) -> Tensor:
        x = x.contiguous()
        ctx.sizes = ctypes.c_int64(x.numel()), ctypes.c_int64(kind)
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        call("timemix_activate", x, *ctx.sizes, x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        call("timemix_activate_back", x, *ctx.sizes, x, dy.contiguous(), dx)
        return dx, None
