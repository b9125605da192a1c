"""Conversion of weights from and to the original code of RWKV-4 (RWKV-LM), whose checkpoints are the published models.

The original code stores the mixtures as (1, 1, C), timemix as (C,). All other tensors have the same layout. A
conversion only renames and reshapes tensors, so it applies to gradients too.
"""

import re
from typing import Any

from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.published import PublishedNames
from timemix.models.rwkv4.config import Rwkv4Config

_OUTSIDE = {
    "embedding.weight": "emb.weight",
    "input_norm.weight": "blocks.0.ln0.weight",
    "input_norm.bias": "blocks.0.ln0.bias",
    "norm.weight": "ln_out.weight",
    "norm.bias": "ln_out.bias",
    "head.weight": "head.weight",
}
_MIXTURES = {
    "mixer.mix.key": "att.time_mix_k",
    "mixer.mix.value": "att.time_mix_v",
    "mixer.mix.receptance": "att.time_mix_r",
    "ffn.mix.key": "ffn.time_mix_k",
    "ffn.mix.receptance": "ffn.time_mix_r",
}
_IN_BLOCK = {
    **_MIXTURES,
    **{
        f"{ours}.{each}": f"{theirs}.{each}"
        for ours, theirs in (("mixer_norm", "ln1"), ("ffn_norm", "ln2"))
        for each in ("weight", "bias")
    },
    **{f"mixer.{name}.weight": f"att.{name}.weight" for name in ("receptance", "key", "value", "output")},
    **{f"ffn.{name}.weight": f"ffn.{name}.weight" for name in ("receptance", "key", "value")},
    "mixer.decay": "att.time_decay",
    "mixer.bonus": "att.time_first",
}
_NAMES = PublishedNames("RWKV-4", "blocks", _OUTSIDE, _IN_BLOCK)
published_name = _NAMES.published
our_name = _NAMES.ours
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")


def from_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from the original code to `rwkv4`."""
    ours = {our_name(name): weight for name, weight in weights.items()}
    return {name: weight.flatten() if _is_mixture(name) else weight for name, weight in ours.items()}


def to_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from `rwkv4` to the original code."""
    return {
        published_name(name): weight.view(1, 1, -1) if _is_mixture(name) else weight for name, weight in weights.items()
    }


def our_config(weights: dict[str, Tensor], ctx_len: int, **fields: Any) -> Rwkv4Config:
    """Read the settings of a model from the shapes of its weights in the original code.

    Args:
        weights: Weights by their names in the original code.
        ctx_len: Context length in tokens, which no shape gives.
        **fields: Other settings that no shape gives.

    Returns:
        The settings. The caller checks the names and shapes of the other weights.

    Raises:
        InvalidValue: A weight that gives a size is missing or no matrix, or a size is not supported.
    """
    numbers = [int(found[1]) for name in weights if (found := _BLOCK.match(name))]
    key = f"blocks.{max(numbers, default=0)}.ffn.key.weight"
    for name in ("emb.weight", key):
        if name not in weights or weights[name].ndim != 2 or not weights[name].numel():
            raise InvalidValue(f"the weights have no matrix {name!r}; pass all weights of a model of RWKV-4")
    vocab_size, channels = weights["emb.weight"].shape
    return Rwkv4Config(
        vocab_size=vocab_size,
        ctx_len=ctx_len,
        layers=1 + max(numbers, default=0),
        channels=channels,
        ffn_ratio=len(weights[key]) / channels,
        **fields,
    )


def check_exportable(config: Rwkv4Config) -> None:
    """Accept all settings: the original code has no other constants."""


def unused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the original code that no model uses: none."""
    return {}


def _is_mixture(name: str) -> bool:
    """Return whether the original code stores a parameter of `rwkv4` as (1, 1, C)."""
    return name.startswith("blocks.") and name.split(".", 2)[2] in _MIXTURES
