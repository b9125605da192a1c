"""wkv7 by the Triton kernels of the package flash-linear-attention (fla), with matrix products in bfloat16 on CUDA.

The first call for each device and head size compares the kernels with the backend "chunked". If a result differs by
more than the rounding of bfloat16, the kernels are not used.
"""

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.ops.rwkv7.chunked import chunked_wkv7

DEVICES = ("cuda",)
"""Types of devices that the kernels support."""

TOLERANCE = 0.02
"""Largest difference from "chunked", relative to the largest value of each result. bfloat16 rounds by up to 0.4 %."""

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
    if r.device.type not in DEVICES:
        return f"the package flash-linear-attention needs cuda, not {r.device.type}"
    if r.dtype == torch.float64 or resets is not None:
        return "the package flash-linear-attention supports neither float64 nor resets"
    if torch.compiler.is_compiling():
        return "torch.compile cannot compile the package flash-linear-attention"
    if importlib.util.find_spec("fla") is None:
        return "the package flash-linear-attention is not installed"
    return _difference(r.device, r.shape[-1])


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
    try:
        found, expected = (_results(function, given, weights) for function in (library_wkv7, chunked_wkv7))
    except Exception as error:  # Another package, and its compiler, can raise any exception.
        return f"the package flash-linear-attention fails: {str(error).strip().partition(chr(10))[0][:200]}"
    worst = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True))
    if worst <= TOLERANCE:
        return None
    return f"results of the package flash-linear-attention differ by {worst:.1e} from those of 'chunked'"


def _results(
    function: Callable[..., tuple[Tensor, Tensor]], given: list[Tensor], weights: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Return y, the last state and the gradients of all arguments."""
    arguments = [x.clone().requires_grad_() for x in given]
    with torch.enable_grad(), torch.autocast(given[0].device.type, enabled=False):
        y, end = function(*arguments, None)
        gradients = torch.autograd.grad((y * weights[0]).sum() + (end * weights[1]).sum(), arguments)
    return [y.detach(), end.detach(), *gradients]
