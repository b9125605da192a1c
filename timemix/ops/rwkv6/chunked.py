"""wkv6 in chunks of n tokens, with matrix products instead of a loop over tokens.

The formulas are for one head. R, W, K, V are the (n, N) arrays of the tokens of a chunk, and S is the state (keys,
values) at the start of the chunk. D[t,s] is the decay of what token s wrote, at the read of token t > s:

    D[t,s] = exp(W[s+1] + ... + W[t-1])
    y[t] = (sum of D[t,s] R[t] K[s] over the keys) V[s] for all s < t, + (R[t] u K[t]) V[t] + (R[t] e^before[t]) S
    S' = diag(e^(sum of W)) S + (K e^after)^T V

before[t] is the sum of W over earlier tokens, and after[s] over later tokens of the chunk.

The pairs s < t are those that the middle of the chunk divides, and the pairs within each half. The halves are divided
in the same way, down to single tokens. For a block with the middle m, D[t,s] is the product of two factors, each at
most 1:

    e^(W[m] + ... + W[t-1])   of the second half, times   e^(W[s+1] + ... + W[m-1])   of the first half

So the pairs of all blocks of one size are one product of matrices. The division of a factor e^(W[1] + ... + W[t]) by
another would overflow, because log-decays have no lower bound: e^400 is infinite in float32. A difference of such sums
would lose the digits of a small sum next to a large one. The factors above need no division and no difference, neither
here nor in the gradients.

A reset of token t sets its read R[t] to zero (not the bonus), and W[t] to minus infinity, because e^W[t] is the factor
of all earlier tokens in every later read.

In shapes, G is the number of chunks of all rows and heads together, n is the number of tokens in a chunk, and N is the
head size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 64
"""n, the largest number of tokens in a chunk. A power of two."""


def chunked_wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute wkv6 in chunks. Only the inputs are stored for the backward pass, which computes the chunks again.

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
    y, end = checkpoint(_wkv6, r, w, k, v, u, state, resets, use_reentrant=False, preserve_rng_state=False)
    return y, end


def _wkv6(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = r.shape
    # The least power of two from T on, at most CHUNK
    n = min(CHUNK, 1 << (T - 1).bit_length())
    shape = B, H, -(-T // n)
    current = (r * u * k).sum(-1, keepdim=True) * v
    w = w.expand_as(r)
    if resets is not None:
        r = r.where(~resets[:, :, None, None], 0)
        w = w.where(~resets[:, :, None, None], -torch.inf)
    R, W, K, V = (_to_chunks(x, n) for x in (r, w, k, v))
    # (G, n, N) (G, N, n) -> (G, N, N) -> (B, H, chunks, N, N)
    written = ((K * _after(W).exp()).mT @ V).unflatten(0, shape)
    decay = W.sum(1).exp().unflatten(0, shape)
    states = [state]
    for i in range(shape[2]):
        states.append(states[-1] * decay[:, :, i, :, None] + written[:, :, i])
    S = torch.stack(states[:-1], 2).flatten(0, 2)
    Y = (R * _before(W).exp()) @ S + _within(R, W, K, V)
    # (G, n, N) -> (B, H, chunks, n, N) -> (B, chunks, n, H, N) -> (B, T, H, N)
    y = Y.unflatten(0, shape).permute(0, 2, 3, 1, 4).flatten(1, 2)
    return y[:, :T] + current, states[-1]


def _to_chunks(x: Tensor, n: int) -> Tensor:
    # Tokens whose inputs are zeros do not change the state, because their decay is e^0.
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % n))
    # (B, T, H, N) -> (B, chunks, n, H, N) -> (B, H, chunks, n, N) -> (G, n, N)
    chunks: Tensor = x.unflatten(1, (-1, n)).permute(0, 3, 1, 2, 4).flatten(0, 2)
    return chunks


def _before(W: Tensor) -> Tensor:
    """Sum the log-decays of earlier tokens (..., n, N), without a difference: the first sum is 0."""
    return F.pad(W[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _after(W: Tensor) -> Tensor:
    """Sum the log-decays of later tokens (..., n, N)."""
    return _before(W.flip(-2)).flip(-2)


def _within(R: Tensor, W: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """Return what tokens read of earlier tokens of their chunk (G, n, N)."""
    Y = torch.zeros_like(V)
    half = R.shape[1] // 2
    while half:
        # (G, n, N) -> (G, blocks, 2 halves, half, N)
        first, second = (
            [x.unflatten(1, (-1, 2, half))[:, :, i] for x in chosen] for i, chosen in enumerate(((K, W, V), (R, W)))
        )
        keys, reads = first[0] * _after(first[1]).exp(), second[0] * _before(second[1]).exp()
        # (half of reads, half of keys) (half of keys, N)
        read = (reads @ keys.mT) @ first[2]
        # (G, blocks, half, N) -> (G, blocks, 2 halves, half, N) -> (G, n, N)
        Y = Y + F.pad(read[:, :, None], (0, 0, 0, 0, 1, 0)).flatten(1, 3)
        half //= 2
    return Y
