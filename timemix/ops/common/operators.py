"""Operators that the compiler leaves alone, and that cost nothing where there is no compiler."""

from collections.abc import Callable
from typing import Any

import torch


class Operator:
    """A function of tensors as a custom operator of torch, for gradients and for compiled code; elsewhere itself.

    The first call of a custom operator has torch import its compiler, which takes longer than to write a short text.
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
    """Makes a function an Operator of this name."""
    return lambda function: Operator(name, function)
