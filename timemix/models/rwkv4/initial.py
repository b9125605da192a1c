"""Initial values of RWKV-4, as in the original training code (RWKV-LM, folder RWKV-v4neo).

Every block starts as the identity: the output weights of both sublayers are zero. In the formulas of the vectors, n is
the index of a channel, and layer 0 ... L - 1 is the index of the block:

    fall = 1 - layer / L        rise = layer / (L - 1)
"""

import math

import torch
from torch import nn

from timemix.models.layers.block import Model
from timemix.models.layers.initial import set_weights
from timemix.runtime.distributed import set_whole

EMBEDDING = 6e-4
"""Largest absolute value of the embedding. The original code takes the first learning rate, about 6e-4."""

_ZERO = (".mixer.key", ".mixer.receptance", ".mixer.output", ".ffn.value", ".ffn.receptance")


@torch.no_grad()
def set_initial_values(model: Model) -> None:
    """Fill every weight of a model in place, with PyTorch's global random generator."""
    set_weights(model, _fill)
    C, layers = model.config.channels, model.config.layers
    n = torch.arange(C)
    share, q = n / C, n / max(1, C - 1)
    for layer, block in enumerate(model.blocks):
        fall, rise = 1 - layer / layers, layer / max(1, layers - 1)
        current = {"key": share**fall, "value": share**fall + 0.3 * rise, "receptance": share ** (0.5 * fall)}
        for name, mix in block.mixer.mix.items():
            set_whole(mix, current[name])
        for mix in block.ffn.mix.values():
            set_whole(mix, share**fall)
        set_whole(block.mixer.decay, -5 + 8 * q ** (0.7 + 1.3 * rise))
        if block.mixer.bonus is not None:
            set_whole(block.mixer.bonus, math.log(0.3) + 0.5 * ((n + 1) % 3 - 1))


def _fill(name: str, module: nn.Linear | nn.Embedding) -> None:
    """Fill the weight of a linear map or an embedding."""
    weight = torch.empty(module.weight.shape)
    if isinstance(module, nn.Embedding):
        weight.uniform_(-EMBEDDING, EMBEDDING)
    elif name.endswith(_ZERO):
        weight.zero_()
    else:
        rows, columns = weight.shape
        gain = math.sqrt(max(1, rows / columns)) * (0.5 if name == "head" else 1)
        nn.init.orthogonal_(weight, gain=gain)
    set_whole(module.weight, weight)
