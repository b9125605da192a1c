"""The recurrence of wkv7 in a loop over tokens, to which tests compare the backend "chunked".

Each head has a state S of size (values, keys). For each token:

    S = S (diag(exp(w)) + a b^T) + v k^T            y = S r

S is zero before the first token and before a token with a reset.
"""

import torch
from torch import Tensor


def reference_wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence token by token.

    Args:
        r: Receptances (B, T, H, N).
        w: Log-decays (B, T, H, N), at most 0.
        k: Keys (B, T, H, N).
        v: Values (B, T, H, N).
        a: Vectors that read the previous state by the product S a (B, T, H, N).
        b: Vectors along which S a is added to the state (B, T, H, N).
        state: State S before these tokens, of shape (B, H, values N, keys N).
        resets: Whether to set S to zero before each token (B, T); None for never.

    Returns:
        y (B, T, H, N), and the state after these tokens.
    """
    S, y = state, []
    for t in range(r.shape[1]):
        if resets is not None:
            S = torch.where(resets[:, t, None, None, None], 0, S)
        # (B, H, values, keys) (B, H, keys) -> (B, H, values)
        removed = torch.einsum("bhvk,bhk->bhv", S, a[:, t])
        S = S * w[:, t, :, None].exp() + removed[..., None] * b[:, t, :, None] + v[:, t, ..., None] * k[:, t, :, None]
        y.append(torch.einsum("bhvk,bhk->bhv", S, r[:, t]))
    return torch.stack(y, 1), S
