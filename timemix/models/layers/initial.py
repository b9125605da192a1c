"""Initial values that several architectures share: orthogonal weights, and blocks that start as the identity.

`original` (RWKV-LM 0.01) of the RWKV: orthogonal weights (gain sqrt(out/in) where out > in); embedding
0.4 sqrt(max(V, C)) times and head 0.4 times orthogonal. Of attention: linear and embedding weights normal(0, 0.01).
`zero` (late 2021): the orthogonal values for every architecture, both outputs of a block zero, so that it starts as the
identity, and f_h(lag) decaying faster in lower heads. Biases are zero, alpha, beta, gamma one, throughout.
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
    """Call `fill` with the name and module of each linear map and embedding, in order; biases become zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            fill(name, module)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def orthogonal(name: str, module: nn.Linear | nn.Embedding) -> None:
    """Fill a weight with an orthogonal matrix, with the gain of RWKV-LM 0.01 (above)."""
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
    """Make both outputs of a block zero, or divide them by sqrt(1 + layer); receptances become zero."""
    for sublayer in (block.mixer, block.ffn):
        sublayer.output.weight.mul_(0 if zero else (1 + layer) ** -0.5)
        if hasattr(sublayer, "receptance"):
            sublayer.receptance.weight.zero_()


def log_decay(heads: int, ctx_len: int) -> Tensor:
    """Logarithm of f (H, ctx_len) in `zero`: -lag * ctx_len^(-(h+1)/(H-1)); the last head is constant 0."""
    rates = [ctx_len ** (-(h + 1) / (heads - 1)) for h in range(heads - 1)] + [0.0]
    return -torch.tensor(rates)[:, None] * torch.arange(ctx_len)


def table_like(f: Tensor, by_lag: Tensor) -> Tensor:
    """A table by lag in the shape of f: itself, or written out for each pair (t, u)."""
    return by_lag if f.ndim == 2 else toeplitz(by_lag, by_lag.shape[1], by_lag.shape[1])
