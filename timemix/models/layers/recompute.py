"""Activation checkpointing: some results of a block are stored for the backward pass, and others are recomputed."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from timemix.models.config import Recompute


def recomputed(
    block: nn.Module,
    x: Tensor,
    carry: Tensor | None,
    recompute: Recompute,
    state: dict[str, Tensor] | None = None,
    position: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None, Tensor | None]:
    """Apply a block. In training, `recompute` changes the memory use, but not the results.

    An exception is autocast to bfloat16 with documents as rows of their own: with "cheap", the gradients of the weights
    are summed over these rows in float32 in place of bfloat16.

    Args:
        block: The block.
        x: Input (B, T, C).
        carry: Tensor from an earlier block, see `Block.forward`.
        recompute: "none": store all results. "cheap": store the outputs of linear maps, convolutions and fused
            attention. "all": store only x. Compiled code ignores this argument: the compiler chooses the stored
            results.
        state: State of the block, see `Block.forward`.
        position: Number of earlier tokens of each row (B,), or None.
        lengths: Number of valid tokens of each row (B,), or None.
        resets: Whether a token is the first of a text (B, T), or None, see `Block.forward`.

    Returns:
        Output (B, T, C), the next state, and the tensor `carry` for the next block.

    Source:
        arXiv 1604.06174.
    """
    apply = block if resets is None else partial(block, resets=resets)
    if recompute == "none" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        result = apply(x, state, carry, position, lengths)
    elif recompute == "all":
        result = checkpoint(apply, x, state, carry, position, lengths, use_reentrant=False)
    else:
        # If an earlier call of this block has filled the cache of autocast, this call casts fewer weights than the
        # recomputation, which begins with an empty cache.
        torch.clear_autocast_cache()
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        result = checkpoint(apply, x, state, carry, position, lengths, use_reentrant=False, context_fn=contexts)
    x, state, carry = result
    return x, state, carry


_KEPT = ("aten::mm", "aten::addmm", "aten::_scaled_dot_product", "timemix::causal_conv", "timemix::spectral_conv")


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name().startswith(_KEPT) else CheckpointPolicy.PREFER_RECOMPUTE
