"""wkv6 by the Triton kernels of the package flash-linear-attention (fla), with matrix products in bfloat16 on CUDA.

The first call for each device and head size compares the kernels with the backend "chunked". If a result differs by
more than the rounding of bfloat16, the kernels are not used.
"""

from functools import cache

import torch
from torch import Tensor

from timemix.ops.common import library
from timemix.ops.rwkv6.chunked import chunked_wkv6


def hindrance(r: Tensor, resets: Tensor | None = None) -> str | None:
    """Return the reason why the kernels of fla cannot compute wkv6.

    Args:
        r: An input of the recurrence (B, T, H, N).
        resets: Whether to set S to zero before each token (B, T); None for never.

    Returns:
        The reason; None if the kernels can compute wkv6.
    """
    return library.hindrance(r, resets) or _difference(r.device, r.shape[-1])


def library_wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute wkv6 by the kernels of fla.

    Args:
        r: Receptances (B, T, H, N).
        w: Log-decays (B, T, H, N) or (H, N), at most 0.
        k: Keys (B, T, H, N).
        v: Values (B, T, H, N).
        u: Bonus of the current token (H, N).
        state: State S before these tokens, of shape (B, H, keys N, values N).
        resets: None.

    Returns:
        y (B, T, H, N) in float32, and the state after these tokens.
    """
    from fla.ops.rwkv6 import chunk_rwkv6  # type: ignore[import-not-found]

    assert resets is None
    w = w.expand_as(r).contiguous()
    r, k, v = (x.to(torch.bfloat16) for x in (r, k, v))
    y, end = chunk_rwkv6(r, k, v, w, u, scale=1.0, initial_state=state.contiguous(), output_final_state=True)
    return y.float(), end


@cache
def _difference(device: torch.device, N: int) -> str | None:
    """Compare the kernels with "chunked" for random inputs. Return a reason not to use the kernels, or None."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    shape = (1, 129, 2, N)
    given = [draw(*shape), -draw(*shape).exp(), draw(*shape), draw(*shape), draw(2, N), draw(1, 2, N, N)]
    return library.difference(library_wkv6, chunked_wkv6, given, (draw(*shape), draw(1, 2, N, N)))
