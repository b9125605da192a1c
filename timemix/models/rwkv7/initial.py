"""Initial values of RWKV-7, as in the original training code (RWKV-LM, folder RWKV-v7/train_temp).

Every block starts as the identity: the output weights of both sublayers are zero. In the formulas of the vectors, n is
the index of a channel, and layer 0 ... L - 1 is the index of the block:

    fall = 1 - layer / L        rise = layer / (L - 1)        q = n / (C - 1)        line = q - 1/2
    zigzag = z |z|, where z rises from -1 to 1 within each head
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from timemix.models.layers.block import Model
from timemix.models.layers.initial import set_weights
from timemix.models.rwkv7.config import Rwkv7Config
from timemix.runtime.distributed import set_whole

# Exponents of n / C in the mixtures of the time-mix, as multiples of `fall`
_MIX = {"receptance": 0.2, "gate": 0.2, "decay": 0.9, "rate": 0.9, "key": 0.7, "value": 0.7}
_ZERO = (".mixer.output", ".ffn.value")


@torch.no_grad()
def set_initial_values(model: Model) -> None:
    """Fill every weight of a model in place, with PyTorch's global random generator."""
    set_weights(model, _fill)
    for layer, block in enumerate(model.blocks):
        _set_mixtures(block, model.config, layer)
        _set_vectors(block.mixer, model.config, layer)
        for name in ("decay", "rate", "residual", "gate"):
            if (low_rank := getattr(block.mixer, name)) is not None:
                low_rank.down_weight.zero_()
                _orthogonal(low_rank.up_weight, 0.1)


def _fill(name: str, module: nn.Linear | nn.Embedding) -> None:
    """Fill the weight of a linear map or an embedding."""
    if isinstance(module, nn.Embedding):
        set_whole(module.weight, torch.empty(module.weight.shape).uniform_(-1e-4, 1e-4))
    elif name.endswith(_ZERO):
        module.weight.zero_()
    elif name == "head":
        _orthogonal(module.weight, 0.5)
    else:
        nn.init.orthogonal_(weight := torch.empty(module.weight.shape), gain=0.1 if name.endswith("mixer.key") else 1)
        set_whole(module.weight, weight)


def _orthogonal(own: Tensor, gain: float) -> None:
    """Fill a matrix with an orthogonal matrix times `gain`, and times sqrt(rows / columns) if rows > columns."""
    rows, columns = own.shape
    weight = torch.empty(rows, columns)
    set_whole(own, nn.init.orthogonal_(weight, gain=gain * math.sqrt(max(1, rows / columns))))


def _set_mixtures(block: Any, config: Rwkv7Config, layer: int) -> None:
    """Set the weight of the previous token in each mixture: 1 - (n / C)^exponent."""
    fall = 1 - layer / config.layers
    share = torch.arange(config.channels) / config.channels
    for name, mix in block.mixer.mix.items():
        set_whole(mix, 1 - share ** (_MIX[name] * fall))
    if block.ffn.mix is not None:
        set_whole(block.ffn.mix, 1 - share ** (fall**4))


def _set_vectors(mixer: Any, config: Rwkv7Config, layer: int) -> None:
    """Set the vectors of a time-mix."""
    C, N = config.channels, config.head_size
    rise = layer / max(1, config.layers - 1)
    q = torch.arange(C) / max(1, C - 1)
    line = q - 0.5
    z = (torch.arange(C) % N - (N - 1) / 2) / max(0.5, (N - 1) / 2)
    zigzag = z * z.abs()
    set_whole(mixer.decay.bias, -5.5 + 6 * q ** (1 + rise**0.3) + 2.5 * zigzag)
    if mixer.rate is not None:
        set_whole(mixer.rate.bias, -0.19 + 0.3 * zigzag + 0.4 * line)
        set_whole(mixer.removal, 0.71 - 0.1 * line)
        mixer.replacement.fill_(1.02)
    if mixer.residual is not None:
        set_whole(mixer.residual.bias, 0.73 - 0.4 * line)
    if mixer.bonus is not None:
        mixer.bonus.fill_(-0.04)
    if mixer.norm_weight is not None:
        mixer.norm_weight.fill_(((1 + layer) / config.layers) ** 0.7)
        mixer.norm_bias.zero_()
