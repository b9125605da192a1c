"""Initial values that several architectures share: orthogonal weights, and blocks that start as the identity.

- "original" (RWKV-LM 0.01) for RWKV: weights are orthogonal matrices, times sqrt(out / in) if out > in. The head has an
  additional factor of 0.4. The embedding is an orthogonal matrix times 0.4 sqrt(max(V, C)).
- "original" for attention: linear and embedding weights are normal(0, 0.01).
- "zero" (late 2021): weights are orthogonal matrices for every architecture. The output weights of both sublayers of a
  block are zero, so that the block starts as the identity. The curve f_h(lag) decays faster for a smaller index h of
  the head.

With both "original" and "zero", biases are zero, and alpha, beta and gamma are one.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from timemix.models.layers.block import Model
from timemix.ops.common.causal import toeplitz
from timemix.runtime.distributed import set_whole

HEAD_GAIN = 0.4


@torch.no_grad()
def set_weights(model: Model, fill: Callable[[str, nn.Linear | nn.Embedding], object]) -> None:
    """Fill the weights of all linear maps and embeddings of a model, and set their biases to zero.

    Args:
        model: The model.
        fill: Function that fills a weight in place, given the name and the module of a linear map or embedding.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            fill(name, module)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def orthogonal(name: str, module: nn.Linear | nn.Embedding) -> None:
    """Fill a weight with an orthogonal matrix, multiplied by the gain of RWKV-LM 0.01."""
    out, into = module.weight.shape
    weight = torch.empty(out, into)
    if isinstance(module, nn.Embedding):
        gain = HEAD_GAIN * math.sqrt(max(out, into))
    else:
        gain = math.sqrt(max(1, out / into)) * (HEAD_GAIN if name == "head" else 1)
    nn.init.orthogonal_(weight, gain=gain)
    set_whole(module.weight, weight)


def normal(std: float) -> Callable[[str, nn.Linear | nn.Embedding], None]:
    """Return a function for `set_weights` that draws a weight from normal(0, std)."""

    def fill(name: str, module: nn.Linear | nn.Embedding) -> None:
        set_whole(module.weight, nn.init.normal_(torch.empty(module.weight.shape), std=std))

    return fill


@torch.no_grad()
def scale_outputs(block: Any, layer: int, zero: bool) -> None:
    """Scale the output weights of both sublayers of a block, and set the receptances to zero.

    Args:
        block: The block.
        layer: Index of the block, from 0.
        zero: Whether to set the output weights to zero, instead of dividing them by sqrt(1 + layer).
    """
    for sublayer in (block.mixer, block.ffn):
        sublayer.output.weight.mul_(0 if zero else (1 + layer) ** -0.5)
        if hasattr(sublayer, "receptance"):
            sublayer.receptance.weight.zero_()


def log_decay(heads: int, ctx_len: int) -> Tensor:
    """Return log f (H, ctx_len) for "zero": -lag * ctx_len^(-(h+1)/(H-1)) for head h, but 0 for the last head."""
    rates = [ctx_len ** (-(h + 1) / (heads - 1)) for h in range(heads - 1)] + [0.0]
    return -torch.tensor(rates)[:, None] * torch.arange(ctx_len)


def table_like(f: Tensor, by_lag: Tensor) -> Tensor:
    """Convert a table by lag (H, ctx_len) to the shape of f: by lag, or by pair of positions (H, ctx_len, ctx_len)."""
    return by_lag if f.ndim == 2 else toeplitz(by_lag, by_lag.shape[1], by_lag.shape[1])
