"""Initial values of rwkv1 and rwkv1_exp: the values of `layers.initial`, and values of the time-mix.

The weights of the time-mix key are zero. The curve f is one with "original", and decays as in `log_decay` with "zero".
In rwkv1_exp, each f_h starts as one exponential, and all other exponentials have coefficient 0.
"""

import torch
from torch import Tensor

from timemix.models.layers.block import Model
from timemix.models.layers.initial import log_decay, orthogonal, scale_outputs, set_weights, table_like
from timemix.models.rwkv1.exp_time_mix import ExpTimeMix
from timemix.models.rwkv1.time_mix import TimeMix
from timemix.ops.rwkv1.curves import LEAST_RATE
from timemix.runtime.distributed import set_whole


@torch.no_grad()
def set_initial_values(model: Model) -> None:
    """Fill every weight of a model in place, with PyTorch's global random generator."""
    config = model.config
    zero = config.initial == "zero"
    decay = log_decay(config.heads, config.ctx_len)
    set_weights(model, orthogonal)
    for layer, block in enumerate(model.blocks):
        scale_outputs(block, layer, zero)
        block.mixer.key.weight.zero_()
        if isinstance(block.mixer, ExpTimeMix):
            _set_exponentials(block.mixer, decay if zero else None)
        else:
            _set_tables(block.mixer, decay, zero)


def _set_tables(mixer: TimeMix, decay: Tensor, zero: bool) -> None:
    """Set the tables of rwkv1. The argument `decay` is log f (H, ctx_len) of the initial values "zero"."""
    if mixer.config.denominator == "weighted":
        # W is exp(f + alpha + beta), so the tables are logarithms, and W is the same as with the plain denominator.
        if zero:
            set_whole(mixer.f, table_like(mixer.f, decay))
        else:
            mixer.f.zero_()
        if mixer.alpha is not None:
            mixer.alpha.zero_()
    elif zero:
        set_whole(mixer.f, table_like(mixer.f, decay).exp())


def _set_exponentials(mixer: ExpTimeMix, decay: Tensor | None) -> None:
    """Set the first slot of each head to its initial curve, and the coefficients of the other slots to 0.

    The rates of the other slots range from 1 to 1 / ctx_len, so that training finds a useful rate.

    Args:
        mixer: The time-mix.
        decay: log f (H, ctx_len) of the initial values "zero"; None: f is the constant 1.
    """
    H, K = mixer.rate.shape
    ctx_len = mixer.config.ctx_len
    rate = torch.tensor([ctx_len ** (-j / max(1, K - 2)) for j in range(-1, K - 1)]).repeat(H, 1)
    rate[:, 0] = LEAST_RATE if decay is None or ctx_len == 1 else -decay[:, 1].clamp(max=-LEAST_RATE)
    set_whole(mixer.rate, rate)
    coefficients = torch.zeros(H, K)
    coefficients[:, 0] = 1
    set_whole(mixer.coefficients, coefficients)
