"""wkv4 in chunks of tokens, with PyTorch operations on any device.

Within a chunk of n tokens, row t has the log-weights E[t, s] of the earlier tokens s of the chunk, of the state before
the chunk, and of the token itself:

    E[t, state] = p + t w        E[t, s] = (t - 1 - s) w + k[s] for s < t        E[t, t] = u + k[t]

The softmax of a row gives y[t]. So each chunk takes n (n + 1) exponentials per channel, none of a number above 0.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from timemix.ops.rwkv4.reference import EMPTY

CHUNK = 16
"""Number of tokens of a chunk."""

LEAST = -1e30
"""The least log-decay of a chunk."""


def chunked_wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    lengths: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute wkv4 chunk by chunk.

    Only the inputs and the state before each chunk are stored for the backward pass, which computes each chunk again.
    All weights would take n + 1 numbers for each number of k.

    Args:
        w: Log-decay (C,), at most 0.
        u: Bonus of the current token (C,), added to its key.
        k: Keys (B, T, C).
        v: Values (B, T, C).
        state: State (a, b, p) before these tokens, of shape (B, 3, C).
        lengths: Number of valid tokens in each row (B,).
        resets: Whether to forget all previous tokens before each token (B, T); None for never.

    Returns:
        y (B, T, C), and the state after the valid tokens.
    """
    y, T = [], k.shape[1]
    # Minus infinity times the distance 0 would be NaN. Any finite key is lost after a decay of this size.
    w = w.clamp(min=LEAST)
    for first in range(0, T, CHUNK):
        at = slice(first, min(first + CHUNK, T))
        given = w, u, k[:, at], v[:, at], state, lengths - first, None if resets is None else resets[:, at]
        piece, state = checkpoint(_chunk, *given, use_reentrant=False, preserve_rng_state=False)
        y.append(piece)
    return torch.cat(y, 1), state


def _chunk(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor, left: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the tokens of one chunk. `left` (B,) is the number of valid tokens from the chunk's first token on."""
    B, n, _ = k.shape
    a, b, p = state.unbind(1)
    t = torch.arange(n, device=k.device)
    # The document of each token of the chunk (B, n): the number of resets so far.
    document = torch.zeros(B, n, dtype=torch.long, device=k.device) if resets is None else resets.cumsum(1)
    # (n queries, n keys, C), then (B, n, n, C)
    distance = (t[:, None] - 1 - t).clamp(min=0)
    within = distance[..., None] * w + k[:, None]
    within = torch.where((t[:, None] == t)[..., None], (u + k)[:, None], within)
    is_seen = (t[:, None] >= t) & (document[:, :, None] == document[:, None])
    within = within.where(is_seen[..., None], EMPTY)
    # (B, n, C)
    carried = (p[:, None] + t[:, None] * w).where((document == 0)[..., None], EMPTY)
    largest = torch.maximum(within.amax(2), carried).detach()
    old, new = (carried - largest).exp(), (within - largest[:, :, None]).exp()
    # EMPTY - EMPTY would give weight 1 to a token that is not seen.
    old, new = old.where((document == 0)[..., None], 0), new.where(is_seen[..., None], 0)
    y = (old * a[:, None] + (new * v[:, None]).sum(2)) / (old * b[:, None] + new.sum(2))
    y = y.where((t < left[:, None])[..., None], 0)
    return y, _after(w, k, v, state, left.clamp(0, n), document)


def _after(w: Tensor, k: Tensor, v: Tensor, state: Tensor, count: Tensor, document: Tensor) -> Tensor:
    """Return the state after the first `count` (B,) tokens of a chunk. Without tokens, it is the state itself."""
    a, b, p = state.unbind(1)
    t = torch.arange(k.shape[1], device=k.device)
    last = document.gather(1, (count - 1).clamp(min=0)[:, None])
    is_kept = ((t < count[:, None]) & (document == last))[..., None]
    exponents = ((count[:, None] - 1 - t).clamp(min=0)[..., None] * w + k).where(is_kept, EMPTY)
    carries = (last == 0).expand_as(p)
    carried = (p + count[:, None] * w).where(carries, EMPTY)
    largest = torch.maximum(carried, exponents.amax(1)).detach()
    old, new = (carried - largest).exp().where(carries, 0), (exponents - largest[:, None]).exp().where(is_kept, 0)
    after = torch.stack((old * a + (new * v).sum(1), old * b + new.sum(1), largest), 1)
    return after.where((count > 0)[:, None, None], state)
