"""Functions of tensors that torch.compile does not look into, without the cost of a custom operator elsewhere."""

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """A function that is a custom operator of torch for gradients and in compiled code, and itself elsewhere.

    On the first call of a custom operator torch imports its compiler, which takes longer than generating a short text.

    Args:
        name: name of the operator, "timemix::NAME".
        function: a function of tensors and numbers that writes into none of its arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.custom = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.custom.register_fake
        self.register_autograd = self.custom.register_autograd
        self.__doc__ = function.__doc__

    def __call__(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.custom(*arguments)
        return self.function(*arguments)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Return a decorator that turns a function into an `Operator`.

    Args:
        name: name of the operator, "timemix::NAME".

    Returns:
        The decorator.
    """
    return lambda function: Operator(name, function)
