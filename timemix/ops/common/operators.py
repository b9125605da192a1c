"""Tensor functions that are opaque to torch.compile, without the cost of a custom operator in eager code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Operator:
    """A function that is a custom PyTorch operator in compiled code and for selective recomputation, else plain Python.

    On the first call of a custom operator, PyTorch imports its compiler. Importing the compiler takes longer than
    generating a short text. In eager code, a `torch.autograd.Function` therefore provides the gradients.

    Args:
        name: Name of the operator, "timemix::NAME".
        function: Function of tensors and numbers that does not change its arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.custom = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.custom.register_fake
        self._differentiable: Callable[..., Any] = self.custom
        self.__doc__ = function.__doc__

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Register the function that computes the gradients, as for `torch.library.custom_op`.

        Args:
            backward: Function that maps (ctx, gradient of the result) to the gradients of the arguments.
            setup_context: Function of (ctx, inputs, output) that saves values for `backward` in ctx.
        """
        self.custom.register_autograd(backward, setup_context=setup_context)
        parts = {"forward": self.function, "setup_context": setup_context, "backward": backward}
        methods = {name: staticmethod(part) for name, part in parts.items()}
        function: Any = type(self.function.__name__, (torch.autograd.Function,), methods)
        self._differentiable = function.apply

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_observed(arguments):
            return self.custom(*arguments)
        return self._differentiable(*arguments) if torch.is_grad_enabled() else self.function(*arguments)


def _is_observed(arguments: tuple[Any, ...]) -> bool:
    """Return whether a tensor subclass or a dispatch mode, such as selective recomputation, observes operators."""
    if _get_current_dispatch_mode() is not None:
        return True
    return any(isinstance(x, Tensor) and type(x) not in (Tensor, nn.Parameter) for x in arguments)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Return a decorator that turns a function into an `Operator`.

    Args:
        name: Name of the operator, "timemix::NAME".

    Returns:
        The decorator.
    """
    return lambda function: Operator(name, function)
