"""Initial values of RWKV-5.2 and RWKV-6, as in the original training code (RWKV-LM, folder RWKV-v5).

Every block starts as the identity: the output weights of both sublayers are zero. In the formulas of the vectors, n is
the index of a channel, and layer 0 ... L - 1 is the index of the block:

    fall = 1 - layer / L        rise = layer / (L - 1)        share = n / C        q = n / (C - 1)
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from timemix.models.layers.block import Model
from timemix.models.layers.initial import set_weights
from timemix.models.rwkv6.config import Rwkv5Config, Rwkv6Config
from timemix.runtime.distributed import set_whole

MIXED = ("key", "value", "receptance", "gate", "decay")
_ZERO = (".mixer.output", ".ffn.value", ".ffn.receptance")
_SMALL = (".mixer.key", ".mixer.gate")


@torch.no_grad()
def set_initial_values(model: Model) -> None:
    """Fill every weight of a model in place, with PyTorch's global random generator."""
    set_weights(model, _fill)
    for layer, block in enumerate(model.blocks):
        _set_vectors(block, model.config, layer)


def _fill(name: str, module: nn.Linear | nn.Embedding) -> None:
    """Fill the weight of a linear map or an embedding."""
    weight = torch.empty(module.weight.shape)
    if isinstance(module, nn.Embedding):
        weight.uniform_(-1e-4, 1e-4)
    elif name.endswith(_ZERO):
        weight.zero_()
    elif name == "head":
        rows, columns = weight.shape
        nn.init.orthogonal_(weight, gain=0.5 * math.sqrt(max(1, rows / columns)))
    else:
        nn.init.orthogonal_(weight, gain=0.1 if name.endswith(_SMALL) else 1)
    set_whole(module.weight, weight)


def _set_vectors(block: Any, config: Rwkv5Config, layer: int) -> None:
    """Set the parameters of a block that are no linear maps."""
    C, mixer = config.channels, block.mixer
    fall, rise = 1 - layer / config.layers, layer / max(1, config.layers - 1)
    n = torch.arange(C)
    share, q = n / C, n / max(1, C - 1)
    # Shares of the current token in each mixture
    current = dict.fromkeys(MIXED, share**fall)
    current["value"] = current["value"] + 0.3 * rise
    current |= dict.fromkeys(("receptance", "gate"), share ** (0.5 * fall))
    decay = -6 + 5 * q ** (0.7 + 1.3 * rise)
    if isinstance(config, Rwkv6Config):
        current = {name: 1 - x for name, x in current.items()}
        _set_maps(mixer, 1 - share**fall, decay)
        ffn = 1 - share ** (fall**3)
    else:
        set_whole(mixer.decay, mixer.heads(decay))
        ffn = share**fall
    for name, mix in mixer.mix.items():
        set_whole(mix, current[name])
    for mix in block.ffn.mix.values():
        set_whole(mix, ffn)
    if mixer.bonus is not None:
        set_whole(mixer.bonus, mixer.heads(rise * (1 - q) + 0.1 * ((n + 1) % 3 - 1)))
    if mixer.norm_weight is not None:
        mixer.norm_weight.fill_(((1 + layer) / config.layers) ** 0.7)
        mixer.norm_bias.zero_()


def _set_maps(mixer: Any, first_mix: Tensor, decay: Tensor) -> None:
    """Set the low-rank maps of RWKV-6, which start as zero."""
    if mixer.first_mix is not None:
        set_whole(mixer.first_mix, first_mix)
    set_whole(mixer.decay.bias, decay)
    for low_rank in (*mixer.mix_maps.values(), mixer.decay):
        low_rank.down_weight.zero_()
        set_whole(low_rank.up_weight, torch.empty(low_rank.up_weight.shape).uniform_(-0.01, 0.01))
