"""Conversion of weights and settings of RWKV-6 to GGUF, the file format of llama.cpp.

original                                         GGUF
vectors time_maa_w, _k, _v, _r, _g (1, 1, C)     one tensor `time_mix_lerp_fused` (5, 1, 1, C)
time_maa_w1    (C, 5 R)                          (5 R, C)
time_maa_w2    (5, R, C)                         (5, C, R)
time_decay_w1, time_decay_w2                     transposed
"""

from torch import Tensor

from timemix.models.gguf import fused_mixtures, gguf_names, shared_settings
from timemix.models.rwkv6.config import Rwkv6Config

_MIXED = tuple(f"time_maa_{letter}" for letter in "wkvrg")
_MATRICES = {
    "time_maa_w1": "time_mix_w1",
    "time_maa_w2": "time_mix_w2",
    "time_decay_w1": "time_mix_decay_w1",
    "time_decay_w2": "time_mix_decay_w2",
}
_OTHERS = {
    "att.time_maa_x": "time_mix_lerp_x.weight",
    "att.time_decay": "time_mix_decay.weight",
    "att.time_faaaa": "time_mix_first.weight",
    "att.gate.weight": "time_mix_gate.weight",
    "ffn.time_maa_k": "channel_mix_lerp_k.weight",
    "ffn.time_maa_r": "channel_mix_lerp_r.weight",
    "ffn.receptance.weight": "channel_mix_receptance.weight",
}
_NAMES = gguf_names("RWKV-6", {f"att.{ours}": f"{theirs}.weight" for ours, theirs in _MATRICES.items()} | _OTHERS)


def to_gguf(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from the original names and shapes to GGUF.

    Args:
        weights: Weights by their original names.

    Returns:
        Weights by their names in GGUF. A weight may be a view.
    """
    found = fused_mixtures(weights, _MIXED)
    for name, x in weights.items():
        last = name.rpartition(".")[2]
        if last in _MATRICES:
            found[_NAMES.published(name)] = x.mT
        elif last not in _MIXED or ".ffn." in name:
            found[_NAMES.published(name)] = x.flatten() if x.ndim == 3 else x
    return found


def settings(config: Rwkv6Config) -> dict[str, int | float]:
    """Return the settings of a model in GGUF, without the name of the architecture before each key.

    Args:
        config: Settings of the model.

    Raises:
        InvalidValue: llama.cpp does not compute this model.
    """
    return shared_settings(config) | {
        "rescale_every_n_layers": 0,
        "time_mix_extra_dim": config.mixture_rank,
        "time_decay_extra_dim": config.decay_rank,
    }
