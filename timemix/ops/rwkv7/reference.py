"""The recurrence of wkv7 in a loop, to which all other forms are compared.

Per head, with the state S of size (values, keys), for each token t:

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
        a: Vectors that the state is read with before it is updated (B, T, H, N).
        b: Vectors along which the result is added to the state (B, T, H, N).
        state: S before these tokens (B, H, N, N): values, keys.
        resets: Whether S is zero before a token (B, T); None: never.

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
