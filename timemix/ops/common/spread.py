"""Broadcasts and embeddings whose gradients are summed by PyTorch's own kernels, even in compiled code.

    y[..., c] = x[c];   dx[c] = sum of dy[..., c]

torch.compile would fuse the sum dx into a loop that runs column by column, at a tenth of the memory bandwidth. For an
embedding, torch.compile would add rows in the order in which threads arrive, and the order differs from run to run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("timemix::sum_to", mutates_args=())
def _sum_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum x over the dimensions that have size 1 in `shape`. `shape` has as many dimensions as x."""
    return x.sum_to_size(shape) if x.shape != tuple(shape) else x.clone()


@_sum_to.register_fake
def _(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


class _Broadcast(torch.autograd.Function):
    """Tensor.expand, whose gradient is summed in an operator that the compiler does not fuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        return x.expand(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum_to(gradient.contiguous(), ctx.shape), None


def broadcast_parameter(x: Tensor, like: Tensor) -> Tensor:
    """Broadcast a parameter to the shape of `like`.

    Args:
        x: The parameter, with at most as many dimensions as `like`.
        like: The tensor to which x is added or by which x is multiplied.

    Returns:
        x in the dtype of `like`. In compiled code x has the shape of `like`, else the number of dimensions of `like`.
    """
    x = x.to(like.dtype)
    x = x.view((1,) * (like.ndim - x.ndim) + x.shape)
    return _Broadcast.apply(x, like.shape) if torch.compiler.is_compiling() else x  # type: ignore[no-untyped-call]


@torch.library.custom_op("timemix::embedding", mutates_args=())
def embedding(weight: Tensor, tokens: Tensor) -> Tensor:
    """Look up the rows of an embedding for token ids.

    Args:
        weight: Weight (V, C).
        tokens: Token ids (B, T), 0 to V - 1.

    Returns:
        Embeddings (B, T, C).
    """
    return F.embedding(tokens, weight)


@embedding.register_fake
def _(weight: Tensor, tokens: Tensor) -> Tensor:
    return weight.new_empty(*tokens.shape, weight.shape[1])


@torch.library.custom_op("timemix::embedding_backward", mutates_args=())
def _embedding_backward(gradient: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    result: Tensor = torch.ops.aten.embedding_dense_backward(gradient, tokens, vocab_size, -1, False)
    return result


@_embedding_backward.register_fake
def _(gradient: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    return gradient.new_empty(vocab_size, gradient.shape[-1])


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab_size = len(weight)


def _embedding_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _embedding_backward(gradient, *ctx.saved_tensors, ctx.vocab_size), None


embedding.register_autograd(_embedding_gradient, setup_context=_embedding_setup)
