"""wkv1: the time-mix of the 2021 RWKV (RWKV-LM 0.01, doi 10.5281/zenodo.5196577).

    wkv[t] = sum_{u<=t} W[t,u] exp(k[u]) v[u]  /  sum_{u<=t} exp(k[u])        per channel
    W[t,u] = f_h(t-u) alpha_h(u) beta_h(t)                                    per head h

With `denominator="weighted"`, W is in the denominator too, as in AFT (arXiv 2105.14103), and it is positive:
W[t,u] = exp(f_h(t-u) + alpha_h(u) + beta_h(t)). Then beta cancels.

With f of shape (H, ctx_len, ctx_len), the entry f_h[t,u] replaces f_h(t-u): each pair of positions has a free weight,
as in AFT-full.

Every parallel form (`parallel_wkv1`) computes

    source[u]    = alpha(u) exp(k[u]) v[u]
    numerator[t] = sum_{u<=t} f(t-u) source[u]        the mix
    total[t]     = sum_{u<=t} exp(k[u])               a running sum
    wkv[t]       = beta(t) numerator[t] / total[t]

and they differ in the mix alone: `dense` multiplies by the whole matrix W, `blocked` by strips of W
(`ops.common.causal`), and `spectral` multiplies spectra of blocks (`ops.common.spectral`).

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
    """Compute the weighted average of the past of each channel.

        wkv[t] = sum_{u<=t} W[t,u] exp(k[u]) v[u]  /  sum_{u<=t} exp(k[u]),   W[t,u] = f(t-u) alpha(u) beta(t)

    k is clamped to [-60, 30]. exp, sums and the division are in at least float32, outside autocast. Products
    W * (exp(k) v) run in v's dtype with float32 accumulation.

    Args:
        k: Keys (B, T, H, N) in float32, bfloat16 or float64.
        v: Values (B, T, H, N).
        f: Weights by lag (H, ctx_len); or by pair (H, ctx_len, ctx_len), of which [:, t, u] counts for u <= t.
        alpha: Weight of each source position (H, ctx_len); None for 1. Its logarithm with a weighted denominator.
        beta: Weight of each target position (H, ctx_len), or its logarithm, as alpha.
        state: State before these tokens; None at position 0. It is consumed: without gradients its tensors are
            overwritten.
        lengths: Number of tokens of each row that count (B,), 1 to T; y is meaningless after them. None: all T.
        denominator: "plain", or "weighted" by W = exp(f + alpha + beta).
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, H, N) in v's dtype, and the state after these tokens, None if `state` is None.

    Raises:
        ValueError: Shapes do not fit, a position is past ctx_len, or the backend does not support the arguments.
        TypeError: k or v is float16, whose range exp(k) exceeds.

    Source:
        RWKV-LM 0.01, doi 10.5281/zenodo.5196577. Weighted denominator: AFT, arXiv 2105.14103.
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
        positions: U, number of past and present positions.
        dtype: Dtype of v.
        free: Whether f has a weight for each pair of positions.
        weighted: Whether the denominator is weighted.

    Returns:
        The name of the backend, and the reason.

    Raises:
        ValueError: The name is unknown, or the backend does not support the arguments.
    """
    if backend == "auto":
        if free:
            return "dense", "a free W is a matrix"
        if positions <= DENSE_UP_TO:
            return "dense", f"fastest up to {DENSE_UP_TO} positions"
        if positions <= blocked_up_to(dtype):
            return "blocked", f"fastest from {DENSE_UP_TO} to {blocked_up_to(dtype)} positions"
        if weighted:
            return "blocked", "its rounding is relative to each term, as a weighted denominator needs"
        return "spectral", f"fastest past {blocked_up_to(dtype)} positions"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not supported; choose auto, {', '.join(BACKENDS)}")
    if backend in ("blocked", "spectral") and free:
        raise ValueError(f"backend={backend!r} needs f by lag (heads, ctx_len); choose dense for f by pair")
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
        bias: Their biases (3 C,).
        f: Weights by lag or by pair, as in `wkv1`.
        alpha: Weight of each source position (H, ctx_len); None for 1.
        beta: Weight of each target position (H, ctx_len); None for 1.
        heads: H.
        backend: "auto" or a name in `MIXES`.

    Returns:
        y (B, T, C), in kvr's dtype.

    Raises:
        ValueError: Shapes do not fit, T is above ctx_len, or the backend does not support the arguments.
    """
    k, v, _ = (part.unflatten(2, (heads, -1)) for part in kvr.chunk(3, dim=2))
    _check(k, v, f, alpha, beta, None, None)
    name, _ = choose_backend(backend, kvr.shape[1], kvr.dtype, free=f.ndim == 3)
    # source (H, T, B, N), the layout that the products of the mix read; total and gate (B, T, H, N)
    source, total, gate = weigh(kvr, bias, alpha, heads)
    with torch.autocast(kvr.device.type, enabled=False):
        # (H, T, B, N) -> (B, T, H, N), a view
        numerator = MIXES[name](f, source.permute(2, 1, 0, 3), None, kvr.shape[1])
    return divide(numerator.permute(2, 1, 0, 3), total, gate, beta).flatten(2)


BACKENDS: dict[str, Callable[..., tuple[Tensor, Wkv1State | None]]] = {
    "reference": reference_wkv1,
    **{name: partial(parallel_wkv1, mix) for name, mix in MIXES.items()},
}
"""The backends of wkv1 by name: the formula in loops, and the parallel forms."""

DENSE_UP_TO = 256
"""Positions up to which the dense form is the fastest, measured (docs/performance.md)."""


def blocked_up_to(dtype: torch.dtype) -> int:
    """Return the number of positions up to which the blocked form is the fastest, measured (docs/performance.md).

    Args:
        dtype: Dtype of v, in which products of blocks run. Products of spectra run in at least float32.

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
    """Check the arguments of `wkv1`."""
    if k.dtype == torch.float16 or v.dtype == torch.float16:
        raise TypeError("k or v is float16, whose range exp(k) exceeds; use bfloat16 or float32")
    if k.ndim != 4 or k.shape != v.shape or k.shape[1] == 0:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; both must be (batch, time >= 1, heads, head size)"
        )
    if f.ndim == 3 and f.shape[1] != f.shape[2]:
        raise ValueError(f"f has shape {tuple(f.shape)}; it must be (heads, ctx_len) or (heads, ctx_len, ctx_len)")
    tables = {"f": f if f.ndim == 2 else f[:, 0], "alpha": alpha, "beta": beta}
    for name, table in tables.items():
        if table is not None and table.shape != (k.shape[2], f.shape[-1]):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; it must be (heads, ctx_len) = {(k.shape[2], f.shape[-1])}"
            )
    end = k.shape[1]
    if state is not None:
        end = int((state.position + (k.shape[1] if lengths is None else lengths)).max())
    if end > f.shape[-1]:
        raise ValueError(f"{end} tokens are more than ctx_len {f.shape[-1]}, where the tables end; pass fewer")
