"""Parameters spread over positions, whose gradient the framework's own kernels sum, also in a compiled step.

Compiled code would sum it in the midst of its loops: column by column at a tenth of the speed of memory, or, for the
rows of an embedding, in the order in which threads come, which differs from run to run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("timemix::sum_to", mutates_args=())
def _sum_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum of x over the dims in which `shape`, of as many dims, has 1."""
    return x.sum_to_size(shape) if x.shape != tuple(shape) else x.clone()


@_sum_to.register_fake
def _(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        return x.expand(shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum_to(gradient.contiguous(), ctx.shape), None


def spread(x: Tensor, like: Tensor) -> Tensor:
    """x, in the type of `like` and of as many dims, broadcast to its shape."""
    x = x.to(like.dtype)
    x = x.view((1,) * (like.ndim - x.ndim) + x.shape)
    return _Spread.apply(x, like.shape) if torch.compiler.is_compiling() else x


@torch.library.custom_op("timemix::embedding", mutates_args=())
def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows (B, T, C) of weight (V, C) at tokens (B, T)."""
    return F.embedding(tokens, weight)


@embedding.register_fake
def _(weight: Tensor, tokens: Tensor) -> Tensor:
    return weight.new_empty(*tokens.shape, weight.shape[1])


@torch.library.custom_op("timemix::embedding_backward", mutates_args=())
def _embedding_backward(gradient: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(gradient, tokens, vocab_size, -1, False)


@_embedding_backward.register_fake
def _(gradient: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    return gradient.new_empty(vocab_size, gradient.shape[-1])


def _embedding_setup(ctx, inputs, output) -> None:
    weight, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab_size = len(weight)


def _embedding_gradient(ctx, gradient: Tensor) -> tuple[Tensor, None]:
    return _embedding_backward(gradient, *ctx.saved_tensors, ctx.vocab_size), None


embedding.register_autograd(_embedding_gradient, setup_context=_embedding_setup)
