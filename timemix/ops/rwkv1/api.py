"""wkv1: the time-mix of the 2021 RWKV (RWKV-LM 0.01, doi 10.5281/zenodo.5196577).

    wkv[t] = sum_{u<=t} W[t,u] exp(k[u]) v[u]  /  sum_{u<=t} exp(k[u])        per channel
    W[t,u] = f_h(t-u) alpha_h(u) beta_h(t)                                    per head h

With `denominator="weighted"` W is in the denominator too, as in AFT (arXiv 2105.14103), and is positive:
W[t,u] = exp(f_h(t-u) + alpha_h(u) + beta_h(t)); beta then cancels.

With f of shape (H, ctx_len, ctx_len) that table replaces f_h(t-u): one free weight for each pair, as in AFT-full.

Every parallel form (`_parallel`) computes

    source[u]    = alpha(u) exp(k[u]) v[u]
    numerator[t] = sum_{u<=t} f(t-u) source[u]        the mix
    total[t]     = sum_{u<=t} exp(k[u])               a running sum
    wkv[t]       = beta(t) numerator[t] / total[t]

and they differ in the mix alone: `dense` writes W out as a matrix, `blocked` takes strips of it (`ops.causal`),
`spectral` multiplies spectra of blocks (`ops.spectral`).

Shapes: k, v (B, T, H, N); f, alpha, beta (H, ctx_len), f indexed by lag; or f (H, ctx_len, ctx_len) indexed by (t, u).
U: positions of past and present, 0 ... U-1.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from timemix.ops.common.causal import causal_convolution, running_sum, toeplitz
from timemix.ops.common.fused import divide, weigh
from timemix.ops.common.history import append, lags, pairs_at, weights_at
from timemix.ops.common.spectral import spectral_convolution
from timemix.ops.common.spread import broadcast_parameter

Denominator = Literal["plain", "weighted"]

K_MIN, K_MAX = -60.0, 30.0
"""Bounds of k: sums of exp(k) stay in the range of float32."""


class Wkv1State(NamedTuple):
    """State of wkv1; at least float32.

    Args:
        numerators: alpha exp(k) v of every past position (B, H, ctx_len, N), zeros after them.
        denominators: sum of exp(k) so far (B, H, N); if weighted, alpha exp(k) of every past position
            (B, H, ctx_len, N).
        position: tokens seen by each row (B,).
    """

    numerators: Tensor
    denominators: Tensor
    position: Tensor


def wkv1_state(
    batch: int,
    heads: int,
    head_size: int,
    ctx_len: int,
    *,
    denominator: Denominator = "plain",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Wkv1State:
    """Create the state before the first token.

    Args:
        batch: rows B.
        heads: H.
        head_size: N.
        ctx_len: largest number of positions.
        denominator: "plain" or "weighted".
        dtype: float32 or float64.
        device: device of the tensors.

    Returns:
        Zeros at position 0.
    """
    history = torch.zeros(batch, heads, ctx_len, head_size, dtype=dtype, device=device)
    sums = torch.zeros(batch, heads, head_size, dtype=dtype, device=device)
    return Wkv1State(
        history,
        torch.zeros_like(history) if denominator == "weighted" else sums,
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def wkv1(
    k: Tensor,
    v: Tensor,
    f: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    state: Wkv1State | None = None,
    *,
    lengths: Tensor | None = None,
    denominator: Denominator = "plain",
    backend: str = "auto",
) -> tuple[Tensor, Wkv1State | None]:
    """Compute the weighted average of the past of each channel (formula above).

    k is clamped to [-60, 30]. exp, sums and the division are in at least float32, outside autocast. Products
    W * (exp(k) v) run in v's dtype with float32 accumulation.

    Args:
        k: keys (B, T, H, N) in float32, bfloat16 or float64.
        v: values, as k.
        f: weights by lag (H, ctx_len); or by pair (H, ctx_len, ctx_len), of which [:, t, u] counts for u <= t.
        alpha: weight of each source position (H, ctx_len); None for 1, if weighted for 0.
        beta: weight of each target position, as alpha.
        state: state before these tokens, None at position 0. It is consumed: without gradients its tensors are
            overwritten.
        lengths: (B,), 1 to T: only the first `lengths` tokens of a row count; y is meaningless after them.
        denominator: "plain" or "weighted".
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, H, N) in v's dtype, and the state after these tokens, None if `state` is None.

    Raises:
        ValueError: shapes that do not fit, a position past ctx_len, or a backend that does not support the arguments.
        TypeError: float16, whose range exp(k) leaves.
    """
    _check(k, v, f, alpha, beta, state, lengths)
    positions = k.shape[1] if state is None else int(state.position.max()) + k.shape[1]
    name, _ = choose_backend(backend, positions, v.dtype, free=f.ndim == 3, weighted=denominator == "weighted")
    with torch.autocast(k.device.type, enabled=False):
        if denominator == "weighted":
            # The tables are logarithms; beta cancels.
            f = f.exp()
            alpha = None if alpha is None else alpha.exp()
            beta = None
        return BACKENDS[name](k, v, f, alpha, beta, state, lengths, denominator)


def choose_backend(
    backend: str, positions: int, dtype: torch.dtype = torch.float32, *, free: bool = False, weighted: bool = False
) -> tuple[str, str]:
    """Choose the backend of wkv1.

    Args:
        backend: "auto" or a name in `BACKENDS`.
        positions: past and present positions U.
        dtype: dtype of v.
        free: whether f has a weight for each pair of positions.
        weighted: whether the denominator is weighted.

    Returns:
        The name of the backend, and the reason.

    Raises:
        ValueError: an unknown name, or a backend that does not support the arguments.
    """
    if backend == "auto":
        if free:
            return "dense", "a free W is a matrix"
        if positions <= DENSE_UP_TO:
            return "dense", f"fastest up to {DENSE_UP_TO} positions"
        if positions <= blocked_up_to(dtype):
            return "blocked", f"fastest from {DENSE_UP_TO} to {blocked_up_to(dtype)} positions"
        if weighted:
            return "blocked", "each term of a weighted denominator counts to its own size"
        return "spectral", f"fastest past {blocked_up_to(dtype)} positions"
    if backend not in BACKENDS:
        raise ValueError(f"unknown wkv1 backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    if backend in ("blocked", "spectral") and free:
        raise ValueError(f"the {backend} backend of wkv1 needs f by lag; a free W takes dense")
    return backend, "asked for"


def _reference(
    k: Tensor,
    v: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    state: Wkv1State | None,
    lengths: Tensor | None,
    denominator: Denominator,
) -> tuple[Tensor, Wkv1State | None]:
    """The formula, row by row, position by position, term by term."""
    B, T, H, N = k.shape
    dtype = compute_dtype(v)
    past = state or wkv1_state(B, H, N, f.shape[-1], denominator=denominator, dtype=dtype, device=k.device)
    ones = f.new_ones(H, f.shape[-1])
    alpha = ones if alpha is None else alpha
    beta = ones if beta is None else beta

    y, numerators, denominators = [], [], []
    for b in range(B):
        start = int(past.position[b])
        length = T if lengths is None else int(lengths[b])
        # alpha exp(k) v of each position so far, (H, N) each
        numerator = [past.numerators[b, :, u] for u in range(start)]
        if denominator == "plain":
            total = past.denominators[b]
        else:
            weights = [past.denominators[b, :, u] for u in range(start)]
        y_row = []
        for t in range(start, start + length):
            exp_k = k[b, t - start].to(dtype).clamp(K_MIN, K_MAX).exp()
            numerator.append(alpha[:, t, None] * exp_k * v[b, t - start])
            # f_h(t - u) for u = 0 ... t, (H, 1) each
            f_t = [f[:, t - u, None] if f.ndim == 2 else f[:, t, u, None] for u in range(t + 1)]
            weighted_sum = torch.stack([f_t[u] * numerator[u] for u in range(t + 1)]).sum(0)
            if denominator == "plain":
                total = total + exp_k
            else:
                weights.append(alpha[:, t, None] * exp_k)
                total = torch.stack([f_t[u] * weights[u] for u in range(t + 1)]).sum(0)
            y_row.append(beta[:, t, None] * weighted_sum / total)
        y_row += [torch.zeros_like(k[b, 0])] * (T - length)
        y.append(torch.stack(y_row).to(v.dtype))
        end = start + length
        # U of (H, N) -> (H, ctx_len, N)
        numerators.append(torch.cat([torch.stack(numerator, 1), past.numerators[b, :, end:]], dim=1))
        if denominator == "weighted":
            total = torch.cat([torch.stack(weights, 1), past.denominators[b, :, end:]], dim=1)
        denominators.append(total)
    if state is None:
        return torch.stack(y), None
    seen = torch.full_like(state.position, T) if lengths is None else lengths
    return torch.stack(y), Wkv1State(torch.stack(numerators), torch.stack(denominators), state.position + seen)


Mix = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
"""mix(f, x, position, T) = sum_{u<=t} f(t-u) x[u] at each row's next T positions: (B, T, H, N), in x's dtype.

x (B, U, H, N): sources at positions 0 ... U-1. position (B,): tokens seen by each row, None if that is 0 and U = T."""


def _times_matrix(f: Tensor, x: Tensor, position: Tensor | None, T: int) -> Tensor:
    """Mix by a matrix per head: y[t] = sum_u W[t, u] x[u], W[t, u] = f(t-u), 0 for u > t."""
    if position is None:
        # (H, T, T)
        W = toeplitz(f, T, T) if f.ndim == 2 else f[:, :T, :T].tril()
        return torch.einsum("htu,buhn->bthn", W.to(x.dtype), x)
    U = x.shape[1]
    # (B, H, T, U): rows of the batch look back from different positions.
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
    """Mix by a convolution through spectra; from a state, whose rows end at any position, in blocks of time."""
    return spectral_convolution(x, f) if position is None else _by_blocks(f, x, position, T)


def _aligned(x: Tensor, ends: Tensor) -> Tensor:
    """Move each row of x (B, U, H, N) so that position ends[b] - 1 comes last, with zeros before its first."""
    U = x.shape[1]
    source = torch.arange(U, device=x.device) + (ends - U)[:, None]
    inside = (source >= 0) & (source < U)
    rows = torch.arange(len(x), device=x.device)[:, None]
    return torch.where(inside[:, :, None, None], x[rows, source.clamp(0, U - 1)], 0)


def _parallel(
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
    """Compute all positions at once (formula above).

    From a state, the new sources are appended to the history, and the mix goes over all of it.
    """
    T = k.shape[1]
    exp_k = k.to(compute_dtype(v) if state is None else state.numerators.dtype).clamp(K_MIN, K_MAX).exp()
    f = f.to(exp_k.dtype)
    position = None if state is None else state.position
    if lengths is not None:
        counted = torch.arange(T, device=k.device) < lengths[:, None]
        # Padding must not enter the running sum.
        exp_k = torch.where(counted[:, :, None, None], exp_k, 0)
    # alpha exp(k), the terms of a weighted denominator; times v those of the numerator.
    source = times_table(exp_k, alpha, position)
    # Mixed-type arithmetic is slow on CPU, hence the explicit casts.
    product = source * v.to(source.dtype)
    # (B, T, H, N) -> (B, T, H N) -> (B, T, H, N)
    sums = running_sum(exp_k.flatten(2)).view(exp_k.shape) if denominator == "plain" else None
    after = None
    if state is None:
        numerator = mix(f, product.to(v.dtype), None, T).to(source.dtype)
        total = mix(f, source, None, T) if sums is None else sums
    else:
        U = min(int(state.position.max()) + T, f.shape[-1])

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
    """Multiply x[t] by a table's entry at t.

    Args:
        x: (B, T, H, N).
        table: alpha or beta (H, ctx_len), None for 1. The last entry holds for all later positions.
        position: tokens seen by each row (B,), None for 0.

    Returns:
        (B, T, H, N).
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


def gated_wkv1(
    kvr: Tensor,
    bias: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    heads: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute sigmoid(r) * wkv1(k, v, ...) by the C kernels of `ops.fused`, from position 0, for a plain denominator.

    Args:
        kvr: k, v and r side by side, without bias (B, T, 3 C), in float32 or bfloat16.
        bias: their biases (3 C,).
        f: as in `wkv1`.
        alpha: as in `wkv1`.
        beta: as in `wkv1`.
        heads: H.
        backend: "auto" or a name in `MIXES`.

    Returns:
        (B, T, C), in kvr's dtype.

    Raises:
        ValueError: as `wkv1`.
    """
    k, v, _ = (part.unflatten(2, (heads, -1)) for part in kvr.chunk(3, dim=2))
    _check(k, v, f, alpha, beta, None, None)
    name, _ = choose_backend(backend, kvr.shape[1], kvr.dtype, free=f.ndim == 3)
    # source (H, T, B, N): as the products of the mix read it; total and gate (B, T, H, N)
    source, total, gate = weigh(kvr, bias, alpha, heads)
    with torch.autocast(kvr.device.type, enabled=False):
        # (H, T, B, N) -> (B, T, H, N), a view
        numerator = MIXES[name](f, source.permute(2, 1, 0, 3), None, kvr.shape[1])
    return divide(numerator.permute(2, 1, 0, 3), total, gate, beta).flatten(2)


MIXES: dict[str, Mix] = {"dense": _times_matrix, "blocked": _by_blocks, "spectral": _by_spectra}
"""The parallel forms, by name."""

BACKENDS: dict[str, Callable[..., tuple[Tensor, Wkv1State | None]]] = {
    "reference": _reference,
    **{name: partial(_parallel, mix) for name, mix in MIXES.items()},
}
"""All forms, by name."""

DENSE_UP_TO = 256
"""Positions up to which the dense form is the fastest, measured (benchmarks/RESULTS.md)."""


def blocked_up_to(dtype: torch.dtype) -> int:
    """Return the number of positions up to which the blocked form is the fastest, measured (benchmarks/RESULTS.md).

    Args:
        dtype: dtype of v. Products of spectra run in float32 for any of them, those of blocks in v's dtype.

    Returns:
        A number of positions.
    """
    return 2048 if dtype == torch.bfloat16 else 1024


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of exp, sums and states for x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(
    k: Tensor,
    v: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    state: Wkv1State | None,
    lengths: Tensor | None,
) -> None:
    if k.dtype == torch.float16 or v.dtype == torch.float16:
        raise TypeError("wkv1 refuses float16: exp(k) leaves its range; use bfloat16 or float32")
    if k.ndim != 4 or k.shape != v.shape or k.shape[1] == 0:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must both be (batch, time >= 1, heads, head size)")
    if f.ndim == 3 and f.shape[1] != f.shape[2]:
        raise ValueError(f"f {tuple(f.shape)} must be (heads, ctx_len) or (heads, ctx_len, ctx_len)")
    tables = {"f": f if f.ndim == 2 else f[:, 0], "alpha": alpha, "beta": beta}
    for name, table in tables.items():
        if table is not None and table.shape != (k.shape[2], f.shape[-1]):
            raise ValueError(f"{name} {tuple(table.shape)} must be (heads, ctx_len), heads {k.shape[2]}")
    end = k.shape[1]
    if state is not None:
        end = int((state.position + (k.shape[1] if lengths is None else lengths)).max())
    if end > f.shape[-1]:
        raise ValueError(f"position {end} is past ctx_len {f.shape[-1]}, where the tables end")
