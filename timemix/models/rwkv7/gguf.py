"""Conversion of weights and settings of RWKV-7 to GGUF, the file format of llama.cpp.

original                                      GGUF
vectors x_r, x_w, x_k, x_v, x_a, x_g          one tensor `time_mix_lerp_fused` (6, 1, 1, C)
matrices w1, w2 ... of the low-rank maps      transposed
r_k                    (H, N)                 (C,)
blocks.0.att.v0, v1, v2                       a0, a1, a2 of layer 0, which llama.cpp reads and never uses
"""

from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.gguf import fused_mixtures, gguf_names, shared_settings
from timemix.models.rwkv7.config import Rwkv7Config

_HEAD_SIZE = 64
_MIXED = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
_MATRICES = tuple(f"{letter}{n}" for letter in "wavg" for n in (1, 2))
_VECTORS = ("w0", "a0", "v0", "k_k", "k_a", "r_k")
_NAMES = gguf_names(
    "RWKV-7",
    {f"att.{name}": f"time_mix_{name}.weight" for name in (*_MATRICES, *_VECTORS)}
    | {"ffn.x_k": "channel_mix_lerp_k.weight"},
)


def to_gguf(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from the original names and shapes to GGUF.

    Args:
        weights: Weights by their original names, without the unused tensors of layer 0.

    Returns:
        Weights by their names in GGUF. A weight may be a view.
    """
    unused = {f"blocks.0.att.v{n}": weights[f"blocks.0.att.a{n}"] for n in range(3)}
    found = fused_mixtures(weights, _MIXED)
    for name, x in (weights | unused).items():
        last = name.rpartition(".")[2]
        if last not in _MIXED or name.endswith("ffn.x_k"):
            found[_NAMES.published(name)] = x.t() if last in _MATRICES else _flat(last, x)
    return found


def _flat(last: str, x: Tensor) -> Tensor:
    """Return a vector of the original code, which has three dimensions there, as (C,), and another weight unchanged."""
    return x.flatten() if x.ndim == 3 or last == "r_k" else x


def settings(config: Rwkv7Config) -> dict[str, int | float]:
    """Return the settings of a model in GGUF, without the name of the architecture before each key.

    Args:
        config: Settings of the model.

    Raises:
        InvalidValue: llama.cpp does not compute this model.
    """
    if config.head_size % _HEAD_SIZE:
        raise InvalidValue(
            f"the model has heads of {config.head_size} channels, but llama.cpp computes {config.arch} only with"
            f" multiples of {_HEAD_SIZE}; train a model with fewer heads (model.heads)"
        )
    ranks = {"decay": "decay", "rate": "iclr", "residual": "value_residual_mix", "gate": "gate"}
    return shared_settings(config) | {
        f"attention.{theirs}_lora_rank": config.ranks[ours] for ours, theirs in ranks.items()
    }
