"""wkv1 at all positions at once. Sums over the past are products with W, computed whole, in blocks or by spectra.

source[u]    = alpha(u) exp(k[u]) v[u]
numerator[t] = sum_{u<=t} f(t-u) source[u]
total[t]     = sum_{u<=t} exp(k[u])
y[t]         = beta(t) numerator[t] / total[t]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from timemix.ops.common.causal import causal_convolution, running_sum, toeplitz
from timemix.ops.common.history import append, lags, pairs_at, positions_read, weights_at
from timemix.ops.common.spectral import spectral_convolution
from timemix.ops.common.spread import broadcast_parameter
from timemix.ops.rwkv1.state import K_MAX, K_MIN, Denominator, Wkv1State, compute_dtype

Mix = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
"""mix(f, x, position, T) = sum_{u<=t} f(t-u) x[u] at the next T positions t of each row: (B, T, H, N), in x's dtype.

f is (H, ctx_len) by lag or (H, ctx_len, ctx_len) by pair. x (B, U, H, N) contains the sources at positions 0 to U-1.
position (B,) is the number of earlier tokens of each row. If no row has earlier tokens, position is None and U = T."""


def _times_matrix(f: Tensor, x: Tensor, position: Tensor | None, T: int) -> Tensor:
    """Mix by a matrix per head: y[t] = sum_u W[t, u] x[u], W[t, u] = f(t-u), 0 for u > t."""
    if position is None:
        # (H, T, T)
        W = toeplitz(f, T, T) if f.ndim == 2 else f[:, :T, :T].tril()
        return torch.einsum("htu,buhn->bthn", W.to(x.dtype), x)
    U = x.shape[1]
    # W is (B, H, T, U), because rows of the batch may be at different positions.
    W = weights_at(f, lags(position, T, U)) if f.ndim == 2 else pairs_at(f, position, T, U)
    return torch.einsum("bhtu,buhn->bthn", W.to(x.dtype), x)


def _by_blocks(f: Tensor, x: Tensor, position: Tensor | None, T: int) -> Tensor:
    """Mix by a convolution in blocks of time."""
    if position is not None and T == 1:
        return _times_matrix(f, x, position, T)
    if position is not None:
        x = _aligned(x, position + T)
    result: Tensor = causal_convolution(x, f, T)
    return result


def _by_spectra(f: Tensor, x: Tensor, position: Tensor | None, T: int) -> Tensor:
    """Mix by spectra if all rows start at position 0, else in blocks of time."""
    return spectral_convolution(x, f) if position is None else _by_blocks(f, x, position, T)


def _aligned(x: Tensor, ends: Tensor) -> Tensor:
    """Shift each row b of x (B, U, H, N) so that position ends[b] - 1 is last, with zeros before position 0."""
    U = x.shape[1]
    source = torch.arange(U, device=x.device) + (ends - U)[:, None]
    inside = (source >= 0) & (source < U)
    rows = torch.arange(len(x), device=x.device)[:, None]
    return torch.where(inside[:, :, None, None], x[rows, source.clamp(0, U - 1)], 0)


def parallel_wkv1(
    mix: Mix,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    state: Wkv1State | None,
    lengths: Tensor | None,
    denominator: Denominator,
) -> tuple[Tensor, Wkv1State | None]:
    """Compute wkv1 at all positions at once, by the formulas at the top of this module.

    With a state, the new sources are appended to the history, and the mix sums over the whole history.

    Args:
        mix: Function that sums the numerator, one of `MIXES`.
        k: Keys (B, T, H, N).
        v: Values (B, T, H, N).
        f: Weights by lag (H, ctx_len) or by pair (H, ctx_len, ctx_len).
        alpha: Weight of each source position (H, ctx_len); None for 1.
        beta: Weight of each target position (H, ctx_len); None for 1.
        state: State before these tokens; None at position 0.
        lengths: Number of valid tokens in each row (B,), 1 to T; None if all T are valid.
        denominator: "plain" or "weighted".

    Returns:
        y (B, T, H, N) in v's dtype, and the next state (None if `state` is None).
    """
    T = k.shape[1]
    exp_k = k.to(compute_dtype(v) if state is None else state.numerators.dtype).clamp(K_MIN, K_MAX).exp()
    f = f.to(exp_k.dtype)
    position = None if state is None else state.position
    if lengths is not None:
        counted = torch.arange(T, device=k.device) < lengths[:, None]
        # Padding must add nothing to the running sum.
        exp_k = torch.where(counted[:, :, None, None], exp_k, 0)
    # The terms of a weighted denominator are alpha exp(k), and the terms of the numerator are alpha exp(k) v. All terms
    # are (B, T, H, N).
    source = times_table(exp_k, alpha, position)
    # The casts are explicit because arithmetic on mixed dtypes is slow on the CPU.
    product = source * v.to(source.dtype)
    # (B, T, H, N) -> (B, T, H N) -> (B, T, H, N)
    sums = running_sum(exp_k.flatten(2), False).view(exp_k.shape) if denominator == "plain" else None
    after = None
    if state is None:
        numerator = mix(f, product.to(v.dtype), None, T).to(source.dtype)
        total = mix(f, source, None, T) if sums is None else sums
    else:
        U = positions_read(state.position, T, f.shape[-1])

        def look_back(history: Tensor) -> Tensor:
            # (B, H, ctx_len, N) -> (B, U, H, N)
            return mix(f, history[:, :, :U].transpose(1, 2), state.position, T)

        numerators = append(state.numerators, product.transpose(1, 2), state.position, lengths)
        numerator = look_back(numerators)
        if sums is None:
            denominators = append(state.denominators, source.transpose(1, 2), state.position, lengths)
            total = look_back(denominators)
        else:
            total = state.denominators[:, None] + sums
            denominators = total[:, -1]
        after = Wkv1State(numerators, denominators, state.position + (T if lengths is None else lengths))
    return times_table(numerator / total, beta, position).to(v.dtype), after


def times_table(x: Tensor, table: Tensor | None, position: Tensor | None) -> Tensor:
    """Multiply each row by the entry of a table at the position of the row.

    Args:
        x: Rows (B, T, H, N).
        table: alpha or beta (H, ctx_len), whose last entry applies to all later positions; None for 1.
        position: Number of earlier tokens of each row (B,); None for 0.

    Returns:
        Rows (B, T, H, N).
    """
    if table is None:
        return x
    T = x.shape[1]
    if position is None:
        # (H, T) -> (T, H, 1)
        return x * broadcast_parameter(table[:, :T].t()[:, :, None], x)
    target = (position[:, None] + torch.arange(T, device=x.device)).clamp(max=table.shape[1] - 1)
    # (H, B, T) -> (B, T, H, 1)
    return x * table[:, target].permute(1, 2, 0)[..., None]


MIXES: dict[str, Mix] = {"dense": _times_matrix, "blocked": _by_blocks, "spectral": _by_spectra}
"""The functions that sum the numerator, by the name of the backend."""
