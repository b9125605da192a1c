"""wkv7 in chunks of n tokens, with matrix products instead of a loop over tokens.

The formulas are for one head and one chunk. Each row of R, W, K, V, A, B is a token. S is the state (values, keys) at
the start of the chunk.

    G = cumsum(W)        E = G - W        g: the last row of G

The decay from the start of the chunk is e^E[t] just before token t, and e^G[t] just after token t. The effects of all
tokens on later tokens of the chunk are the entries of four n x n matrices:

    X  = strict_lower((A e^E) (B e^-G)^T)        Ak = strict_lower((A e^E) (K e^-G)^T)
    Rb = lower((R e^G) (B e^-G)^T)               Rk = lower((R e^G) (K e^-G)^T)         lower: with the diagonal

    U = (I - X)^-1 (Ak V + (A e^E) S^T)          row t: the product of a of token t and the state before token t
    Y = (R e^G) S^T + Rk V + Rb U
    S' = S diag(e^g) + V^T (K e^(g-G)) + U^T (B e^(g-G))

U is linear in S: U = P + Q S^T. Hence S' = S M + C, where M and C do not depend on S. M and C are computed for all
chunks at once. The loop over chunks then has one product of N x N matrices per chunk.

e^-G can be large. All exponents are therefore centred at the middle of the chunk, and are at most max(-W) n / 2. For
n = 64 and W >= -0.6065, the bound of RWKV-7, exponents are at most 19. Above the diagonal of the four matrices,
exponents can be larger than max(-W) n / 2. Masks set the entries above the diagonal to zero, because 0 times infinity
is not 0.

A reset divides a chunk into segments. Entries of the four matrices for two tokens of different segments are zero. Only
the first segment reads S, and only the last segment adds to S'.

In shapes, G is the number of chunks of all rows and heads together, n is the number of tokens in a chunk, and N is the
head size. R, W, K, V, A, B are (G, n, N).

Sources: the WY form of the delta rule, arXiv 2406.06484, and RWKV-7, arXiv 2503.14456.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common.derivatives import once_differentiable

CHUNK = 64
"""n, the number of tokens in a chunk."""


def chunked_wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute wkv7 in chunks. Inputs and the states between chunks are stored for the backward pass.

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
    T = r.shape[1]
    n = min(CHUNK, T)
    inputs = [_padded(x, -T % n) for x in (r, w, k, v, a, b)]
    if resets is not None:
        resets = F.pad(resets, (0, -T % n))
    apply: Any = _Chunked.apply
    y, end = apply(state, resets, n, *inputs)
    return y[:, :T], end


def _padded(x: Tensor, padding: int) -> Tensor:
    # Tokens whose inputs are zeros do not change the state, because their decay is e^0.
    return F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x


def _to_chunks(x: Tensor, n: int) -> Tensor:
    # (B, T, H, N) -> (B, chunks, n, H, N) -> (B, H, chunks, n, N) -> (G, n, N)
    chunks: Tensor = x.unflatten(1, (-1, n)).permute(0, 3, 1, 2, 4).flatten(0, 2)
    return chunks


class _Chunks:
    """The factors and matrices of all chunks, which the forward and backward passes share.

    Args:
        inputs: r, w, k, v, a, b (B, T, H, N), where T is a multiple of n.
        resets: (B, T), or None.
        n: Number of tokens in a chunk.
    """

    def __init__(self, inputs: Sequence[Tensor], resets: Tensor | None, n: int) -> None:
        B, T, H, _ = inputs[0].shape
        self._shape = B, H, T // n
        self.R, W, self.K, self.V, self.A, self.B = (_to_chunks(x, n) for x in inputs)
        G = W.cumsum(1)
        E, g, m = G - W, G[:, -1:], G[:, n // 2, None]
        # Decays from the middle of the chunk to just after a token and just before a token, and inverse decays
        self.to_after, self.to_before, self.inverse = (G - m).exp(), (E - m).exp(), (m - G).exp()
        # Decays from the start of the chunk, and to the end of the chunk
        self.start_after, self.start_before, self.to_end = G.exp(), E.exp(), (g - G).exp()
        self.decay = g[:, 0].exp()
        lower = torch.ones(1, n, n, dtype=torch.bool, device=G.device).tril()
        if resets is not None:
            # Number of the segment of each token: (B, T) -> (B, chunks, n) -> (B, H, chunks, n) -> (G, n)
            segment = resets.unflatten(1, (-1, n)).long().cumsum(2)
            segment = segment[:, None].expand(-1, inputs[0].shape[2], -1, -1).flatten(0, 2)
            lower = lower & (segment[:, :, None] == segment[:, None, :])
            first, last = segment == 0, segment == segment[:, -1:]
            self.start_after = self.start_after.where(first[..., None], 0)
            self.start_before = self.start_before.where(first[..., None], 0)
            self.to_end = self.to_end.where(last[..., None], 0)
            self.decay = self.decay.where(first[:, -1:], 0)
        self.lower, self.strict = lower, lower.tril(-1)
        self.R_in, self.A_in = self.R * self.to_after, self.A * self.to_before
        self.K_out, self.B_out = self.K * self.inverse, self.B * self.inverse
        self.R_start, self.A_start = self.R * self.start_after, self.A * self.start_before
        self.K_end, self.B_end = self.K * self.to_end, self.B * self.to_end
        # (G, n, N) (G, N, n) -> (G, n, n)
        self.X = (self.A_in @ self.B_out.mT).where(self.strict, 0)
        self.Ak = (self.A_in @ self.K_out.mT).where(self.strict, 0)
        self.Rb = (self.R_in @ self.B_out.mT).where(self.lower, 0)
        self.Rk = (self.R_in @ self.K_out.mT).where(self.lower, 0)

    def solve(self, right: Tensor) -> Tensor:
        """Solve (I - X) Z = right by forward substitution."""
        found: Tensor = torch.linalg.solve_triangular(-self.X, right, upper=False, unitriangular=True)
        return found

    def solve_transposed(self, right: Tensor) -> Tensor:
        """Solve (I - X)^T Z = right by backward substitution."""
        found: Tensor = torch.linalg.solve_triangular(-self.X.mT, right, upper=True, unitriangular=True)
        return found

    def of_tokens(self, x: Tensor) -> Tensor:
        """Return x of all tokens of all chunks in the shape of the inputs."""
        # (G, n, N) -> (B, H, chunks, n, N) -> (B, chunks, n, H, N) -> (B, T, H, N)
        tokens: Tensor = x.unflatten(0, self._shape).permute(0, 2, 3, 1, 4).flatten(1, 2)
        return tokens

    def by_chunk(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return a matrix of each chunk for each chunk of a row."""
        # (G, N, N) -> (B, H, N, N) for each chunk of a row
        chunks: tuple[Tensor, ...] = x.unflatten(0, self._shape).unbind(2)
        return chunks


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, resets: Tensor | None, n: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        c = _Chunks(inputs, resets, n)
        P, Q = c.solve(c.Ak @ c.V), c.solve(c.A_start)
        M = torch.diag_embed(c.decay) + Q.mT @ c.B_end
        C = c.V.mT @ c.K_end + P.mT @ c.B_end
        states = [state]
        for M_i, C_i in zip(c.by_chunk(M), c.by_chunk(C), strict=True):
            states.append(states[-1] @ M_i + C_i)
        # The state at the start of each chunk: (B, H, chunks, N, N) -> (G, N, N)
        S = torch.stack(states[:-1], 2).flatten(0, 2)
        Y = c.R_start @ S.mT + c.Rk @ c.V + c.Rb @ (P + Q @ S.mT)
        ctx.save_for_backward(*inputs, S, states[-1], resets)
        ctx.n = n
        return c.of_tokens(Y), states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, S, end, resets = ctx.saved_tensors
        c = _Chunks(inputs, resets, ctx.n)
        dY = _to_chunks(dy, ctx.n)
        # Z is the gradient of the right side of (I - X) U = Ak V + (A e^E) S^T. Like U, Z is linear in a state:
        # Z = (I - X)^-T (Rb^T dY + B_end dS'^T) = O + L dS'^T
        O, L = c.solve_transposed(c.Rb.mT @ dY), c.solve_transposed(c.B_end)  # noqa: E741
        # The recurrence of the gradients of states: dS = dS' M^T + D
        M = torch.diag_embed(c.decay) + c.A_start.mT @ L
        D = dY.mT @ c.R_start + O.mT @ c.A_start
        d_states = [d_end]
        for M_i, D_i in zip(c.by_chunk(M)[::-1], c.by_chunk(D)[::-1], strict=True):
            d_states.append(d_states[-1] @ M_i.mT + D_i)
        # The gradient of the state after each chunk
        dS = torch.stack(d_states[-2::-1], 2).flatten(0, 2)
        U = c.solve(c.Ak @ c.V + c.A_start @ S.mT)
        Z = O + L @ dS.mT
        # S' of each chunk is S of the next chunk. S' of the last chunk is the final state.
        after = torch.stack([*c.by_chunk(S)[1:], end], 2).flatten(0, 2)
        gradients = _gradients(c, S, after, dY, dS, U, Z)
        return d_states[-1], None, None, *map(c.of_tokens, gradients)


def _gradients(
    c: _Chunks, S: Tensor, after: Tensor, dY: Tensor, dS: Tensor, U: Tensor, Z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of R, W, K, V, A, B, each of shape (G, n, N).

    Args:
        c: The chunks.
        S: State at the start of each chunk (G, N, N).
        after: State after each chunk (G, N, N).
        dY: Gradient of Y (G, n, N).
        dS: Gradient of the state after each chunk (G, N, N).
        U: Product of a of each token and the state before the token (G, n, N).
        Z: Gradient of the right side of (I - X) U = Ak V + (A e^E) S^T (G, n, N).
    """
    dRk = (dY @ c.V.mT).where(c.lower, 0)
    dRb = (dY @ U.mT).where(c.lower, 0)
    dX = (Z @ U.mT).where(c.strict, 0)
    dAk = (Z @ c.V.mT).where(c.strict, 0)
    dR = c.to_after * (dRb @ c.B_out + dRk @ c.K_out) + c.start_after * (dY @ S)
    dA = c.to_before * (dX @ c.B_out + dAk @ c.K_out) + c.start_before * (Z @ S)
    dB = c.inverse * (dX.mT @ c.A_in + dRb.mT @ c.R_in) + c.to_end * (U @ dS)
    dK = c.inverse * (dAk.mT @ c.A_in + dRk.mT @ c.R_in) + c.to_end * (c.V @ dS)
    dV = c.Rk.mT @ dY + c.K_end @ dS.mT + c.Ak.mT @ Z
    # In all formulas, R has the factor e^G, K and B have the factor e^-G, and A has the factor e^E. All terms of S'
    # have the factor e^g.
    dG = c.R * dR - c.K * dK - c.B * dB
    dG[:, -1] += (after * dS).sum(1)
    dE = c.A * dA
    # W[t] is a term of G[s] for s >= t, and a term of E[s] for s > t.
    dW = (dG + dE).flip(1).cumsum(1).flip(1) - dE
    return dR, dW, dK, dV, dA, dB
