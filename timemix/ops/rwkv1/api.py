"""wkv1: the time-mix of RWKV from 2021 (RWKV-LM 0.01, doi 10.5281/zenodo.5196577).

    wkv[t] = sum_{u<=t} W[t,u] exp(k[u]) v[u]  /  sum_{u<=t} exp(k[u])        per channel
    W[t,u] = f_h(t-u) alpha_h(u) beta_h(t)                                    per head h

With `denominator="weighted"`, the terms of the denominator are also multiplied by W, as in AFT (arXiv 2105.14103). W is
then positive: W[t,u] = exp(f_h(t-u) + alpha_h(u) + beta_h(t)). As beta is in numerator and denominator, beta cancels.

If f has the shape (H, ctx_len, ctx_len), the entry f_h[t,u] replaces f_h(t-u). Each pair of positions then has its own
weight, as in AFT-full.

Every parallel backend (`parallel_wkv1`) computes

    source[u]    = alpha(u) exp(k[u]) v[u]
    numerator[t] = sum_{u<=t} f(t-u) source[u]        the mix
    total[t]     = sum_{u<=t} exp(k[u])               a running sum
    wkv[t]       = beta(t) numerator[t] / total[t]

The parallel backends differ in the mix alone. `dense` multiplies by the whole matrix W, and `blocked` multiplies by
strips of W (`ops.common.causal`). `spectral` multiplies spectra of blocks (`ops.common.spectral`).

The shapes are k, v (B, T, H, N), alpha, beta (H, ctx_len), and f (H, ctx_len) by lag or (H, ctx_len, ctx_len) by pair
(t, u). U is the number of past and present positions, which are 0 to U-1.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from timemix.ops.common.history import positions_read
from timemix.ops.rwkv1.parallel import MIXES, parallel_wkv1
from timemix.ops.rwkv1.reference import reference_wkv1
from timemix.ops.rwkv1.state import Denominator, Wkv1State
from timemix.ops.rwkv1.time_mix import divide, weigh
from timemix.runtime.device import is_recording


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
    """Compute a weighted average of past and present values, for each channel.

        wkv[t] = sum_{u<=t} W[t,u] exp(k[u]) v[u]  /  sum_{u<=t} exp(k[u]),   W[t,u] = f(t-u) alpha(u) beta(t)

    k is clamped to [-60, 30]. exp, sums and the division run in at least float32, even under autocast. Products
    W * (exp(k) v) run in v's dtype with float32 accumulation.

    Args:
        k: Keys (B, T, H, N) in float32, bfloat16 or float64.
        v: Values (B, T, H, N).
        f: Weights by lag (H, ctx_len), or weights by pair (H, ctx_len, ctx_len), whose entries with u > t are ignored.
        alpha: Weight of each source position (H, ctx_len), or its logarithm with a weighted denominator; None for 1.
        beta: Weight of each target position (H, ctx_len), or its logarithm with a weighted denominator; None for 1.
        state: State before these tokens; None at position 0. If gradients are disabled, `wkv1` overwrites the tensors
            of the state.
        lengths: Number of valid tokens in each row (B,), 1 to T; None if all T are valid. y is meaningless at padding.
        denominator: "plain", or "weighted" by W = exp(f + alpha + beta).
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, H, N) in v's dtype, and the state after these tokens (None if `state` is None).

    Raises:
        ValueError: Shapes do not match, a position is past ctx_len, or the backend does not support the arguments.
        TypeError: k or v is float16, but exp(k) exceeds the range of float16.

    Source:
        RWKV-LM 0.01, doi 10.5281/zenodo.5196577. The weighted denominator is from AFT, arXiv 2105.14103.
    """
    _check(k, v, f, alpha, beta, state, lengths)
    positions = k.shape[1] if state is None else positions_read(state.position, k.shape[1], f.shape[-1])
    name, _ = choose_backend(backend, positions, v.dtype, free=f.ndim == 3, weighted=denominator == "weighted")
    with torch.autocast(k.device.type, enabled=False):
        if denominator == "weighted":
            # f, alpha and beta are logarithms. beta cancels.
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
        free: Whether f has its own weight for each pair of positions.
        weighted: Whether the denominator is weighted.

    Returns:
        The name of the backend, and the reason for the choice.

    Raises:
        ValueError: The backend is unknown or does not support the arguments.
    """
    if backend == "auto":
        if free:
            return "dense", "each pair of positions has its own weight"
        if positions <= DENSE_UP_TO:
            return "dense", f"fastest up to {DENSE_UP_TO} positions"
        if positions <= blocked_up_to(dtype):
            return "blocked", f"fastest from {DENSE_UP_TO} to {blocked_up_to(dtype)} positions"
        if weighted:
            return "blocked", "a weighted denominator needs rounding relative to each term"
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
    """Compute sigmoid(r) * wkv1(k, v, ...) from position 0, with the C kernels of `ops.common.fused`.

    The denominator is plain, not weighted.

    Args:
        kvr: k, v and r side by side, without bias (B, T, 3 C), in float32 or bfloat16.
        bias: Biases of k, v and r (3 C,).
        f: Weights by lag or by pair, as in `wkv1`.
        alpha: Weight of each source position (H, ctx_len); None for 1.
        beta: Weight of each target position (H, ctx_len); None for 1.
        heads: H.
        backend: "auto" or a name in `MIXES`.

    Returns:
        y (B, T, C), in kvr's dtype.

    Raises:
        ValueError: Shapes do not match, T is above ctx_len, or the backend does not support the arguments.
    """
    k, v, _ = (part.unflatten(2, (heads, -1)) for part in kvr.chunk(3, dim=2))
    _check(k, v, f, alpha, beta, None, None)
    name, _ = choose_backend(backend, kvr.shape[1], kvr.dtype, free=f.ndim == 3)
    # source has the layout of the matrix products, (H, T, B, N). total and gate are (B, T, H, N).
    source, total, gate = weigh(kvr, bias, alpha, heads)
    with torch.autocast(kvr.device.type, enabled=False):
        # (H, T, B, N) -> (B, T, H, N), a view
        numerator = MIXES[name](f, source.permute(2, 1, 0, 3), None, kvr.shape[1])
    return divide(numerator.permute(2, 1, 0, 3), total, gate, beta).flatten(2)


BACKENDS: dict[str, Callable[..., tuple[Tensor, Wkv1State | None]]] = {
    "reference": reference_wkv1,
    **{name: partial(parallel_wkv1, mix) for name, mix in MIXES.items()},
}
"""The backends of wkv1 by name: "reference" computes the formula in loops, the others compute all positions at once."""

DENSE_UP_TO = 256
"""Number of positions up to which the backend "dense" is the fastest, as measured in docs/performance.md."""


def blocked_up_to(dtype: torch.dtype) -> int:
    """Return the number of positions up to which "blocked" is faster than "spectral" (docs/performance.md).

    Args:
        dtype: Dtype of v and of the products in "blocked". Products of spectra run in at least float32.

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
        raise TypeError("k or v is float16, but exp(k) exceeds the range of float16; use bfloat16 or float32")
    if k.ndim != 4 or k.shape != v.shape or k.shape[1] == 0:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v has shape {tuple(v.shape)};"
            " both must be (batch, time >= 1, heads, head size)"
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
    if state is not None and len(k) and not is_recording():
        end = int((state.position + (k.shape[1] if lengths is None else lengths)).max())
    if end > f.shape[-1]:
        raise ValueError(f"{end} tokens are more than ctx_len {f.shape[-1]}, where the tables end; pass fewer tokens")
