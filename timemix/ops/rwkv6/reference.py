"""The recurrence of wkv6 in a loop over tokens, to which tests compare the other backends.

Each head has a state S of size (keys, values). For each token, in this order:

    y = (S + (u * k) v^T)^T r            S = diag(exp(w)) S + k v^T

S is zero before the first token and before a token with a reset. y reads S before the token, RWKV-7 after it.
"""

import torch
from torch import Tensor


def reference_wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence token by token.

    Args:
        r: Receptances (B, T, H, N).
        w: Log-decays (B, T, H, N) or (H, N), at most 0.
        k: Keys (B, T, H, N).
        v: Values (B, T, H, N).
        u: Bonus of the current token (H, N).
        state: State S before these tokens, of shape (B, H, keys N, values N).
        resets: Whether to set S to zero before each token (B, T); None for never.

    Returns:
        y (B, T, H, N), and the state after these tokens.
    """
    S, y, w = state, [], w.expand_as(r)
    for t in range(r.shape[1]):
        if resets is not None:
            S = torch.where(resets[:, t, None, None, None], 0, S)
        # (B, H, keys, 1) (B, H, 1, values) -> (B, H, keys, values)
        written = k[:, t, ..., None] * v[:, t, :, None]
        y.append(torch.einsum("bhkv,bhk->bhv", S + u[..., None] * written, r[:, t]))
        S = S * w[:, t, ..., None].exp() + written
    return torch.stack(y, 1), S
