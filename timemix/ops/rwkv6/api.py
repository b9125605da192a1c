"""The public op of the time-mix of RWKV-5 and RWKV-6, and the choice of its backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from timemix.ops.common.kernels import check_shapes, choose
from timemix.ops.rwkv6 import library
from timemix.ops.rwkv6.chunked import chunked_wkv6
from timemix.ops.rwkv6.compiled import KERNELS, compiled_wkv6
from timemix.ops.rwkv6.reference import reference_wkv6

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference_wkv6,
    "chunked": chunked_wkv6,
    "c": compiled_wkv6,
    "fla": library.library_wkv6,
}
"""The backends of wkv6 by name: "reference" loops over tokens, "chunked" computes matrix products of chunks, "c" loops
over tokens in C, and "fla" calls the kernels of the package flash-linear-attention in bfloat16."""


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
        lengths: Number of valid tokens in each row (B,), clamped to 0 to T; None if all T tokens are valid. At padding,
            y is zero.
        resets: Whether to set S to zero before each token (B, T) bool, as at the start of a document; None for never.
            In backend="chunked", a NaN spreads over resets and to earlier tokens of its chunk, because 0 * NaN is NaN.
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, H, N) in v's dtype, and the state after the valid tokens (None if `state` is None). Sums and states
        are float64 for float64 inputs, otherwise float32.

    Raises:
        ValueError: Shapes do not match, or the backend is unknown or does not support the arguments.

    Source:
        Eagle and Finch: RWKV-5 and RWKV-6, arXiv 2404.05892.
    """
    _check(r, w, k, v, u, state, lengths, resets)
    given, dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    B, T, H, N = r.shape
    r, w, k, v, u = (x.to(dtype) for x in (r, w, k, v, u))
    if lengths is not None:
        # Tokens whose inputs are zeros do not change the state, and their y is zero.
        counts = torch.arange(T, device=r.device) < lengths[:, None]
        r, w, k, v = (x.where(counts[:, :, None, None], 0) for x in (r, w, k, v))
        resets = None if resets is None else resets & counts
    start = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state.to(dtype)
    chosen, _ = choose_backend(backend, r, resets)
    with torch.autocast(r.device.type, enabled=False):
        y, end = BACKENDS[chosen](r, w, k, v, u, start, resets)
    return y.to(given), None if state is None else end


def choose_backend(backend: str, r: Tensor, resets: Tensor | None = None) -> tuple[str, str]:
    """Choose the backend of wkv6.

    Args:
        backend: "auto" or a name in `BACKENDS`.
        r: Receptances (B, T, H, N), in the dtype of the computation.
        resets: Whether to set S to zero before each token (B, T); None for never.

    Returns:
        The name of the backend, and the reason for the choice.

    Raises:
        ValueError: The backend is unknown or does not support the receptances.
    """
    hindrances = {"c": lambda: KERNELS.hindrance(r), "fla": lambda: library.hindrance(r, resets)}
    return choose(backend, r, hindrances, "matrix products in place of a loop over tokens")


def _check(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> None:
    """Check the shapes of the arguments of `wkv6`."""
    if r.ndim != 4 or r.shape[1] == 0:
        raise ValueError(f"r has shape {tuple(r.shape)}; it must be (batch, time >= 1, heads, head size)")
    B, T, H, N = r.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "w": (w, (H, N) if w.ndim == 2 else (B, T, H, N)),
        "k": (k, (B, T, H, N)),
        "v": (v, (B, T, H, N)),
        "u": (u, (H, N)),
        "state": (state, (B, H, N, N)),
        "lengths": (lengths, (B,)),
        "resets": (resets, (B, T)),
    }
    check_shapes("r", r, expected)
