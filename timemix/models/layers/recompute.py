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
) -> tuple[Tensor, Tensor | None]:
    """Apply a block in training. `recompute` changes the memory use, but not the results.

    Args:
        block: The block.
        x: Input (B, T, C).
        carry: Tensor from an earlier block, see `Block.forward`.
        recompute: "none": store all results. "cheap": store the outputs of linear maps, convolutions and fused
            attention. "all": store only x. Compiled code ignores this argument: the compiler chooses the stored
            results.
        state: Learned state before the first token; None: no such state.
        position: Zeros (B,) with a learned state, else None.

    Returns:
        Output (B, T, C), and the tensor `carry` for the next block.

    Source:
        arXiv 1604.06174.
    """
    if recompute == "none" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        x, _, carry = block(x, state, carry, position)
        return x, carry
    if recompute == "all":
        x, _, carry = checkpoint(block, x, state, carry, position, use_reentrant=False)
        return x, carry
    contexts = partial(create_selective_checkpoint_contexts, _keep_products)
    x, _, carry = checkpoint(block, x, state, carry, position, use_reentrant=False, context_fn=contexts)
    return x, carry


_KEPT = ("aten::mm", "aten::addmm", "aten::_scaled_dot_product", "timemix::causal_conv", "timemix::spectral_conv")


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name().startswith(_KEPT) else CheckpointPolicy.PREFER_RECOMPUTE
