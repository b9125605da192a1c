"""wkv1: the time-mix of the 2021 RWKV (RWKV-LM 0.01, doi 10.5281/zenodo.5196577).

    wkv[t] = sum_{u<=t} W[t,u] exp(k[u]) v[u]  /  sum_{u<=t} exp(k[u])        per channel
    W[t,u] = f_h(t-u) alpha_h(u) beta_h(t)                                    per head h

With `denominator="weighted"` W stands in the denominator too, as in AFT (arXiv 2105.14103), and is made
positive: W[t,u] = exp(f_h(t-u) + alpha_h(u) + beta_h(t)); beta then cancels.

With f of shape (H, ctx_len, ctx_len) that table stands for f_h(t-u): one free weight for each pair, as in AFT-full.

Shapes: k, v (B, T, H, N); f, alpha, beta (H, ctx_len), f indexed by lag; or f (H, ctx_len, ctx_len) indexed by (t, u).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from timemix.ops.history import append, lags, pairs_at, toeplitz, weights_at

Denominator = Literal["plain", "weighted"]

K_MIN, K_MAX = -60.0, 30.0


class Wkv1State(NamedTuple):
    """What wkv1 keeps of the past; at least float32.

    numerators (B, H, ctx_len, N): alpha exp(k) v of every past position, zeros after it.
    denominators: the sum of exp(k) so far (B, H, N); with `denominator="weighted"` alpha exp(k) of every
    past position (B, H, ctx_len, N).
    position (B,): tokens seen by each row.
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
    """State before the first token."""
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
    """Weighted average of the past of each channel (formula above).

    k, v (B, T, H, N) in float32, bfloat16 or float64; f, alpha, beta (H, ctx_len), alpha and beta None for 1
    (weighted: for 0); f also (H, ctx_len, ctx_len), of which [:, t, u] counts where u <= t. Returns y (B, T, H, N)
    in v's dtype, and the state after these tokens, or None where `state` is None (training). `lengths` (B,), each
    from 1 to T: only the first `lengths` tokens of a row count; y is meaningless after them. The state is consumed:
    without gradients its tensors are written into.

    k is clamped to [-60, 30]; exp, sums and the division run in at least float32, outside autocast. Products
    W * (exp(k) v) run in v's dtype with float32 accumulation.

    Raises ValueError for shapes that do not fit, positions past ctx_len, or a backend that cannot serve;
    TypeError for float16, whose range exp(k) leaves.
    """
    _check(k, v, f, alpha, beta, state, lengths)
    name, _ = choose_backend(backend)
    with torch.autocast(k.device.type, enabled=False):
        if denominator == "weighted":
            f = f.exp()
            alpha = None if alpha is None else alpha.exp()
            beta = None
        return BACKENDS[name](k, v, f, alpha, beta, state, lengths, denominator)


def choose_backend(backend: str) -> tuple[str, str]:
    """Name of the backend that serves `backend`, and the reason.

    Raises ValueError for an unknown name.
    """
    if backend == "auto":
        return "dense", "the only parallel form"
    if backend not in BACKENDS:
        raise ValueError(f"unknown wkv1 backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
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
    """The formula, position by position, row by row."""
    B, T, H, N = k.shape
    dtype = _compute_dtype(v)
    past = state or wkv1_state(B, H, N, f.shape[-1], denominator=denominator, dtype=dtype, device=k.device)
    ones = f.new_ones(H, f.shape[-1])
    alpha = ones if alpha is None else alpha
    beta = ones if beta is None else beta

    y, numerators, denominators = [], [], []
    for b in range(B):
        start = int(past.position[b])
        length = T if lengths is None else int(lengths[b])
        numerator = [past.numerators[b, :, u] for u in range(start)]
        if denominator == "plain":
            total = past.denominators[b]
        else:
            weights = [past.denominators[b, :, u] for u in range(start)]
        y_row = []
        for t in range(start, start + length):
            exp_k = k[b, t - start].to(dtype).clamp(K_MIN, K_MAX).exp()
            numerator.append(alpha[:, t, None] * exp_k * v[b, t - start])
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
        numerators.append(torch.cat([torch.stack(numerator, 1), past.numerators[b, :, end:]], dim=1))
        if denominator == "weighted":
            total = torch.cat([torch.stack(weights, 1), past.denominators[b, :, end:]], dim=1)
        denominators.append(total)
    if state is None:
        return torch.stack(y), None
    seen = torch.full_like(state.position, T) if lengths is None else lengths
    return torch.stack(y), Wkv1State(torch.stack(numerators), torch.stack(denominators), state.position + seen)


def _dense(
    k: Tensor,
    v: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    state: Wkv1State | None,
    lengths: Tensor | None,
    denominator: Denominator,
) -> tuple[Tensor, Wkv1State | None]:
    """All positions at once: W as a matrix per head, one batched matrix product."""
    if state is not None:
        return _dense_from_state(k, v, f, alpha, beta, state, lengths, denominator)
    T = k.shape[1]
    exp_k = k.to(_compute_dtype(v)).clamp(K_MIN, K_MAX).exp()
    f = f.to(exp_k.dtype)
    W = toeplitz(f, T) if f.ndim == 2 else f[:, :T, :T].tril()
    source = exp_k if alpha is None else exp_k * alpha[:, :T].t()[:, :, None]
    # Mixed-type arithmetic is slow on CPU, hence the explicit casts.
    product = (source * v.to(source.dtype)).to(v.dtype)
    numerator = torch.einsum("htu,buhn->bthn", W.to(v.dtype), product).to(source.dtype)
    if denominator == "plain":
        total = exp_k.cumsum(1)
    else:
        total = torch.einsum("htu,buhn->bthn", W, source)
    y = numerator / total
    if beta is not None:
        y = y * beta[:, :T].t()[:, :, None]
    return y.to(v.dtype), None


def _dense_from_state(
    k: Tensor,
    v: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    state: Wkv1State,
    lengths: Tensor | None,
    denominator: Denominator,
) -> tuple[Tensor, Wkv1State]:
    """Prefill (T > 1) or one step (T = 1): the tokens join the history, then look back over all of it."""
    T = k.shape[1]
    position = state.position
    U = min(int(position.max()) + T, f.shape[-1])
    target = (position[:, None] + torch.arange(T, device=k.device)).clamp(max=f.shape[-1] - 1)

    exp_k = k.to(state.numerators.dtype).clamp(K_MIN, K_MAX).exp()
    if lengths is not None:
        counted = torch.arange(T, device=k.device) < lengths[:, None]
        exp_k = torch.where(counted[:, :, None, None], exp_k, 0)
    exp_k = exp_k.transpose(1, 2)
    source = exp_k if alpha is None else exp_k * alpha[:, target].transpose(0, 1)[..., None]
    numerators = append(state.numerators, source * v.transpose(1, 2), position, lengths)

    f = f.to(exp_k.dtype)
    W = weights_at(f, lags(position, T, U)) if f.ndim == 2 else pairs_at(f, position, T, U)
    y = W @ numerators[:, :, :U]
    if denominator == "plain":
        total = state.denominators[:, :, None] + exp_k.cumsum(2)
        denominators = total[:, :, -1]
    else:
        denominators = append(state.denominators, source, position, lengths)
        total = W @ denominators[:, :, :U]
    y = y / total
    if beta is not None:
        y = y * beta[:, target].transpose(0, 1)[..., None]
    seen = T if lengths is None else lengths
    return y.transpose(1, 2).to(v.dtype), Wkv1State(numerators, denominators, position + seen)


BACKENDS = {"reference": _reference, "dense": _dense}


def _compute_dtype(x: Tensor) -> torch.dtype:
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
