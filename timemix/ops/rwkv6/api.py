"""The public op of the time-mix of RWKV-5 and RWKV-6, and the choice of its backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from timemix.ops.rwkv6.reference import reference_wkv6

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"reference": reference_wkv6}
"""The backends of wkv6 by name: "reference" loops over tokens."""


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute the recurrence of RWKV-5 and RWKV-6, whose state is one matrix per head.

    Each head has a state S of size (keys, values). In the formulas, r, w, k, v, u are column vectors:

        y[t] = (S[t-1] + (u * k) v^T)^T r            S[t] = diag(exp(w)) S[t-1] + k v^T

    Args:
        r: Receptances (B, T, H, N), T >= 1.
        w: Log-decays, at most 0: of each token (B, T, H, N), as in RWKV-6, or of all tokens (H, N), as in RWKV-5.
        k: Keys (B, T, H, N).
        v: Values (B, T, H, N).
        u: Bonus of the current token (H, N).
        state: State S before these tokens, of shape (B, H, keys N, values N); None for zeros. `wkv6` does not change
            the state, and computes its gradient.
        lengths: Number of valid tokens in each row (B,), 1 to T; None if all T tokens are valid. At padding, y is zero.
        resets: Whether to set S to zero before each token (B, T) bool, as at the start of a document; None for never.
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, H, N) in v's dtype, and the state after the valid tokens (None if `state` is None). Sums and states
        are float64 for float64 inputs, otherwise float32.

    Raises:
        ValueError: Shapes do not match, or the backend is unknown or does not support the arguments.

    Source:
        Eagle and Finch: RWKV-5 and RWKV-6, arXiv 2404.05892.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    B, T, H, N = r.shape
    start = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state.to(dtype)
    if lengths is not None:
        raise NotImplementedError("lengths")
    w = w.expand(B, T, H, N)
    y, end = BACKENDS["reference"](*(x.to(dtype) for x in (r, w, k, v, u)), start, resets)
    return y.to(v.dtype), None if state is None else end


def choose_backend(backend: str, r: Tensor) -> tuple[str, str]:
    """Choose the backend of wkv6, and return its name and the reason."""
    return "reference", "asked for" if backend == "reference" else "the only backend"
