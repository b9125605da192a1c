"""wkv1 as a recurrent network, with curves f_h(lag) that are sums of K decaying exponentials.

    f_h(lag) = sum_j coefficients_hj phi_hj(lag)  (+ taps_h(lag) at the first M lags)

Slots 2i and 2i+1 of a head are either two real exponentials or a rotating pair:

    angle_i = 0:  two real exponentials, phi(lag) = exp(-rate lag), each with its own rate
    else:         a pair, exp(-rate lag) cos(angle_i lag) and exp(-rate lag) sin(angle_i lag), with the rate of slot 2i

If K is odd, the last slot is real. The recurrence below holds for each head, channel and slot. t is the position, and
rho_h is exp(-forget_h) if t >= ctx_len, else 1. The function turn maps phi_j(lag) to phi_j(lag + 1):

    S_j[t] = rho turn(S)_j[t-1] + phi_j(0) alpha(t) e^k[t] v[t]
    D[t]   = rho D[t-1] + e^k[t]
    wkv[t] = beta(t) sum_j coefficients_j S_j[t] / D[t]

Within ctx_len, the recurrence computes wkv1. Past ctx_len, the denominator of wkv1 would grow without bound, and new
tokens would have less and less weight. So past ctx_len, rho multiplies numerator and denominator. Past ctx_len, alpha
and beta are constant, and equal to the mean of their last quarter.

There are three implementations:

- Without a state and within ctx_len, as in training, `wkv1` computes y from the curves f.
- In all other cases, `_chunk` computes chunks of 128 positions.
- For tests, `_reference` computes the recurrence in loops.

The shapes are k, v (B, T, H, N) and alpha, beta (H, ctx_len). `Curves` lists the shapes of the parameters of curves.
Each head has K slots (exponentials) and M taps (values added to f at the first M lags).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common.causal import causal_convolution, running_sum
from timemix.ops.common.history import extended
from timemix.ops.rwkv1.api import wkv1
from timemix.ops.rwkv1.curves import LEAST_RATE, Curves, basis, curve, fading, partners, turned, unfading
from timemix.ops.rwkv1.parallel import times_table
from timemix.ops.rwkv1.state import K_MAX, K_MIN, compute_dtype

CHUNK = 128
"""Number of positions in a chunk. Each chunk starts from the state after the previous chunk."""


class ExpState(NamedTuple):
    """State of wkv1_exp, in at least float32. The size of the state does not depend on the position.

    Args:
        numerators: S (B, H, K, N).
        denominators: D (B, H, N).
        position: Number of earlier tokens of each row (B,).
        taps: Newest M values of alpha e^k v (B, H, M, N), oldest first, multiplied by rho at each token past ctx_len;
            None if M is 0.
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
    """Create the state before the first token.

    Args:
        batch: B, number of rows.
        heads: H, number of heads.
        head_size: N, number of channels of a head.
        exponentials: K, number of exponentials.
        taps: M, number of first lags with a value added to f, at least 0.
        dtype: Dtype of the sums, float32 or float64.
        device: Device of the tensors.

    Returns:
        A state of zeros, at position 0.
    """

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, heads, *shape, head_size, dtype=dtype, device=device)

    position = torch.zeros(batch, dtype=torch.int64, device=device)
    return ExpState(zeros(exponentials), zeros(), position, zeros(taps) if taps else None)


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
    """Compute wkv1 at any position, with curves f that are sums of exponentials.

        wkv[t] = sum_{u<=t} f(t-u) alpha(u) beta(t) exp(k[u]) v[u]  /  sum_{u<=t} exp(k[u])        within ctx_len

    Past ctx_len, numerator and denominator are multiplied by rho = exp(-forget) at each token.

    k is clamped to [-60, 30]. exp, sums, the division and the state are in at least float32, even under autocast.
    Products within a chunk run in v's dtype with float32 accumulation.

    Args:
        k: Keys (B, T, H, N) in float32, bfloat16 or float64.
        v: Values (B, T, H, N).
        curves: Parameters of f.
        alpha: Weight of each source position (H, ctx_len); None: all weights are 1.
        beta: Weight of each target position (H, ctx_len); None: all weights are 1.
        ctx_len: Position from which rho applies.
        state: State before these tokens, invalid after the call; None at position 0.
        lengths: Number of valid tokens in each row (B,), 1 to T; None if all T tokens are valid. At padding, y has no
            meaning.
        backend: "auto", or "reference" for the recurrence in loops.

    Returns:
        y (B, T, H, N) in v's dtype, and the state after these tokens (None if `state` is None).

    Raises:
        ValueError: Shapes do not match, or the backend is unknown.
        TypeError: k or v is float16, but exp(k) exceeds the range of float16.

    Source:
        RWKV-LM 0.01, doi 10.5281/zenodo.5196577, for positions within ctx_len.
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
    """Compute the recurrence in loops over rows, positions and slots.

    alpha and beta are (H, ctx_len + 1), and their last entry applies to all positions from ctx_len on. All arguments
    except alpha and beta are those of `wkv1_exp`.
    """
    B, T, H, _ = k.shape
    K, dtype = curves.rate.shape[1], past.numerators.dtype
    rate, rho = curves.rate.clamp(min=LEAST_RATE), (-fading(curves.forget)).exp()[:, None]
    ones = rate.new_ones(H, ctx_len + 1)
    alpha, beta = (ones if table is None else table for table in (alpha, beta))
    y, numerators, denominators, taps = [], [], [], []
    for b in range(B):
        # S (H, K, N), D (H, N)
        S, D, start = past.numerators[b], past.denominators[b], int(past.position[b])
        recent = [] if past.taps is None else list(past.taps[b].unbind(1))
        length = T if lengths is None else int(lengths[b])
        y_row = []
        for step in range(length):
            t = start + step
            entry = min(t, ctx_len)
            fade = rho if t >= ctx_len else torch.ones_like(rho)
            exp_k = k[b, step].to(dtype).clamp(K_MIN, K_MAX).exp()
            # (H, N)
            x = alpha[:, entry, None] * exp_k * v[b, step].to(dtype)
            heads = []
            for h in range(H):
                slots = [(-rate[h, j]).exp() * S[h, j] * fade[h] + x[h] for j in range(K)]
                for i in range(K // 2):
                    angle = curves.angle[h, i]
                    if angle != 0:
                        # turn(S) is a rotation by the angle, multiplied by the decay.
                        cosine, sine = (-rate[h, 2 * i]).exp() * fade[h] * S[h, 2 * i : 2 * i + 2]
                        slots[2 * i] = angle.cos() * cosine - angle.sin() * sine + x[h]
                        slots[2 * i + 1] = angle.sin() * cosine + angle.cos() * sine
                heads.append(torch.stack(slots))
            S, D = torch.stack(heads), fade * D + exp_k
            total = (curves.coefficients[:, :, None] * S).sum(1)
            if curves.taps is not None:
                # The newest M values, oldest first.
                recent = [fade * old for old in recent[1:]] + [x]
                M = curves.taps.shape[1]
                total = total + sum(curves.taps[:, m, None] * recent[M - 1 - m] for m in range(M))
            y_row.append(beta[:, entry, None] * total / D)
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
    """Compute at most CHUNK positions at once.

    In the formulas, i is the position within the chunk, x = alpha e^k v, and S and D are the state before the chunk:

        numerator[i] = sum_{j<=i} f(i-j) x[j]  +  sum_j coefficients_j turn^(i+1)(S)_j  (+ taps of the past)
        total[i]     = D + sum_{j<=i} e^k[j]
        wkv[i]       = beta(i) numerator[i] / total[i]
        after the chunk:  S = turn^L(S) + sum_j phi(L-1-j) x[j],   D = total[L-1]

    Numerator and total may have a common factor, which cancels. So the past is not multiplied by rho at each step.
    Instead, each source (x or e^k) is multiplied by rho^-n. Here n is the number of steps past ctx_len, from the start
    of the chunk up to the source. At the end of the chunk, the state is multiplied by rho^n. Unlike in `wkv1_exp`,
    entries of `lengths` may be 0.
    """
    L = k.shape[1]
    dtype, position = past.numerators.dtype, past.position
    steps = torch.arange(L, device=k.device)
    exp_k = k.to(dtype).clamp(K_MIN, K_MAX).exp()
    if lengths is not None:
        exp_k = torch.where((steps < lengths[:, None])[:, :, None, None], exp_k, 0)

    def fadings(seen: Tensor) -> Tensor:
        """Return n, the number of steps past ctx_len among the first `seen` (B, ...) steps of this chunk."""
        before = position.view(-1, *[1] * (seen.ndim - 1))
        return (before + seen - ctx_len).clamp(min=0) - (before - ctx_len).clamp(min=0)

    forget = fading(curves.forget).to(dtype)
    # rho^-n: (B, L, H)
    growth = (fadings(steps[None] + 1)[:, :, None] * forget).exp()
    weights = exp_k * growth[..., None]
    # The casts are explicit because arithmetic on mixed dtypes is slow on the CPU. (B, L, H, N)
    source = times_table(weights, alpha, position) * v.to(dtype)

    # With one position, as in a decode step, each sum over the chunk has one term.
    convolved = source.to(v.dtype) * f[:, 0, None] if L == 1 else causal_convolution(source.to(v.dtype), f[:, :L], L)
    numerator = convolved.to(dtype)
    # The contribution of the state is c . turn^d(S) = (turn^d transposed)(c) . S for d = 1 to L. So turn^d transposed
    # is applied to the coefficients alone: (H, L, K) by S (B, H, K, N) -> (B, H, L, N) -> (B, L, H, N)
    cosines, sines = turned(curves, steps + 1)
    c = curves.coefficients.double()[:, :, None]
    reading = (c * cosines - partners(c, 1) * sines).to(dtype)
    numerator = numerator + (reading.transpose(1, 2) @ past.numerators).transpose(1, 2)
    if curves.taps is not None and past.taps is not None:
        M = curves.taps.shape[1]
        # At step i, the past value m (oldest first) has the lag i + M - m: (H, L, M) by (B, H, M, N) -> (B, H, L, N)
        lags = steps[:, None] + M - torch.arange(M, device=k.device)
        taps = F.pad(curves.taps, (0, L))[:, lags].to(dtype)
        numerator = numerator + (taps @ past.taps).transpose(1, 2)
    # (B, L, H, N) -> (B, L, H N) -> (B, L, H, N)
    summed = weights if L == 1 else running_sum(weights.flatten(2), False).view(weights.shape)
    total = past.denominators[:, None] + summed
    y = times_table(numerator / total, beta, position).to(v.dtype)

    # The state after `seen` tokens of each row. `seen` is (1,) or (B,), so the dimension `rows` below is 1 or B.
    seen = torch.full_like(position[:1], L) if lengths is None else lengths
    # rho^n: (B, H, 1)
    shrink = (-fadings(seen.expand(position.shape[0]))[:, None] * forget).exp()[:, :, None]
    # (H, K, rows) -> (rows, H, K, 1)
    cosines, sines = (x.to(dtype).permute(2, 0, 1)[..., None] for x in turned(curves, seen))
    # phi at the lag of each source: (H, K, rows, L) -> (rows, H, K, L). `source` is 0 at padding, so phi can have any
    # value there.
    phi = basis(curves, (seen[:, None] - 1 - steps).clamp(min=0)).to(dtype).permute(2, 0, 1, 3)
    # (rows, H, K, L) by (B, H, L, N) -> (B, H, K, N)
    added = phi @ source.transpose(1, 2)
    numerators = cosines * past.numerators + sines * partners(past.numerators, 2) + added
    recent = None if past.taps is None else _newest(past.taps, source, seen) * shrink[..., None]
    after = numerators * shrink[..., None], total[:, -1] * shrink, position + seen
    return y, ExpState(*after, recent)


def _newest(taps: Tensor, source: Tensor, seen: Tensor) -> Tensor:
    """Return the newest M values (B, H, M, N) of each row, after the first `seen` (B,) or (1,) sources of the row."""
    # (B, H, M + L, N): each row needs the last M entries up to source number `seen`.
    history = torch.cat([taps, source.transpose(1, 2)], 2)
    newest = seen[:, None] + torch.arange(taps.shape[2], device=taps.device)
    rows = torch.arange(taps.shape[0], device=taps.device)[:, None]
    return history.transpose(1, 2)[rows, newest].transpose(1, 2)


def _check(
    k: Tensor, v: Tensor, curves: Curves, alpha: Tensor | None, beta: Tensor | None, ctx_len: int, backend: str
) -> None:
    """Check the arguments of `wkv1_exp`."""
    if k.dtype == torch.float16 or v.dtype == torch.float16:
        raise TypeError("k or v is float16, but exp(k) exceeds the range of float16; use bfloat16 or float32")
    if k.ndim != 4 or k.shape != v.shape or k.shape[1] == 0:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v has shape {tuple(v.shape)};"
            " both must be (batch, time >= 1, heads, head size)"
        )
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend={backend!r} is not supported; choose auto or reference")
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
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be {shape} for {H} heads, {K} exponentials and ctx_len"
                f" {ctx_len}"
            )
