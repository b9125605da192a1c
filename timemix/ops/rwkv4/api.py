"""The public op of the time-mix of RWKV-4, and the choice of its backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from timemix.ops.common.kernels import check_shapes, choose
from timemix.ops.rwkv4.chunked import chunked_wkv4
from timemix.ops.rwkv4.compiled import KERNELS, compiled_wkv4
from timemix.ops.rwkv4.reference import EMPTY, reference_wkv4

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference_wkv4,
    "chunked": chunked_wkv4,
    "c": compiled_wkv4,
}
"""The backends of wkv4 by name: "reference" loops over tokens, "chunked" computes softmaxes in chunks, and "c" loops
over tokens in C."""


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Compute the time-mix of RWKV-4: an average of values, whose weights decay per channel.

    For each channel, with sums over the tokens s < t:

        y[t] = (sum_s exp((t - 1 - s) w + k[s]) v[s] + exp(u + k[t]) v[t])
             / (sum_s exp((t - 1 - s) w + k[s])      + exp(u + k[t]))

    Args:
        w: Log-decay (C,), at most 0. RWKV-4 passes -exp(time_decay).
        u: Bonus of the current token (C,), added to its key.
        k: Keys (B, T, C), T >= 1.
        v: Values (B, T, C).
        state: State before these tokens (B, 3, C): numerator a, denominator b and their exponent p, which stand for
            the sums a exp(p) and b exp(p). None: no tokens. `wkv4` does not change the state, and computes its
            gradient.
        lengths: Number of valid tokens in each row (B,), clamped to 0 to T; None if all T tokens are valid. At padding,
            y is zero.
        resets: Whether to forget all previous tokens before each token (B, T) bool; None for never.
            In backend="chunked", a NaN spreads over resets and to earlier tokens of its chunk, because 0 * NaN is NaN.
        backend: "auto" or a name in `BACKENDS`.

    Returns:
        y (B, T, C) in v's dtype, and the state after the valid tokens (None if `state` is None). Sums and states are
        float64 for float64 inputs, otherwise float32.

    Raises:
        ValueError: Shapes do not match, or the backend is unknown or does not support the arguments.

    Source:
        RWKV, arXiv 2305.13048.
    """
    _check(w, u, k, v, state, lengths, resets)
    result, dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    B, T, C = k.shape
    w, u, k, v = (x.to(dtype) for x in (w, u, k, v))
    if lengths is None:
        counts = torch.full((B,), T, device=k.device)
    else:
        # As in wkv6 and wkv7, a row has no more than T tokens. The C code has no check of its own.
        counts, is_valid = lengths.clamp(0, T), (torch.arange(T, device=k.device) < lengths[:, None])[..., None]
        # Padding may hold any number, such as NaN.
        k, v = k.where(is_valid, 0), v.where(is_valid, 0)
    start = empty_state(B, C, dtype, k.device) if state is None else state.to(dtype)
    chosen, _ = choose_backend(backend, k)
    with torch.autocast(k.device.type, enabled=False):
        y, end = BACKENDS[chosen](w, u, k, v, start, counts, resets)
    return y.to(result), None if state is None else end


def empty_state(batch: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the state (batch, 3, channels) of `wkv4` before the first token.

    Args:
        batch: Number of rows.
        channels: Number of channels.
        dtype: Type of the numbers.
        device: PyTorch device.

    Returns:
        The state: sums of 0, and the exponent `EMPTY`.
    """
    state = torch.zeros(batch, 3, channels, dtype=dtype, device=device)
    state[:, 2] = EMPTY
    return state


def choose_backend(backend: str, k: Tensor) -> tuple[str, str]:
    """Choose the backend of wkv4.

    Args:
        backend: "auto" or a name in `BACKENDS`.
        k: Keys (B, T, C), in the dtype of the computation.

    Returns:
        The name of the backend, and the reason for the choice.

    Raises:
        ValueError: The backend is unknown or does not support the keys.
    """
    return choose(backend, k, {"c": lambda: KERNELS.hindrance(k)}, "softmaxes of chunks in place of a loop over tokens")


def _check(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None, lengths: Tensor | None, resets: Tensor | None
) -> None:
    """Check the shapes of the arguments of `wkv4`."""
    if k.ndim != 3 or k.shape[1] == 0:
        raise ValueError(f"k has shape {tuple(k.shape)}; it must be (batch, time >= 1, channels)")
    B, T, C = k.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "w": (w, (C,)),
        "u": (u, (C,)),
        "v": (v, (B, T, C)),
        "state": (state, (B, 3, C)),
        "lengths": (lengths, (B,)),
        "resets": (resets, (B, T)),
    }
    check_shapes("k", k, expected)
