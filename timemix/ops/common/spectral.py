"""The causal convolution by spectra of blocks of time, in O(T^1.5) and as accurate as direct summation.

    y[t] = sum_{u<=t} f(t-u) x[u]

The T positions of x are cut into n blocks of L positions, x_0 to x_{n-1}. Sums within a block are computed directly.
The contribution of block j to a later block i is a product of spectra at L + 1 frequencies. All products for block i
are summed before one inverse transform (a uniformly partitioned convolution):

    y_i = tri(f) x_i + A^T sum_{d>=1} G_d (A x_{i-d})

A is the real discrete Fourier transform of a block padded to 2 L, scaled so that its transpose is the inverse. G_d is
the spectrum of f at the 2 L - 1 lags around d L. tri(f) is the L x L Toeplitz matrix of f.

Accuracy: the rounding error of a Fourier transform is relative to its largest input. In this convolution, every input
of a transform is in the past of every output that the input affects. So the rounding error of an output is relative to
terms of its past alone. The rounding error of a gradient is relative to terms of its future alone.

Cost: every step, including the transforms, is a matrix product. With L near sqrt(T), the convolution takes about
53 sqrt(T) operations for each of the T C values, forward and backward. Direct summation takes 6 T operations for each
value. An FFT library needs fewer operations, but memory limits its speed. Sums within a block run in x's dtype, and
spectra in at least float32. Heads are processed one after another, so that intermediate values stay in the processor's
cache.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common.causal import diagonal_sums, of_length, sum_dtype, toeplitz
from timemix.ops.common.operators import operator


def block_length(T: int) -> int:
    """Return L, the number of positions in a block.

    Args:
        T: Number of positions of the text.

    Returns:
        A multiple of 16 near 1.4 sqrt(T), for which the transforms cost about as much as the products of spectra.
    """
    result: int = max(16, round(1.4 * T**0.5 / 16) * 16)
    return result


@operator("timemix::spectral_convolution")
def spectral_convolution(x: Tensor, f: Tensor) -> Tensor:
    """Convolve x with one curve per head: y[t] = sum_{u<=t} f(t-u) x[u].

    Memory grows linearly with T, except for the spectra (2, L + 1, n, n) of the curve of one head.

    Args:
        x: Sources (B, T, H, N).
        f: Curves (H, ctx_len) by lag, ctx_len >= T.

    Returns:
        y (B, T, H, N), in x's dtype.
    """
    T, wide = x.shape[1], f.to(sum_dtype(x))
    L, n = _blocks(T)
    A, E = _transforms(L, wide.dtype, wide.device)
    # tri(f): (H, L, L)
    near = toeplitz(f.to(x.dtype), L, L)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for h in range(x.shape[2]):
        # (B, T, N) -> (L, n B N)
        source = _cut(x[:, :, h], L, n)
        target = (near[h] @ source).to(wide.dtype)
        if n > 1:
            # The sum over d is a product (n, n) by (n, B N) at each frequency. Then A^T maps (2 (L+1), n B N) to
            # (L, n B N).
            spectra = _complex_product(_filter_spectra(wide[h], E, n), _spectra(A, source, n))
            target.addmm_(A.t(), spectra.view(len(A), target.shape[1]))
        _join(target, n, y[:, :, h])
    return y


@spectral_convolution.register_fake
def _(x: Tensor, f: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("timemix::spectral_convolution_backward")
def _spectral_convolution_backward(gradient: Tensor, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x and f from dy (B, T, H, N).

    dx_j = tri(f)^T dy_j + A^T sum_{d>=1} conj(G_d) (A dy_{j+d})
    dG_d = sum_i (A dy_i) conj(A x_{i-d}), summed over batch and channels
    df   = E^T dG_d at the lags around d L (E: see _transforms)
    """
    T, wide = x.shape[1], f.to(sum_dtype(x))
    L, n = _blocks(T)
    A, E = _transforms(L, wide.dtype, wide.device)
    near = toeplitz(f.to(x.dtype), L, L)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    df = wide.new_zeros(len(wide), n * L)
    for h in range(x.shape[2]):
        source, target = (_cut(a[:, :, h], L, n) for a in (x, gradient))
        dsource = (near[h].t() @ target).to(wide.dtype)
        # Lags from 0 to L - 1 within a block: (L, n B N) by (n B N, L), then the sums over diagonals
        df[h, :L] += diagonal_sums((target @ source.t())[None])[0, L - 1 :]
        if n > 1:
            spectra, dspectra = _spectra(A, source, n), _spectra(A, target, n)
            # The transpose of the lower triangular G sums over later blocks: conj(G)^T (2, L + 1, n, n) by (n, B N)
            back = _complex_product(_filter_spectra(wide[h], E, n).mT, dspectra, first=-1)
            dsource.addmm_(A.t(), back.view(len(A), dsource.shape[1]))
            # (2, L + 1, n, B N) by (2, L + 1, B N, n) gives pairs of blocks (2, L + 1, n, n). The pairs are then summed
            # for each distance d = 1 to n - 1.
            pairs = _complex_product(dspectra, spectra.mT, second=-1)
            by_distance = diagonal_sums(pairs.flatten(0, 1))[:, n:]
            # (n - 1, 2 (L+1)) -> (n - 1, 2 L), for the lags from d L - L to d L + L - 1. The last L lags of a distance
            # are the first L lags of the next distance.
            earlier, later = F.pad(by_distance.t() @ E, (1, 0)).split(L, 1)
            df[h, :-L] += earlier.flatten()
            df[h, L:] += later.flatten()
        _join(dsource, n, dx[:, :, h])
    return dx, of_length(df, f.shape[1]).to(f.dtype)


@_spectral_convolution_backward.register_fake
def _(gradient: Tensor, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(f)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _spectral_convolution_backward(gradient, *ctx.saved_tensors)
    return result


spectral_convolution.register_autograd(_gradients, setup_context=_setup)


def _blocks(T: int) -> tuple[int, int]:
    """Return L, the number of positions in a block, and n, the number of blocks. The last block may be partly empty."""
    L = min(block_length(T), T)
    return L, -(-T // L)


@lru_cache(maxsize=16)
def _transforms(L: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the transforms A (2 (L+1), L) of a block, and E (2 (L+1), 2 L - 1) of the lags from 1 - L to L - 1.

    E[w, lag] = exp(-i pi w lag / L) at the frequencies w = 0 to L of period 2 L, real parts before imaginary parts.
    A is E at the lags from 0 to L - 1, multiplied by sqrt(share(w)). A^T (G (A x)) is then the circular convolution of
    period 2 L at the L positions of a block. The circular convolution does not wrap around to these L positions.
    """
    frequency = torch.arange(L + 1, dtype=torch.float64, device=device)[:, None]
    lag = torch.arange(1 - L, L, dtype=torch.float64, device=device)
    # The product is reduced to one period while it is an exact integer, because a large angle would lose digits.
    angle = frequency * lag % (2 * L) * (torch.pi / L)
    E = torch.stack([angle.cos(), -angle.sin()])
    # Each frequency except the first and the last represents two of the 2 L frequencies: itself and its conjugate.
    share = torch.full((L + 1, 1), 1 / L, dtype=torch.float64, device=device)
    share[0] = share[-1] = 1 / (2 * L)
    A = E[:, :, L - 1 :] * share.sqrt()
    return A.flatten(0, 1).to(dtype), E.flatten(0, 1).to(dtype)


def _cut(x: Tensor, L: int, n: int) -> Tensor:
    """Cut x (B, T, N) into blocks (L, n B N): each column is a block of one channel, with zeros after T."""
    B, T, N = x.shape
    # (B, n L, N) -> (B, n, L, N) -> (L, n, B, N)
    return F.pad(x, (0, 0, 0, n * L - T)).view(B, n, L, N).permute(2, 1, 0, 3).reshape(L, n * B * N)


def _join(columns: Tensor, n: int, out: Tensor) -> None:
    """Join the columns of _cut to a tensor, and store it in out (B, T, N)."""
    B, T, N = out.shape
    out.copy_(columns.view(len(columns), n, B, N).permute(2, 1, 0, 3).reshape(B, n * len(columns), N)[:, :T])


def _spectra(A: Tensor, columns: Tensor, n: int) -> Tensor:
    """Return the real and imaginary parts of the spectra (2, L + 1, n, B N) of columns (L, n B N)."""
    return (A @ columns.to(A.dtype)).view(2, len(A) // 2, n, columns.shape[1] // n)


def _filter_spectra(f: Tensor, E: Tensor, n: int) -> Tensor:
    """Return G (2, L + 1, n, n) from f (ctx_len,): the spectrum G_{i-j} at [i, j], 0 for j >= i."""
    L = len(E) // 2 - 1
    # (n L,) -> (n - 1, 2 L - 1): the lags from d L - L + 1 to d L + L - 1, for d = 1 to n - 1
    lags = of_length(f[None], n * L)[0, 1:].unfold(0, 2 * L - 1, L)
    result: Tensor = toeplitz(F.pad(E @ lags.t(), (1, 0)), n, n).view(2, L + 1, n, n)
    return result


def _complex_product(a: Tensor, b: Tensor, first: int = 1, second: int = 1) -> Tensor:
    """Multiply complex matrices that are stored as real and imaginary parts.

    Args:
        a: First factor (2, batch, rows, inner).
        b: Second factor (2, batch, inner, columns).
        first: 1, or -1 to conjugate a.
        second: 1, or -1 to conjugate b.

    Returns:
        Products (2, batch, rows, columns).
    """
    y = a.new_empty(2, a.shape[1], a.shape[2], b.shape[3])
    torch.bmm(a[0], b[0], out=y[0])
    y[0].baddbmm_(a[1], b[1], alpha=-first * second)
    torch.bmm(a[1], b[0], out=y[1])
    y[1].baddbmm_(a[0], b[1], beta=first, alpha=second)
    return y
