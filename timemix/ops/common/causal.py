"""Sums over the past: the running sum, and the convolution with one filter per head, in blocks of time.

Both are safe for terms of any finite size: a term that lies in the future of an output is not added to it, or meets an
exact zero, so rounding is relative to what the output itself is made of. Gradients likewise, the other way round.
Memory grows linearly with time.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common import fused
from timemix.ops.common.operators import operator

BLOCK = 256
"""Positions of a block of the convolution."""

_SUM_BLOCK = 16
_SUM_SMALL = 2**18
"""Elements below which the walk along time costs less than the calls that avoid it."""


@operator("timemix::running_sum")
def running_sum(x: Tensor, reverse: bool = False) -> Tensor:
    """Sum of x (B, T, C) over time up to each position, or, in reverse, from each position to the end.

    In blocks whose rows of channels are added whole: `torch.cumsum` walks along time, one channel after another.
    """
    if x.numel() < _SUM_SMALL:
        return x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
    y = x.clone(memory_format=torch.contiguous_format)
    _sum_in_place(y, reverse)
    return y


def _sum_in_place(y: Tensor, reverse: bool) -> None:
    """y (B, T, C), contiguous along C."""
    T = y.shape[1]
    blocks = T // _SUM_BLOCK
    if blocks < 2:
        order = range(T - 2, -1, -1) if reverse else range(1, T)
        for t in order:
            y[:, t] += y[:, t + 1 if reverse else t - 1]
        return
    even = y[:, : blocks * _SUM_BLOCK].unflatten(1, (blocks, _SUM_BLOCK))
    rest = y[:, blocks * _SUM_BLOCK :]
    if reverse:
        _sum_in_place(rest, reverse)
        if rest.shape[1]:
            even[:, -1, -1] += rest[:, 0]
        for i in range(_SUM_BLOCK - 2, -1, -1):
            even[:, :, i] += even[:, :, i + 1]
        totals = even[:, 1:, 0].clone()
        _sum_in_place(totals, reverse)
        even[:, :-1] += totals[:, :, None]
        return
    for i in range(1, _SUM_BLOCK):
        even[:, :, i] += even[:, :, i - 1]
    totals = even[:, :-1, -1].clone()
    _sum_in_place(totals, reverse)
    even[:, 1:] += totals[:, :, None]
    if rest.shape[1]:
        rest[:, 0] += even[:, -1, -1]
    _sum_in_place(rest, reverse)


@running_sum.register_fake
def _(x: Tensor, reverse: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _running_sum_setup(ctx, inputs, output) -> None:
    ctx.reverse = inputs[1]


def _running_sum_backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    return running_sum(gradient, not ctx.reverse), None


running_sum.register_autograd(_running_sum_backward, setup_context=_running_sum_setup)


@operator("timemix::toeplitz")
def toeplitz(f: Tensor, rows: int, columns: int) -> Tensor:
    """(H, rows, columns) with f(columns - rows + i - j) at [i, j], zero in the future, from f (H, ctx_len) by lag.

    With as many rows as columns W of a whole text; with fewer its last rows. The future comes from padding, so its
    gradient is cut off rather than multiplied by zero: entries up there can be infinite.
    """
    if fused.serves_lags(f, rows):
        return fused.toeplitz(f, rows, columns)
    f = F.pad(f, (0, max(0, columns - f.shape[1])))[:, :columns]
    windows = F.pad(f.flip(-1), (0, rows - 1)).unfold(-1, columns, 1)
    return _upside_down(windows)


def _upside_down(windows: Tensor) -> Tensor:
    """windows (H, rows, columns), rows in reverse: by index, as `flip` would keep their columns apart in memory."""
    rows = windows.shape[1]
    return windows[:, torch.arange(rows - 1, -1, -1, device=windows.device)]


@toeplitz.register_fake
def _(f: Tensor, rows: int, columns: int) -> Tensor:
    return f.new_empty(f.shape[0], rows, columns)


@torch.library.custom_op("timemix::toeplitz_backward", mutates_args=())
def _toeplitz_backward(gradient: Tensor, ctx_len: int) -> Tensor:
    """Gradient of f (H, ctx_len): sums over the diagonals of a lag."""
    by_lag = diagonal_sums(gradient)[:, gradient.shape[1] - 1 :]
    return of_length(by_lag, ctx_len).to(gradient.dtype)


@_toeplitz_backward.register_fake
def _(gradient: Tensor, ctx_len: int) -> Tensor:
    return gradient.new_empty(gradient.shape[0], ctx_len)


def _toeplitz_setup(ctx, inputs, output) -> None:
    ctx.ctx_len = inputs[0].shape[1]


def _toeplitz_gradient(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _toeplitz_backward(gradient, ctx.ctx_len), None, None


toeplitz.register_autograd(_toeplitz_gradient, setup_context=_toeplitz_setup)


def diagonal_sums(pairs: Tensor) -> Tensor:
    """Sums over each diagonal i - j = -(columns - 1) ... rows - 1 of pairs (H, rows, columns), in at least float32."""
    _, rows, columns = pairs.shape
    if fused.serves_lags(pairs, rows):
        return fused.diagonal_sums(pairs)
    # A row more by one entry than the others stands one place further right: diagonals become columns.
    skewed = F.pad(pairs.flip(-1), (0, rows)).flatten(1)[:, : rows * (rows + columns - 1)]
    return skewed.view(-1, rows, rows + columns - 1).sum(1, dtype=sum_dtype(pairs))


def of_length(f: Tensor, ctx_len: int) -> Tensor:
    """f (H, lags) cut, or with zeros after it."""
    return F.pad(f, (0, ctx_len - f.shape[1])) if ctx_len > f.shape[1] else f[:, :ctx_len].clone()


def sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@operator("timemix::causal_convolution")
def causal_convolution(x: Tensor, f: Tensor, last: int) -> Tensor:
    """y[t] = sum_{u<=t} f(t - u) x[u] per head, at the last positions: (B, last, H, N) from x (B, T, H, N).

    f (H, ctx_len) by lag, ctx_len at least T. Products run in x's dtype with float32 accumulation, each of a block of
    positions with all of its past: (L, U) by (U, B * N) for U = L, 2 L, ... T.
    """
    B, T, H, N = x.shape
    L, width = _block(T)
    strip = toeplitz(f.to(x.dtype), L, width)
    rows = x.permute(2, 1, 0, 3).reshape(H, T, B * N)
    parts = []
    for a in range((T - last) // L * L, T, L):
        b = min(a + L, T)
        start = width - L - a
        # Batched products of strided matrices run at half the speed; a copy costs a tenth of one.
        parts.append(strip[:, : b - a, start : start + b].contiguous() @ rows[:, :b])
    y = torch.cat(parts, 1)[:, -last:].contiguous()
    return y.view(H, last, B, N).permute(2, 1, 0, 3)


def _block(T: int) -> tuple[int, int]:
    """Positions of a block, and of all blocks together, of which the last may be filled in part."""
    L = min(BLOCK, T)
    return L, -(-T // L) * L


def _future_strip(f: Tensor, L: int, width: int) -> Tensor:
    """(H, L, width) with f(j - i) at [i, j], zero in the past: the first L columns of the whole matrix, transposed."""
    f = F.pad(f, (L - 1, max(0, width - f.shape[1])))[:, : width + L - 1]
    return _upside_down(f.unfold(-1, width, 1))


@causal_convolution.register_fake
def _(x: Tensor, f: Tensor, last: int) -> Tensor:
    B, _, H, N = x.shape
    return x.new_empty(H, last, B, N).permute(2, 1, 0, 3)


@torch.library.custom_op("timemix::causal_convolution_backward", mutates_args=())
def _causal_convolution_backward(gradient: Tensor, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and f from that of y (B, last, H, N)."""
    B, T, H, N = x.shape
    L, width = _block(T)
    dy = F.pad(gradient.permute(2, 1, 0, 3).reshape(H, -1, B * N), (0, 0, T - gradient.shape[1], 0))
    strip = _future_strip(f.to(x.dtype), L, width)
    parts = [strip[:, : min(L, T - a), : T - a].contiguous() @ dy[:, a:] for a in range(0, T, L)]
    dx = torch.cat(parts, 1).view(H, T, B, N).permute(2, 1, 0, 3)

    # Block by block of lags: all pairs of blocks that lie d blocks apart share the same L x L lags.
    blocks = width // L

    def rows_by_block(a: Tensor) -> Tensor:
        return F.pad(a, (0, 0, 0, width - T)).view(H, blocks, L, -1).transpose(1, 2).contiguous()

    target, source = rows_by_block(dy), rows_by_block(x.permute(2, 1, 0, 3).reshape(H, T, B * N))
    by_lag = torch.zeros(H, width + L - 1, dtype=sum_dtype(x), device=x.device)
    for d in range(blocks):
        later, earlier = target[:, :, d:].contiguous(), source[:, :, : blocks - d].contiguous()
        pairs = later.flatten(2) @ earlier.flatten(2).transpose(1, 2)
        by_lag[:, d * L : (d + 2) * L - 1] += diagonal_sums(pairs)
    return dx, of_length(by_lag[:, L - 1 :], f.shape[1]).to(f.dtype)


@_causal_convolution_backward.register_fake
def _(gradient: Tensor, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, N = x.shape
    return x.new_empty(H, T, B, N).permute(2, 1, 0, 3), torch.empty_like(f)


def _convolution_setup(ctx, inputs, output) -> None:
    x, f, _ = inputs
    ctx.save_for_backward(x, f)


def _convolution_gradients(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_causal_convolution_backward(gradient, *ctx.saved_tensors), None


causal_convolution.register_autograd(_convolution_gradients, setup_context=_convolution_setup)
