"""Conversion of weights from and to the original code of RWKV-5.2 and RWKV-6 (RWKV-LM), as in the published models.

    original                                   timemix
    vectors of the blocks    (1, 1, C)         (C,)
    time_maa_w1              (C, 5 R)          five matrices (C, R), one for each mixture
    time_maa_w2              (5, R, C)         five matrices (R, C)

All other tensors have the same layout. A conversion only renames, reshapes, splits and stacks tensors, so it applies to
gradients too.
"""

import re
from typing import Any

import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.published import PublishedNames
from timemix.models.rwkv6.config import Rwkv5Config, Rwkv6Config
from timemix.models.rwkv6.model import MIXED_6

_OUTSIDE = {
    "embedding.weight": "emb.weight",
    "input_norm.weight": "blocks.0.ln0.weight",
    "input_norm.bias": "blocks.0.ln0.bias",
    "norm.weight": "ln_out.weight",
    "norm.bias": "ln_out.bias",
    "head.weight": "head.weight",
}
_SHARED = {
    **{
        f"{ours}.{each}": f"{theirs}.{each}"
        for ours, theirs in (("mixer_norm", "ln1"), ("ffn_norm", "ln2"))
        for each in ("weight", "bias")
    },
    **{f"mixer.{name}.weight": f"att.{name}.weight" for name in ("receptance", "key", "value", "gate", "output")},
    **{f"ffn.{name}.weight": f"ffn.{name}.weight" for name in ("receptance", "key", "value")},
    "mixer.bonus": "att.time_faaaa",
    "mixer.norm_weight": "att.ln_x.weight",
    "mixer.norm_bias": "att.ln_x.bias",
}
_VECTORS_5 = {
    **{f"mixer.mix.{name}": f"att.time_mix_{name[0]}" for name in ("key", "value", "receptance", "gate")},
    **{f"ffn.mix.{name}": f"ffn.time_mix_{name[0]}" for name in ("key", "receptance")},
}
_VECTORS_6 = {
    **{f"mixer.mix.{name}": f"att.time_maa_{name[0]}" for name in ("key", "value", "receptance", "gate")},
    **{f"ffn.mix.{name}": f"ffn.time_maa_{name[0]}" for name in ("key", "receptance")},
    "mixer.mix.decay": "att.time_maa_w",
    "mixer.first_mix": "att.time_maa_x",
    "mixer.decay.bias": "att.time_decay",
}
_MAPS_6 = {
    "mixer.decay.down_weight": "att.time_decay_w1",
    "mixer.decay.up_weight": "att.time_decay_w2",
}
_NAMES_5 = PublishedNames("RWKV-5.2", "blocks", _OUTSIDE, _SHARED | _VECTORS_5 | {"mixer.decay": "att.time_decay"})
_NAMES_6 = PublishedNames("RWKV-6", "blocks", _OUTSIDE, _SHARED | _VECTORS_6 | _MAPS_6)
# The stacked low-rank maps to the mixtures: published name, name in timemix around the name of the mixture, dimension
_STACKED = (("time_maa_w1", "down_weight", 1), ("time_maa_w2", "up_weight", 0))
_MAP = re.compile(r"(blocks\.\d+)\.mixer\.mix_maps\.\w+\.(down|up)_weight")
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")


def is_version_6(names: Any) -> bool:
    """Return whether published names, or names in timemix, belong to RWKV-6; otherwise they belong to RWKV-5.2."""
    return any(".time_maa_" in name or ".first_mix" in name for name in names)


def from_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from the original code to `rwkv5` or `rwkv6`."""
    names, vectors = (_NAMES_6, _VECTORS_6) if is_version_6(weights) else (_NAMES_5, _VECTORS_5)
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if split := _split(name, weight):
            found |= split
        else:
            ours = names.ours(name)
            found[ours] = weight.flatten() if _kind(ours) in vectors else weight
    return found


def to_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from `rwkv5` or `rwkv6` to the original code."""
    names, vectors = (_NAMES_6, _VECTORS_6) if is_version_6(weights) else (_NAMES_5, _VECTORS_5)
    maps = {name: weight for name, weight in weights.items() if _MAP.fullmatch(name)}
    found = {
        names.published(name): weight.view(1, 1, -1) if _kind(name) in vectors else weight
        for name, weight in weights.items()
        if name not in maps
    }
    return found | _stacked(maps)


def _split(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the matrix of each mixture in a stacked weight of the original code; for other weights, nothing."""
    layer, _, kind = name.partition(".att.")
    for theirs, ours, dim in _STACKED:
        if kind == theirs:
            parts = weight.chunk(len(MIXED_6), 1) if dim else weight.unbind()
            return {f"{layer}.mixer.mix_maps.{each}.{ours}": x for each, x in zip(MIXED_6, parts, strict=False)}
    return {}


def _stacked(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the stacked weights of the original code for the matrices of all mixtures."""
    found = {}
    for layer in dict.fromkeys(match[1] for name in maps if (match := _MAP.fullmatch(name))):
        for theirs, ours, dim in _STACKED:
            parts = [maps[f"{layer}.mixer.mix_maps.{name}.{ours}"] for name in MIXED_6]
            found[f"{layer}.att.{theirs}"] = torch.cat(parts, 1) if dim else torch.stack(parts)
    return found


def our_config(weights: dict[str, Tensor], ctx_len: int, **fields: Any) -> Rwkv5Config:
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
    last, is_6 = f"blocks.{max(numbers, default=0)}", is_version_6(weights)
    maps = {"decay_rank": f"{last}.att.time_decay_w1"} if is_6 else {}
    key, bonus = f"{last}.ffn.key.weight", f"{last}.att.time_faaaa"
    for name in ("emb.weight", bonus, key, *maps.values()):
        if name not in weights or weights[name].ndim != 2 or not weights[name].numel():
            version = "RWKV-6" if is_6 else "RWKV-5.2"
            raise InvalidValue(f"the weights have no matrix {name!r}; pass all weights of a model of {version}")
    vocab_size, channels = weights["emb.weight"].shape
    ranks: dict[str, Any] = {name: weights[theirs].shape[1] for name, theirs in maps.items()}
    if is_6:
        up = weights.get(f"{last}.att.time_maa_w2")
        if up is None or up.ndim != 3:
            raise InvalidValue(f"the weights have no tensor '{last}.att.time_maa_w2' of 3 dimensions; restore the file")
        ranks["mixture_rank"] = up.shape[1]
    return (Rwkv6Config if is_6 else Rwkv5Config)(
        vocab_size=vocab_size,
        ctx_len=ctx_len,
        layers=1 + max(numbers, default=0),
        channels=channels,
        heads=len(weights[bonus]),
        ffn_ratio=len(weights[key]) / channels,
        **ranks,
        **fields,
    )


def _kind(name: str) -> str:
    """Return the part of a name in timemix after the number of the layer."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else ""
