"""C kernels for the operations between the matrix products of a training step, forward and backward.

Each kernel makes one pass over memory:

    weigh:       source = alpha exp(k) v,   total[t] = sum_{u<=t} exp(k[u]),   gate = sigmoid(r)
    divide:      y = gate beta numerator / total
    gates:       hidden = act(k) v,   gate = sigmoid(r)
    scaled:      y = (x + bias) by
    activated:   y = act(x)
    toeplitz, diagonal_sums:  as in ops.common.causal
    norm_shift, norm_mixtures:  in ops.common.norms

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
        kvr, numbers(bias), None if alpha is None else numbers(alpha), heads
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
    result: Tensor = _Divide.apply(numerator, total, gate, None if beta is None else numbers(beta))  # type: ignore[no-untyped-call]
    return result


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


def _integers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


class _Sizes(ctypes.Structure):
    _fields_ = [*_integers("B", "T", "H", "N", "positions"), ("table", ctypes.c_void_p)]


class _Ffn(ctypes.Structure):
    _fields_ = _integers("rows", "F", "C", "activation")


class _Weigh(torch.autograd.Function):
    """Autograd function for the kernels `weigh` of ops/rwkv1/time_mix.c."""

    @staticmethod
    def forward(ctx: Any, kvr: Tensor, bias: Tensor, alpha: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        kvr = kvr.contiguous()
        B, T, H, N = *kvr.shape[:2], heads, kvr.shape[2] // 3 // heads
        source, gate = kvr.new_empty(H, T, B, N), kvr.new_empty(B, T, H, N)
        total = torch.empty_like(gate, dtype=torch.float32)
        call("timemix_weigh", kvr, _sizes(gate, alpha), kvr, bias, source, total, gate)
        ctx.save_for_backward(kvr, bias, alpha, gate)
        return source, total, gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsource: Tensor, dtotal: Tensor, dgate: Tensor) -> tuple[Tensor | None, ...]:
        kvr, bias, alpha, gate = ctx.saved_tensors
        # dbias (B, 3 C) and dalpha (B, H, T): sums over the positions of each sequence.
        dkvr, dbias, dalpha = torch.empty_like(kvr), bias.new_empty(len(kvr), len(bias)), _by_sequence(alpha, gate)
        gradients = (each.contiguous() for each in (dsource, dtotal, dgate))
        call("timemix_weigh_back", kvr, _sizes(gate, alpha), kvr, bias, gate, *gradients, dkvr, dbias, dalpha)
        return dkvr, dbias.sum(0), _sum_of_table(dalpha, alpha), None


class _Divide(torch.autograd.Function):
    """Autograd function for the kernels `divide` of ops/rwkv1/time_mix.c."""

    @staticmethod
    def forward(ctx: Any, numerator: Tensor, total: Tensor, gate: Tensor, beta: Tensor | None) -> Tensor:
        numerator, y = numerator.contiguous(), torch.empty_like(gate)
        call("timemix_divide", gate, _sizes(gate, beta), numerator, total, gate, y)
        ctx.save_for_backward(numerator, total, gate, beta)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        numerator, total, gate, beta = ctx.saved_tensors
        dnumerator, dtotal, dgate = torch.empty_like(numerator), torch.empty_like(total), torch.empty_like(gate)
        dbeta, given = _by_sequence(beta, gate), (numerator, total, gate, dy.contiguous())
        call("timemix_divide_back", gate, _sizes(gate, beta), *given, dnumerator, dtotal, dgate, dbeta)
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
