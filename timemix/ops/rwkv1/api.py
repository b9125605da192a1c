"""wkv1: the time-mix of the 2021 RWKV (RWKV-LM 0.01, doi 10.5281/zenodo.5196577).

    wkv[t] = sum_{u<=t} W[t,u] exp(k[u]) v[u]  /  sum_{u<=t} exp(k[u])        per channel
    W[t,u] = f_h(t-u) alpha_h(u) beta_h(t)                                    per head h

With `denominator="weighted"` W is in the denominator too, as in AFT (arXiv 2105.14103), and is positive:
W[t,u] = exp(f_h(t-u) + alpha_h(u) + beta_h(t)); beta then cancels.

With f of shape (H, ctx_len, ctx_len) that table replaces f_h(t-u): one free weight for each pair, as in AFT-full.

Every parallel form (`parallel_wkv1`) computes

    source[u]    = alpha(u) exp(k[u]) v[u]
    numerator[t] = sum_{u<=t} f(t-u) source[u]        the mix
    total[t]     = sum_{u<=t} exp(k[u])               a running sum
    wkv[t]       = beta(t) numerator[t] / total[t]

and they differ in the mix alone: `dense` writes W out as a matrix, `blocked` takes strips of it (`ops.common.causal`),
`spectral` multiplies spectra of blocks (`ops.common.spectral`).

Shapes: k, v (B, T, H, N); f, alpha, beta (H, ctx_len), f indexed by lag; or f (H, ctx_len, ctx_len) indexed by (t, u).
U: positions of past and present, 0 ... U-1.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from timemix.ops.common.fused import divide, weigh
from timemix.ops.rwkv1.parallel import MIXES, parallel_wkv1
from timemix.ops.rwkv1.reference import reference_wkv1
from timemix.ops.rwkv1.state import Denominator, Wkv1State


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
    """Compute sigmoid(r) * wkv1(k, v, ...) by the C kernels of `ops.common.fused`, from position 0.

    The denominator is plain.

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


BACKENDS: dict[str, Callable[..., tuple[Tensor, Wkv1State | None]]] = {
    "reference": reference_wkv1,
    **{name: partial(parallel_wkv1, mix) for name, mix in MIXES.items()},
}
"""All forms, by name."""

DENSE_UP_TO = 256
"""Positions up to which the dense form is the fastest, measured (docs/performance.md)."""


def blocked_up_to(dtype: torch.dtype) -> int:
    """Return the number of positions up to which the blocked form is the fastest, measured (docs/performance.md).

    Args:
        dtype: dtype of v. Products of spectra run in float32 for any of them, those of blocks in v's dtype.

    Returns:
        A number of positions.
    """
    return 2048 if dtype == torch.bfloat16 else 1024


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
