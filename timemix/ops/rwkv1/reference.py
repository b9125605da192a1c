"""The naive implementation of wkv1 in loops, to which tests compare all other implementations.

wkv[t] = sum_{u<=t} W[t,u] exp(k[u]) v[u]  /  sum_{u<=t} exp(k[u])
"""

import torch
from torch import Tensor

from timemix.ops.rwkv1.state import K_MAX, K_MIN, Denominator, Wkv1State, compute_dtype, wkv1_state


def reference_wkv1(
    k: Tensor,
    v: Tensor,
    f: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    state: Wkv1State | None,
    lengths: Tensor | None,
    denominator: Denominator,
) -> tuple[Tensor, Wkv1State | None]:
    """Compute the formula of wkv1 in loops over rows, positions and terms.

    Args:
        k: Keys (B, T, H, N).
        v: Values (B, T, H, N).
        f: Weights by lag (H, ctx_len) or by pair of positions (H, ctx_len, ctx_len).
        alpha: Weight of each source position (H, ctx_len); None: all weights are 1.
        beta: Weight of each target position (H, ctx_len); None: all weights are 1.
        state: State before these tokens; None at position 0.
        lengths: Number of valid tokens in each row (B,), 1 to T; None if all T tokens are valid.
        denominator: "plain" or "weighted".

    Returns:
        y (B, T, H, N) in v's dtype, and the next state (None if `state` is None).
    """
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
        # alpha exp(k) v of each past position: a list of (H, N)
        numerator = [past.numerators[b, :, u] for u in range(start)]
        if denominator == "plain":
            total = past.denominators[b]
        else:
            weights = [past.denominators[b, :, u] for u in range(start)]
        y_row = []
        for t in range(start, start + length):
            exp_k = k[b, t - start].to(dtype).clamp(K_MIN, K_MAX).exp()
            numerator.append(alpha[:, t, None] * exp_k * v[b, t - start])
            # f_h(t - u) for u = 0 to t: a list of (H, 1)
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
        # U tensors (H, N) -> (H, ctx_len, N)
        numerators.append(torch.cat([torch.stack(numerator, 1), past.numerators[b, :, end:]], dim=1))
        if denominator == "weighted":
            total = torch.cat([torch.stack(weights, 1), past.denominators[b, :, end:]], dim=1)
        denominators.append(total)
    if state is None:
        return torch.stack(y), None
    seen = torch.full_like(state.position, T) if lengths is None else lengths
    return torch.stack(y), Wkv1State(torch.stack(numerators), torch.stack(denominators), state.position + seen)
