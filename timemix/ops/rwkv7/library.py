"""wkv7 by the Triton kernels of the package flash-linear-attention (fla), with matrix products in bfloat16 on CUDA.

The first call for each device and head size compares the kernels with the backend "chunked". If a result differs by
more than the rounding of bfloat16, the kernels are not used.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.common import library
from timemix.ops.rwkv7.chunked import chunked_wkv7

LEAST = -2.5
"""Least log-decay for which chunks of 64 tokens stay in the range of float32."""


def hindrance(r: Tensor, resets: Tensor | None = None) -> str | None:
    """Return the reason why the kernels of fla cannot compute wkv7.

    Args:
        r: An input of the recurrence (B, T, H, N).
        resets: Whether to set S to zero before each token (B, T); None for never.

    Returns:
        The reason; None if the kernels can compute wkv7.
    """
    return library.hindrance(r, resets) or _difference(r.device, r.shape[-1])


def library_wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute wkv7 by the kernels of fla.

    Args:
        r: Receptances (B, T, H, N).
        w: Log-decays (B, T, H, N), from -2.5 to 0.
        k: Keys (B, T, H, N).
        v: Values (B, T, H, N).
        a: Vectors that read the previous state by the product S a (B, T, H, N).
        b: Vectors along which S a is added to the state (B, T, H, N).
        state: State S before these tokens, of shape (B, H, values N, keys N).
        resets: None.

    Returns:
        y (B, T, H, N) in float32, and the state after these tokens.
    """
    from fla.ops.rwkv7 import chunk_rwkv7  # type: ignore[import-not-found]

    assert resets is None
    r, k, v, a, b = (x.to(torch.bfloat16) for x in (r, k, v, a, b))
    # fla stores a state as (keys, values).
    y, end = chunk_rwkv7(
        r, w, k, v, a, b, initial_state=state.mT.contiguous(), output_final_state=True, lower_bound=LEAST
    )
    return y.float(), end.mT


@cache
def _difference(device: torch.device, N: int) -> str | None:
    """Compare the kernels with "chunked" for random inputs. Return a reason not to use the kernels, or None."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    shape = (1, 129, 2, N)
    q, rate, w = F.normalize(draw(*shape), dim=-1), draw(*shape).sigmoid(), -0.6065 * draw(*shape).sigmoid()
    given = [draw(*shape), w, draw(*shape), draw(*shape), -q, q * rate, draw(1, 2, N, N)]
    weights = draw(*shape), draw(1, 2, N, N)
    return library.difference(library_wkv7, chunked_wkv7, given, weights)
