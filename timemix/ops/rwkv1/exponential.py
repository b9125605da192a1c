"""wkv1 whose curves f_h(lag) are sums of K decaying exponentials: a recurrent network.

    f_h(lag) = sum_j coefficients_hj phi_hj(lag)  (+ taps_h(lag) at the first M lags)

Slots (2i, 2i+1) of a head are two real exponentials exp(-rate lag) where angle_i = 0; else a pair that shares the first
one's rate: exp(-rate lag) cos(angle_i lag) and exp(-rate lag) sin(angle_i lag). With K odd the last is real.

With t the position and rho_h = exp(-forget_h) where t >= ctx_len, else 1, per head, channel and slot

    S_j[t] = rho turn(S_j[t-1]) + phi_j(0) alpha(t) e^k[t] v[t]        turn: phi_j(lag) becomes phi_j(lag + 1)
    D[t]   = rho D[t-1] + e^k[t]
    wkv[t] = beta(t) sum_j coefficients_j S_j[t] / D[t]

which within ctx_len is wkv1. Past it the denominator of wkv1 would grow for ever and the output fade, hence rho, for
both; alpha and beta are there the mean of their last quarter.

Shapes: k, v (B, T, H, N); alpha, beta (H, ctx_len); those of the curves below.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common.causal import causal_convolution, running_sum
from timemix.ops.common.history import extended
from timemix.ops.rwkv1.api import K_MAX, K_MIN, compute_dtype, times_table, wkv1

CHUNK = 128
"""Positions that are computed at once; the state is carried from one chunk to the next."""

LEAST_RATE, MOST_FORGET = 1e-4, 0.3
"""Bounds in use. Every exponential decays; exp(K_MAX + MOST_FORGET * CHUNK), the largest term, is a float32."""


class Curves(NamedTuple):
    """Parameters: rate (H, K), angle (H, K // 2), coefficients (H, K), forget (H,), taps (H, M) or None."""

    rate: Tensor
    angle: Tensor
    coefficients: Tensor
    forget: Tensor
    taps: Tensor | None = None


class ExpState(NamedTuple):
    """What wkv1_exp keeps of the past, of one size at every position; at least float32.

    numerators (B, H, K, N): S; denominators (B, H, N): D; position (B,): tokens seen by each row; taps (B, H, M, N):
    the newest M values alpha e^k v, oldest first, faded as S is; None without taps.
    """

    numerators: Tensor
    denominators: Tensor
    position: Tensor
    taps: Tensor | None = None


def exp_state(
    batch: int,
    heads: int,
    head_size: int,
    exponentials: int,
    taps: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ExpState:
    """State before the first token."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, heads, *shape, head_size, dtype=dtype, device=device)

    position = torch.zeros(batch, dtype=torch.int64, device=device)
    return ExpState(zeros(exponentials), zeros(), position, zeros(taps) if taps else None)


def turned(curves: Curves, lags: Tensor) -> tuple[Tensor, Tensor]:
    """What multiplies a slot, and what its partner, when it grows older by `lags`: each (H, K, *lags), in float64.

    phi_2i(lag + d) = c phi_2i(lag) - s phi_2i+1(lag), phi_2i+1(lag + d) = c phi_2i+1(lag) + s phi_2i(lag) with c and s
    the two of d; of a real slot s is 0. In float64, as angle * lag loses digits.
    """
    K = curves.rate.shape[1]
    paired, angle = _paired(curves)
    rate = curves.rate.double().clamp(min=LEAST_RATE)
    first = torch.arange(K, device=rate.device) // 2 * 2
    rate = torch.where(paired, rate[:, first], rate)
    shape = (*rate.shape, *[1] * lags.ndim)
    lags = lags.double()
    decay = (-rate.view(shape) * lags).exp()
    phase = angle.view(shape) * lags
    return decay * phase.cos(), torch.where(paired.view(shape), decay * phase.sin(), 0)


def _paired(curves: Curves) -> tuple[Tensor, Tensor]:
    """Which slots (H, K) belong to a pair, and the angle of each; an angle of 0 keeps a gradient of 0."""
    K = curves.rate.shape[1]
    angle = F.pad(curves.angle.double().repeat_interleave(2, 1), (0, K % 2))
    paired = angle != 0
    return paired, torch.where(paired, angle, 0)


def basis(curves: Curves, lags: Tensor) -> Tensor:
    """phi (H, K, *lags) at lags of any shape, in float64."""
    cosines, sines = turned(curves, lags)
    paired, _ = _paired(curves)
    odd = torch.arange(paired.shape[1], device=paired.device) % 2 == 1
    return torch.where((paired & odd).view(*paired.shape, *[1] * lags.ndim), sines, cosines)


def curve(curves: Curves, length: int) -> Tensor:
    """f (H, length) by lag."""
    lags = torch.arange(length, device=curves.rate.device)
    f = (curves.coefficients.double()[:, :, None] * basis(curves, lags)).sum(1)
    if curves.taps is not None:
        taps = curves.taps.double()[:, :length]
        f = f + F.pad(taps, (0, length - taps.shape[1]))
    return f.to(curves.coefficients.dtype)


def unfading(curves: Curves, ctx_len: int) -> Tensor:
    """f (H, ctx_len) for texts that end there."""
    # A parameter without any gradient would have no place in an optimizer's state.
    return curve(curves, ctx_len) + 0 * curves.forget[:, None]


def initial_forget(ctx_len: int) -> float:
    """-log(1 - 1 / ctx_len), within its bounds: what is past then weighs as much as ctx_len tokens."""
    return min(-math.log1p(-1 / ctx_len), MOST_FORGET) if ctx_len > 1 else MOST_FORGET


def fading(forget: Tensor) -> Tensor:
    """-log rho (H,), within its bounds."""
    return forget.clamp(0, MOST_FORGET)


def partners(x: Tensor, dim: int) -> Tensor:
    """x with slots 2i and 2i+1 of `dim` exchanged, the new 2i negated; an odd last one is 0."""
    K = x.shape[dim]
    even, odd = x.narrow(dim, 0, K // 2 * 2).unflatten(dim, (K // 2, 2)).unbind(dim + 1)
    swapped = torch.stack([-odd, even], dim + 1).flatten(dim, dim + 1)
    return swapped if K % 2 == 0 else torch.cat([swapped, torch.zeros_like(x.narrow(dim, K - 1, 1))], dim)


def wkv1_exp(
    k: Tensor,
    v: Tensor,
    curves: Curves,
    alpha: Tensor | None,
    beta: Tensor | None,
    ctx_len: int,
    state: ExpState | None = None,
    *,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ExpState | None]:
    """Weighted average of the past of each channel (formula above), at any position.

    k, v (B, T, H, N) in float32, bfloat16 or float64; alpha, beta (H, ctx_len), None for 1. Returns y (B, T, H, N) in
    v's dtype, and the state after these tokens, or None where `state` is None (training). `lengths` (B,), each from 1
    to T: only the first `lengths` tokens of a row count; y is meaningless after them. The state is consumed.

    k is clamped to [-60, 30]; exp, sums, the division and all that touches the state run in at least float32, outside
    autocast; products within a chunk in v's dtype with float32 accumulation. `backend`: auto, or reference, the
    recurrence above in loops.

    Raises ValueError for shapes that do not fit or an unknown backend; TypeError for float16, which exp(k) leaves.
    """
    _check(k, v, curves, alpha, beta, ctx_len, backend)
    B, T, H, N = k.shape
    with torch.autocast(k.device.type, enabled=False):
        if state is None and k.shape[1] <= ctx_len and backend == "auto":
            return wkv1(k, v, unfading(curves, ctx_len), alpha, beta)[0], None
        alpha, beta = (None if table is None else extended(table, ctx_len + 1) for table in (alpha, beta))
        past = state
        if past is None:
            taps = 0 if curves.taps is None else curves.taps.shape[1]
            past = exp_state(B, H, N, curves.rate.shape[1], taps, dtype=compute_dtype(v), device=k.device)
        if backend == "reference":
            y, past = _reference(k, v, curves, alpha, beta, ctx_len, past, lengths)
            return y, None if state is None else past
        parts = []
        f = curve(curves, min(T, CHUNK))
        for start in range(0, T, CHUNK):
            part = slice(start, start + CHUNK)
            left = None if lengths is None else (lengths - start).clamp(0, CHUNK)
            y, past = _chunk(k[:, part], v[:, part], curves, f, alpha, beta, ctx_len, past, left)
            parts.append(y)
    return torch.cat(parts, 1), None if state is None else past


def _reference(
    k: Tensor,
    v: Tensor,
    curves: Curves,
    alpha: Tensor | None,
    beta: Tensor | None,
    ctx_len: int,
    past: ExpState,
    lengths: Tensor | None,
) -> tuple[Tensor, ExpState]:
    """The recurrence, position by position, row by row; alpha and beta (H, ctx_len + 1), the last for all after it."""
    B, T, H, _ = k.shape
    K, dtype = curves.rate.shape[1], past.numerators.dtype
    rate, rho = curves.rate.clamp(min=LEAST_RATE), (-fading(curves.forget)).exp()[:, None]
    ones = rate.new_ones(H, ctx_len + 1)
    alpha, beta = (ones if table is None else table for table in (alpha, beta))
    y, numerators, denominators, taps = [], [], [], []
    for b in range(B):
        S, D, start = past.numerators[b], past.denominators[b], int(past.position[b])
        recent = [] if past.taps is None else list(past.taps[b].unbind(1))
        length = T if lengths is None else int(lengths[b])
        y_row = []
        for step in range(length):
            t = start + step
            place = min(t, ctx_len)
            fade = rho if t >= ctx_len else torch.ones_like(rho)
            exp_k = k[b, step].to(dtype).clamp(K_MIN, K_MAX).exp()
            x = alpha[:, place, None] * exp_k * v[b, step].to(dtype)
            heads = []
            for h in range(H):
                slots = [(-rate[h, j]).exp() * S[h, j] * fade[h] + x[h] for j in range(K)]
                for i in range(K // 2):
                    angle = curves.angle[h, i]
                    if angle != 0:
                        cosine, sine = (-rate[h, 2 * i]).exp() * fade[h] * S[h, 2 * i : 2 * i + 2]
                        slots[2 * i] = angle.cos() * cosine - angle.sin() * sine + x[h]
                        slots[2 * i + 1] = angle.sin() * cosine + angle.cos() * sine
                heads.append(torch.stack(slots))
            S, D = torch.stack(heads), fade * D + exp_k
            total = (curves.coefficients[:, :, None] * S).sum(1)
            if curves.taps is not None:
                recent = [fade * old for old in recent[1:]] + [x]
                M = curves.taps.shape[1]
                total = total + sum(curves.taps[:, m, None] * recent[M - 1 - m] for m in range(M))
            y_row.append(beta[:, place, None] * total / D)
        y_row += [torch.zeros_like(past.denominators[b])] * (T - length)
        y.append(torch.stack(y_row).to(v.dtype))
        numerators.append(S)
        denominators.append(D)
        if recent:
            taps.append(torch.stack(recent, 1))
    seen = T if lengths is None else lengths
    after = torch.stack(numerators), torch.stack(denominators), past.position + seen
    return torch.stack(y), ExpState(*after, torch.stack(taps) if taps else None)


def _chunk(
    k: Tensor,
    v: Tensor,
    curves: Curves,
    f: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    ctx_len: int,
    past: ExpState,
    lengths: Tensor | None,
) -> tuple[Tensor, ExpState]:
    """At most CHUNK positions at once: a convolution with f, and what the state adds to each of them.

    What rho takes away is the same above and below: instead, the later a source the more it is worth, until the state
    is brought back to size at the end. `lengths` may be 0 here.
    """
    L = k.shape[1]
    dtype, position = past.numerators.dtype, past.position
    steps = torch.arange(L, device=k.device)
    exp_k = k.to(dtype).clamp(K_MIN, K_MAX).exp()
    if lengths is not None:
        exp_k = torch.where((steps < lengths[:, None])[:, :, None, None], exp_k, 0)

    def fadings(seen: Tensor) -> Tensor:
        """Steps past ctx_len among the first `seen` (B, ...) of this chunk."""
        before = position.view(-1, *[1] * (seen.ndim - 1))
        return (before + seen - ctx_len).clamp(min=0) - (before - ctx_len).clamp(min=0)

    forget = fading(curves.forget).to(dtype)
    growth = (fadings(steps[None] + 1)[:, :, None] * forget).exp()
    weights = exp_k * growth[..., None]
    # Mixed-type arithmetic is slow on CPU, hence the explicit casts.
    source = times_table(weights, alpha, position) * v.to(dtype)

    numerator = causal_convolution(source.to(v.dtype), f[:, :L], L).to(dtype)
    # S grown older by d, times the coefficients, is S times what the coefficients become the other way round.
    cosines, sines = turned(curves, steps + 1)
    c = curves.coefficients.double()[:, :, None]
    reading = (c * cosines - partners(c, 1) * sines).to(dtype)
    numerator = numerator + (reading.transpose(1, 2) @ past.numerators).transpose(1, 2)
    if curves.taps is not None and past.taps is not None:
        M = curves.taps.shape[1]
        lags = steps[:, None] + M - torch.arange(M, device=k.device)
        taps = F.pad(curves.taps, (0, L))[:, lags].to(dtype)
        numerator = numerator + (taps @ past.taps).transpose(1, 2)
    total = past.denominators[:, None] + running_sum(weights.flatten(2)).view(weights.shape)
    y = times_table(numerator / total, beta, position).to(v.dtype)

    seen = torch.full_like(position[:1], L) if lengths is None else lengths
    shrink = (-fadings(seen.expand(len(position)))[:, None] * forget).exp()[:, :, None]
    cosines, sines = (x.to(dtype).permute(2, 0, 1)[..., None] for x in turned(curves, seen))
    # Padding is zero in `source`, whatever lag it is given.
    phi = basis(curves, (seen[:, None] - 1 - steps).clamp(min=0)).to(dtype).permute(2, 0, 1, 3)
    added = phi @ source.transpose(1, 2)
    numerators = cosines * past.numerators + sines * partners(past.numerators, 2) + added
    recent = None
    if past.taps is not None:
        history = torch.cat([past.taps, source.transpose(1, 2)], 2)
        newest = seen[:, None] + torch.arange(past.taps.shape[2], device=k.device)
        rows = torch.arange(len(position), device=k.device)[:, None]
        recent = history.transpose(1, 2)[rows, newest].transpose(1, 2) * shrink[..., None]
    after = numerators * shrink[..., None], total[:, -1] * shrink, position + seen
    return y, ExpState(*after, recent)


def _check(
    k: Tensor, v: Tensor, curves: Curves, alpha: Tensor | None, beta: Tensor | None, ctx_len: int, backend: str
) -> None:
    if k.dtype == torch.float16 or v.dtype == torch.float16:
        raise TypeError("wkv1_exp refuses float16: exp(k) leaves its range; use bfloat16 or float32")
    if k.ndim != 4 or k.shape != v.shape or k.shape[1] == 0:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must both be (batch, time >= 1, heads, head size)")
    if backend not in ("auto", "reference"):
        raise ValueError(f"unknown wkv1_exp backend {backend!r}; known: auto, reference")
    H, K = k.shape[2], curves.rate.shape[-1]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "rate": (curves.rate, (H, K)),
        "angle": (curves.angle, (H, K // 2)),
        "coefficients": (curves.coefficients, (H, K)),
        "forget": (curves.forget, (H,)),
        "alpha": (alpha, (H, ctx_len)),
        "beta": (beta, (H, ctx_len)),
    }
    for name, (x, shape) in shapes.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} {tuple(x.shape)} must be {shape}: heads {H}, exponentials {K}, ctx_len {ctx_len}")
