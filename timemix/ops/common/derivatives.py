"""Refusal of second derivatives by functions whose backward pass PyTorch cannot differentiate."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from timemix.errors import Unavailable

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """Return the backward pass of a `torch.autograd.Function` that has no second derivatives.

    The decorator of the same name of PyTorch raises an error only if a gradient that arrives requires a gradient.
    Otherwise, the second derivatives would be zero.

    Args:
        backward: Function that maps (ctx, gradients of the results) to the gradients of the arguments.

    Returns:
        A function that computes without gradients, and raises `Unavailable` for create_graph=True.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Tensor | None) -> Any:
        # The backward pass runs with gradients exactly if create_graph is True.
        if torch.is_grad_enabled():
            raise Unavailable(
                "this operation has no second derivatives; leave out create_graph=True (recurrences have second"
                " derivatives with backend='reference')"
            )
        return backward(ctx, *gradients)

    return checked
