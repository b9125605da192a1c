"""The recurrence of wkv4 in a loop over tokens, to which tests compare the other backends.

Each channel averages values with positive weights. Sums over s < t:

    y[t] = (sum_s exp((t - 1 - s) w + k[s]) v[s] + exp(u + k[t]) v[t])
         / (sum_s exp((t - 1 - s) w + k[s])      + exp(u + k[t]))

The numerator is a exp(p) and the denominator is b exp(p), with the state (a, b, p). p is the largest exponent, so no
exponential exceeds 1.
"""

import torch
from torch import Tensor


def reference_wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence token by token.

    Args:
        w: Log-decay (C,), at most 0.
        u: Bonus of the current token (C,), added to its key.
        k: Keys (B, T, C).
        v: Values (B, T, C).
        state: State (a, b, p) before these tokens, of shape (B, 3, C).
        resets: Whether to forget all previous tokens before each token (B, T); None for never.

    Returns:
        y (B, T, C), and the state after these tokens.
    """
    (a, b, p), y = state.unbind(1), []
    for t in range(k.shape[1]):
        if resets is not None:
            a, b = (torch.where(resets[:, t, None], 0, x) for x in (a, b))
            p = torch.where(resets[:, t, None], EMPTY, p)
        now = u + k[:, t]
        # The maximum only scales both sums, so it needs no gradient.
        q = torch.maximum(p, now).detach()
        old, new = (p - q).exp(), (now - q).exp()
        y.append((old * a + new * v[:, t]) / (old * b + new))
        q = torch.maximum(p + w, k[:, t]).detach()
        old, new = (p + w - q).exp(), (k[:, t] - q).exp()
        a, b, p = old * a + new * v[:, t], old * b + new, q
    return torch.stack(y, 1), torch.stack((a, b, p), 1)


EMPTY = -1e38
"""The exponent p of a state without tokens."""
