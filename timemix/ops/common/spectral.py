"""The causal convolution through the spectra of blocks of time: sub-quadratic, and as safe as the direct sum.

Time is cut into n blocks of L positions. A block onto itself is direct; block j onto a later block i is a product of
spectra at L + 1 frequencies, and what reaches block i is added up before one transform back (a uniformly partitioned
convolution). Every input of a transform lies in the past of every output that it reaches, so rounding is relative to
the past alone; in the gradients, to the future alone.

Each step is a matrix product. With A the transform of a block, scaled so that its transpose leads back, and G_d the
spectrum of f at the lags around d L:

    y_i = tri(f) x_i + A^T sum_{d>=1} G_d (A x_{i-d})

At L near sqrt(T) that takes about 53 sqrt(T) operations for each of the T C values, forward and backward, where the
direct sum takes 6 T. A library's FFT takes fewer, but waits for memory. What is direct runs in x's dtype, spectra in at
least float32; one head after another, so that what lies between products stays in the cache.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common.causal import diagonal_sums, of_length, sum_dtype, toeplitz
from timemix.ops.common.operators import operator


def block_length(T: int) -> int:
    """Positions of a block: 1.4 sqrt(T), where transforms and products of spectra cost about the same."""
    return max(16, round(1.4 * T**0.5 / 16) * 16)


@operator("timemix::spectral_convolution")
def spectral_convolution(x: Tensor, f: Tensor) -> Tensor:
    """y[t] = sum_{u<=t} f(t - u) x[u] per head, (B, T, H, N), from x of that shape and f (H, ctx_len) by lag.

    ctx_len at least T. Memory grows linearly with time, but for the n x n products of a head's spectra.
    """
    T, wide = x.shape[1], f.to(sum_dtype(x))
    L, n = _blocks(T)
    A, E = _transforms(L, wide.dtype, wide.device)
    near = toeplitz(f.to(x.dtype), L, L)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for h in range(x.shape[2]):
        source = _cut(x[:, :, h], L, n)
        target = (near[h] @ source).to(wide.dtype)
        if n > 1:
            spectra = _complex_product(_filter_spectra(wide[h], E, n), _spectra(A, source, n))
            target.addmm_(A.t(), spectra.view(len(A), -1))
        _join(target, n, y[:, :, h])
    return y


@spectral_convolution.register_fake
def _(x: Tensor, f: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("timemix::spectral_convolution_backward", mutates_args=())
def _spectral_convolution_backward(gradient: Tensor, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and f from that of y: the same products with conjugate spectra."""
    T, wide = x.shape[1], f.to(sum_dtype(x))
    L, n = _blocks(T)
    A, E = _transforms(L, wide.dtype, wide.device)
    near = toeplitz(f.to(x.dtype), L, L)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    df = wide.new_zeros(len(wide), n * L)
    for h in range(x.shape[2]):
        source, target = (_cut(a[:, :, h], L, n) for a in (x, gradient))
        dsource = (near[h].t() @ target).to(wide.dtype)
        df[h, :L] += diagonal_sums((target @ source.t())[None])[0, L - 1 :]
        if n > 1:
            spectra, dspectra = _spectra(A, source, n), _spectra(A, target, n)
            back = _complex_product(_filter_spectra(wide[h], E, n).mT, dspectra, first=-1)
            dsource.addmm_(A.t(), back.view(len(A), -1))
            pairs = _complex_product(dspectra, spectra.mT, second=-1)
            by_distance = diagonal_sums(pairs.flatten(0, 1))[:, n:]
            # Lags around d L overlap by half with those around (d + 1) L.
            earlier, later = F.pad(by_distance.t() @ E, (1, 0)).split(L, 1)
            df[h, :-L] += earlier.flatten()
            df[h, L:] += later.flatten()
        _join(dsource, n, dx[:, :, h])
    return dx, of_length(df, f.shape[1]).to(f.dtype)


@_spectral_convolution_backward.register_fake
def _(gradient: Tensor, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(f)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return _spectral_convolution_backward(gradient, *ctx.saved_tensors)


spectral_convolution.register_autograd(_gradients, setup_context=_setup)


def _blocks(T: int) -> tuple[int, int]:
    """Positions of a block, and blocks, of which the last may be filled in part."""
    L = min(block_length(T), T)
    return L, -(-T // L)


@lru_cache(maxsize=16)
def _transforms(L: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of L values A (2 (L+1), L), of 2 L - 1 lags from 1 - L on E (2 (L+1), 2 L - 1): real parts, then imaginary.

    A^T A B = B for all that has no more than L values, B the product of any spectrum.
    """
    frequency = torch.arange(L + 1, dtype=torch.float64, device=device)[:, None]
    lag = torch.arange(1 - L, L, dtype=torch.float64, device=device)
    angle = frequency * lag % (2 * L) * (torch.pi / L)
    E = torch.stack([angle.cos(), -angle.sin()])
    # All frequencies but the first and the last stand for two of the 2 L.
    share = torch.full((L + 1, 1), 1 / L, dtype=torch.float64, device=device)
    share[0] = share[-1] = 1 / (2 * L)
    A = E[:, :, L - 1 :] * share.sqrt()
    return A.flatten(0, 1).to(dtype), E.flatten(0, 1).to(dtype)


def _cut(x: Tensor, L: int, n: int) -> Tensor:
    """x (B, T, N) as (L, n B N): each column a block of one channel, zeros after T."""
    B, T, N = x.shape
    return F.pad(x, (0, 0, 0, n * L - T)).view(B, n, L, N).permute(2, 1, 0, 3).reshape(L, -1)


def _join(columns: Tensor, n: int, out: Tensor) -> None:
    """The reverse of _cut, into out (B, T, N)."""
    B, T, N = out.shape
    out.copy_(columns.view(-1, n, B, N).permute(2, 1, 0, 3).reshape(B, -1, N)[:, :T])


def _spectra(A: Tensor, columns: Tensor, n: int) -> Tensor:
    """(2, L + 1, n, B N), real and imaginary, of columns (L, n B N)."""
    return (A @ columns.to(A.dtype)).view(2, len(A) // 2, n, -1)


def _filter_spectra(f: Tensor, E: Tensor, n: int) -> Tensor:
    """Spectra (2, L + 1, n, n) from f (ctx_len,): at [i, j] that of the lags around (i - j) L, zero for j >= i."""
    L = len(E) // 2 - 1
    lags = of_length(f[None], n * L)[0, 1:].unfold(0, 2 * L - 1, L)
    return toeplitz(F.pad(E @ lags.t(), (1, 0)), n, n).view(2, L + 1, n, n)


def _complex_product(a: Tensor, b: Tensor, first: int = 1, second: int = 1) -> Tensor:
    """Matrix products of a and b (2, batch, rows, columns), real and imaginary; a sign of -1 conjugates that factor."""
    y = a.new_empty(2, a.shape[1], a.shape[2], b.shape[3])
    torch.bmm(a[0], b[0], out=y[0])
    y[0].baddbmm_(a[1], b[1], alpha=-first * second)
    torch.bmm(a[1], b[0], out=y[1])
    y[1].baddbmm_(a[0], b[1], beta=first, alpha=second)
    return y
