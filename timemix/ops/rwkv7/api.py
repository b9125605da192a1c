"""The public op of the time-mix of RWKV-7, and the choice of its backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from timemix.ops.common.kernels import check_shapes, choose
from timemix.ops.rwkv7 import library
from timemix.ops.rwkv7.chunked import chunked_wkv7
from timemix.ops.rwkv7.compiled import KERNELS, compiled_wkv7
from timemix.ops.rwkv7.reference import reference_wkv7

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference_wkv7,
    "chunked": chunked_wkv7,
    "c": compiled_wkv7,
    "fla": library.library_wkv7,
}
"""The backends of wkv7 by name: "reference" loops over tokens, "chunked" computes matrix products of chunks, "c" loops
over tokens in C, and "fla" calls the kernels of the package flash-linear-attention in bfloat16."""


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute the recurrence of RWKV-7, whose state is one matrix per head.

    Each head has a state S of size (values, keys). In the formulas, r, w, k, v, a, b are column vectors of token t:

        S[t] = S[t-1] (diag(exp(w)) + a b^T) + v k^T            y[t] = S[t] r

    RWKV-7 passes a = -kk and b = kk * (in-context learning rate), where kk has length 1, and w >= -exp(-1/2).

    Args:
        r: Receptances (B, T, H, N), T >= 1.
        w: Log-decays (B, T, H, N), at most 0. The backend "chunked" needs log-decays of at least -2.5, so that
            exponentials stay in range.
        k: Keys (B, T, H, N).
        v: Values (B, T, H, N).
        a: Vectors that read the previous state by the product S a (B, T, H, N).
        b: Vectors along which S a is added to the state (B, T, H, N).
        state: State S before these tokens, of shape (B, H, values N, keys N); None for zeros. `wkv7` does not change
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
        RWKV-7 "Goose", arXiv 2503.14456.
    """
    _check(r, w, k, v, a, b, state, lengths, resets)
    dtype = torch.promote_types(v.dtype, torch.float32)
    B, T, H, N = r.shape
    inputs = [x.to(dtype) for x in (r, w, k, v, a, b)]
    if lengths is not None:
        # Tokens whose inputs are zeros do not change the state, and their y is zero.
        counts = torch.arange(T, device=r.device) < lengths[:, None]
        inputs = [x.where(counts[:, :, None, None], 0) for x in inputs]
        resets = None if resets is None else resets & counts
    start = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state.to(dtype)
    chosen, _ = choose_backend(backend, inputs[0], resets)
    with torch.autocast(r.device.type, enabled=False):
        y, end = BACKENDS[chosen](*inputs, start, resets)
    return y.to(v.dtype), None if state is None else end


def choose_backend(backend: str, r: Tensor, resets: Tensor | None = None) -> tuple[str, str]:
    """Choose the backend of wkv7.

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
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> None:
    """Check the shapes of the arguments of `wkv7`."""
    if r.ndim != 4 or r.shape[1] == 0:
        raise ValueError(f"r has shape {tuple(r.shape)}; it must be (batch, time >= 1, heads, head size)")
    B, T, H, N = r.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        **{name: (x, (B, T, H, N)) for name, x in {"w": w, "k": k, "v": v, "a": a, "b": b}.items()},
        "state": (state, (B, H, N, N)),
        "lengths": (lengths, (B,)),
        "resets": (resets, (B, T)),
    }
    check_shapes("r", r, expected)
