"""Sums over past positions.

    running sum:         y[t] = sum_{u<=t} x[u]
    Toeplitz matrix:     W[t, u] = f(t-u), 0 for u > t
    causal convolution:  y[t] = sum_{u<=t} f(t-u) x[u]

The running sum is separate for each channel. Each head has a curve f, which depends on the lag t - u. The convolution
is computed in blocks of L = 256 outputs. The outputs at positions a to a+L-1 are the product of an (L, a+L) strip of W
with x[0], ..., x[a+L-1]. As W depends on the lag alone, all strips are parts of one (L, T) matrix, so memory grows
linearly with T.

The running sum and the convolution are accurate for terms of any finite size. Terms from the future of an output are
left out of the sum or multiplied by an exact zero, so they add no rounding error to the output. In gradients, terms
from the past are left out or multiplied by an exact zero.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common import fused
from timemix.ops.common.operators import operator

BLOCK = 256
"""L, the number of positions in a block of the convolution."""

_SUM_BLOCK = 16
"""Number of positions in a block of the running sum."""

_SUM_SMALL = 2**18
"""Number of elements below which `torch.cumsum` is faster than a sum in blocks."""


@operator("timemix::running_sum")
def running_sum(x: Tensor, reverse: bool) -> Tensor:
    """Sum over time: y[t] = sum_{u<=t} x[u].

    The sum is computed in blocks of positions, by additions of whole rows of channels. `torch.cumsum` is slower: it
    sums one channel after another, with strided memory access.

    Args:
        x: Terms (B, T, C).
        reverse: Whether to sum over u >= t instead of u <= t.

    Returns:
        y (B, T, C), in x's dtype.
    """
    if x.numel() < _SUM_SMALL:
        return x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
    y = x.clone(memory_format=torch.contiguous_format)
    _sum_in_place(y, reverse)
    return y


def _sum_in_place(y: Tensor, reverse: bool) -> None:
    """Replace y (B, T, C), contiguous along C, by its running sum.

    First, the running sum within each block is computed for all blocks at once. A recursive call then computes the
    running sum of the block totals. Finally, the total of all earlier blocks is added to each block.
    """
    T = y.shape[1]
    blocks = T // _SUM_BLOCK
    if blocks < 2:
        order = range(T - 2, -1, -1) if reverse else range(1, T)
        for t in order:
            y[:, t] += y[:, t + 1 if reverse else t - 1]
        return
    # (B, T, C) -> (B, blocks, _SUM_BLOCK, C), and the remaining positions
    even = y[:, : blocks * _SUM_BLOCK].unflatten(1, (blocks, _SUM_BLOCK))
    rest = y[:, blocks * _SUM_BLOCK :]
    # totals: (B, blocks - 1, C)
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
def _(x: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _running_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.reverse = inputs[1]


def _running_sum_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return running_sum(gradient, not ctx.reverse), None


running_sum.register_autograd(_running_sum_backward, setup_context=_running_sum_setup)


@operator("timemix::toeplitz")
def toeplitz(f: Tensor, rows: int, columns: int) -> Tensor:
    """Create matrices from curves: W[i, j] = f(columns - rows + i - j), 0 for a negative lag.

    With rows = columns, the result is W for a whole text. With fewer rows than columns, the result is the last rows of
    W. The zeros for future positions are padding, so their gradient is dropped. The gradient of padding can be
    infinite, and multiplying an infinite gradient by zero would give NaN.

    Args:
        f: Curves (H, ctx_len) by lag. At lags from ctx_len on, f is 0.
        rows: Number of rows, at most `columns`.
        columns: Number of past and present positions.

    Returns:
        W (H, rows, columns).
    """
    if fused.serves_lags(f, rows):
        return fused.toeplitz(f, rows, columns)
    f = F.pad(f, (0, max(0, columns - f.shape[1])))[:, :columns]
    # Window i of [f(columns-1) ... f(0), 0 ... 0] is row rows-1-i: (H, columns + rows - 1) -> (H, rows, columns)
    windows = F.pad(f.flip(-1), (0, rows - 1)).unfold(-1, columns, 1)
    return _upside_down(windows)


def _upside_down(windows: Tensor) -> Tensor:
    """Reverse the rows of windows (H, rows, columns)."""
    rows = windows.shape[1]
    # Indexing returns contiguous rows. `flip` would keep the strides of the view, whose rows are not contiguous.
    return windows[:, torch.arange(rows - 1, -1, -1, device=windows.device)]


@toeplitz.register_fake
def _(f: Tensor, rows: int, columns: int) -> Tensor:
    return f.new_empty(f.shape[0], rows, columns)


@operator("timemix::toeplitz_backward")
def _toeplitz_backward(gradient: Tensor, ctx_len: int) -> Tensor:
    """Compute df(lag), the sum of dW[i, j] over the diagonal of each lag: (H, rows, columns) -> (H, ctx_len)."""
    by_lag = diagonal_sums(gradient)[:, gradient.shape[1] - 1 :]
    return of_length(by_lag, ctx_len).to(gradient.dtype)


@_toeplitz_backward.register_fake
def _(gradient: Tensor, ctx_len: int) -> Tensor:
    return gradient.new_empty(gradient.shape[0], ctx_len)


def _toeplitz_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.ctx_len = inputs[0].shape[1]


def _toeplitz_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _toeplitz_backward(gradient, ctx.ctx_len), None, None


toeplitz.register_autograd(_toeplitz_gradient, setup_context=_toeplitz_setup)


def diagonal_sums(pairs: Tensor) -> Tensor:
    """Sum over diagonals: sums[d] = sum of pairs[i, j] over i - j = d, for d from 1 - columns to rows - 1.

    Args:
        pairs: Matrices (H, rows, columns).

    Returns:
        Sums (H, rows + columns - 1), in at least float32.
    """
    _, rows, columns = pairs.shape
    if fused.serves_lags(pairs, rows):
        return fused.diagonal_sums(pairs)
    # Each row is padded to rows + columns entries. The matrix is then viewed as rows with rows + columns - 1 entries.
    # So each row moves one column further right than the row above, and diagonals become columns:
    # (H, rows, rows + columns - 1)
    skewed = F.pad(pairs.flip(-1), (0, rows)).flatten(1)[:, : rows * (rows + columns - 1)]
    return skewed.view(-1, rows, rows + columns - 1).sum(1, dtype=sum_dtype(pairs))


def of_length(f: Tensor, ctx_len: int) -> Tensor:
    """Cut f (H, lags), or pad f with zeros, to (H, ctx_len).

    Args:
        f: Curves (H, lags) by lag.
        ctx_len: Number of lags of the result.

    Returns:
        A new tensor (H, ctx_len).
    """
    return F.pad(f, (0, ctx_len - f.shape[1])) if ctx_len > f.shape[1] else f[:, :ctx_len].clone()


def sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for sums of products of x.

    Args:
        x: The tensor.

    Returns:
        float64 if x is float64, else float32.
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@operator("timemix::causal_convolution")
def causal_convolution(x: Tensor, f: Tensor, last: int) -> Tensor:
    """Convolve x with one curve per head, at the last positions: y[t] = sum_{u<=t} f(t-u) x[u].

    Matrix products run in x's dtype with float32 accumulation. Each block of L outputs takes one product, of shapes
    (L, U) and (U, B N), where U = L, 2 L, ..., T.

    Args:
        x: Sources (B, T, H, N).
        f: Curves (H, ctx_len) by lag, ctx_len >= T.
        last: Number of outputs, 1 to T.

    Returns:
        y (B, last, H, N), in x's dtype.
    """
    B, T, H, N = x.shape
    L, width = _block(T)
    # The last L rows of W for `width` positions: (H, L, width). Earlier blocks use the right part of this strip.
    strip = toeplitz(f.to(x.dtype), L, width)
    # (B, T, H, N) -> (H, T, B N)
    rows = x.permute(2, 1, 0, 3).reshape(H, T, B * N)
    parts = []
    for a in range((T - last) // L * L, T, L):
        b = min(a + L, T)
        # Column `start` of the strip belongs to source 0: entry [i, start] is f(a + i).
        start = width - L - a
        # The strip is copied, because batched products of strided matrices run at half the speed. The copy takes a
        # tenth of the time of the product.
        # (H, b - a, b) by (H, b, B N) -> (H, b - a, B N)
        parts.append(strip[:, : b - a, start : start + b].contiguous() @ rows[:, :b])
    y = torch.cat(parts, 1)[:, -last:].contiguous()
    # (H, last, B N) -> (B, last, H, N)
    return y.view(H, last, B, N).permute(2, 1, 0, 3)


def _block(T: int) -> tuple[int, int]:
    """Return L, the number of positions in a block, and T rounded up to a multiple of L, the number in all blocks."""
    L = min(BLOCK, T)
    return L, -(-T // L) * L


def _future_strip(f: Tensor, L: int, width: int) -> Tensor:
    """Return the transpose of the first L columns of W: (H, L, width) with f(j - i) at [i, j], 0 for j < i."""
    f = F.pad(f, (L - 1, max(0, width - f.shape[1])))[:, : width + L - 1]
    return _upside_down(f.unfold(-1, width, 1))


@causal_convolution.register_fake
def _(x: Tensor, f: Tensor, last: int) -> Tensor:
    B, _, H, N = x.shape
    return x.new_empty(H, last, B, N).permute(2, 1, 0, 3)


@operator("timemix::causal_convolution_backward")
def _causal_convolution_backward(gradient: Tensor, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x and f from dy (B, last, H, N).

    dx[u]   = sum_{t>=u} f(t-u) dy[t]
    df(lag) = sum_t dy[t] . x[t-lag]        summed over the batch and the channels of the head
    """
    B, T, H, N = x.shape
    L, width = _block(T)
    # (B, last, H, N) -> (H, T, B N), zeros before the last positions
    dy = F.pad(gradient.permute(2, 1, 0, 3).reshape(H, gradient.shape[1], B * N), (0, 0, T - gradient.shape[1], 0))
    strip = _future_strip(f.to(x.dtype), L, width)
    # For each block of L sources that starts at a: (H, L, T - a) by (H, T - a, B N) -> (H, L, B N)
    parts = [strip[:, : min(L, T - a), : T - a].contiguous() @ dy[:, a:] for a in range(0, T, L)]
    dx = torch.cat(parts, 1).view(H, T, B, N).permute(2, 1, 0, 3)

    # All pairs of blocks at a distance of d blocks have the same L x L lags. So one product covers all these pairs, and
    # the diagonals of the product are the lags from d L - L + 1 to d L + L - 1.
    blocks = width // L

    def rows_by_block(a: Tensor) -> Tensor:
        # (H, T, B N) -> (H, L, blocks, B N)
        return F.pad(a, (0, 0, 0, width - T)).view(H, blocks, L, B * N).transpose(1, 2).contiguous()

    target, source = rows_by_block(dy), rows_by_block(x.permute(2, 1, 0, 3).reshape(H, T, B * N))
    by_lag = torch.zeros(H, width + L - 1, dtype=sum_dtype(x), device=x.device)
    for d in range(blocks):
        later, earlier = target[:, :, d:].contiguous(), source[:, :, : blocks - d].contiguous()
        # (H, L, (blocks - d) B N) by its transpose: (H, L, L), summed over pairs of blocks, batch and channels
        pairs = later.flatten(2) @ earlier.flatten(2).transpose(1, 2)
        # by_lag[L - 1 + lag]
        by_lag[:, d * L : (d + 2) * L - 1] += diagonal_sums(pairs)
    return dx, of_length(by_lag[:, L - 1 :], f.shape[1]).to(f.dtype)


@_causal_convolution_backward.register_fake
def _(gradient: Tensor, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, N = x.shape
    return x.new_empty(H, T, B, N).permute(2, 1, 0, 3), torch.empty_like(f)


def _convolution_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, f, _ = inputs
    ctx.save_for_backward(x, f)


def _convolution_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_causal_convolution_backward(gradient, *ctx.saved_tensors), None


causal_convolution.register_autograd(_convolution_gradients, setup_context=_convolution_setup)
