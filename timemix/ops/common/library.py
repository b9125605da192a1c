"""Kernels of the package flash-linear-attention (fla): when they can run, and their comparison with own code."""

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

DEVICES = ("cuda",)
"""Types of devices that the kernels support."""

TOLERANCE = 0.02
"""Largest difference from own code, relative to the largest value of each result. bfloat16 rounds by up to 0.4 %."""

Recurrence = Callable[..., tuple[Tensor, Tensor]]
"""A function of the arguments of a recurrence and of the resets (None), which returns y and the last state."""


def hindrance(r: Tensor, resets: Tensor | None) -> str | None:
    """Return the reason why no kernel of fla can compute a recurrence.

    Args:
        r: An input of the recurrence (B, T, H, N).
        resets: Whether to set the state to zero before each token (B, T); None for never.

    Returns:
        The reason; None if a kernel can run.
    """
    if r.device.type not in DEVICES:
        return f"the package flash-linear-attention needs cuda, not {r.device.type}"
    if r.dtype == torch.float64 or resets is not None:
        return "the package flash-linear-attention supports neither float64 nor resets"
    if torch.compiler.is_compiling():
        return "torch.compile cannot compile the package flash-linear-attention"
    if importlib.util.find_spec("fla") is None:
        return "the package flash-linear-attention is not installed"
    return None


def difference(kernels: Recurrence, own: Recurrence, given: Sequence[Tensor], weights: Sequence[Tensor]) -> str | None:
    """Compare y, the last state and the gradients of the kernels with those of own code.

    Args:
        kernels: The recurrence by the kernels.
        own: The recurrence by the backend "chunked".
        given: The arguments of both.
        weights: Weights of y and of the last state in the loss whose gradients are compared.

    Returns:
        A reason not to use the kernels; None if no result differs by more than `TOLERANCE`.
    """
    try:
        found, expected = (_results(function, given, weights) for function in (kernels, own))
    except Exception as error:  # Another package, and its compiler, can raise any exception.
        return f"the package flash-linear-attention fails: {str(error).strip().partition(chr(10))[0][:200]}"
    # numpy's maximum of numbers with NaN is NaN.
    worst = np.max([float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, expected, strict=True)])
    if worst <= TOLERANCE:
        return None
    return f"results of the package flash-linear-attention differ by {worst:.1e} from those of 'chunked'"


def _results(function: Recurrence, given: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return y, the last state and the gradients of all arguments."""
    arguments = [x.clone().requires_grad_() for x in given]
    with torch.enable_grad(), torch.autocast(given[0].device.type, enabled=False):
        y, end = function(*arguments, None)
        gradients = torch.autograd.grad((y * weights[0]).sum() + (end * weights[1]).sum(), arguments)
    return [y.detach(), end.detach(), *gradients]
