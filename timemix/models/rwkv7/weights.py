"""Conversion of weights from and to the original code of RWKV-7 (RWKV-LM), whose checkpoints are the published models.

    original                                   timemix
    vectors of the blocks  (1, 1, C)           (C,)
    blocks.0.att.v0, v1, v2                    left out, because layer 0 never uses them

All other tensors have the same layout in the original code and in timemix. A conversion only renames and reshapes
tensors, so it applies to gradients too.
"""

import re
from typing import Any

from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.published import PublishedNames
from timemix.models.rwkv7.config import Rwkv7Config

_OUTSIDE = {
    "embedding.weight": "emb.weight",
    "input_norm.weight": "blocks.0.ln0.weight",
    "input_norm.bias": "blocks.0.ln0.bias",
    "norm.weight": "ln_out.weight",
    "norm.bias": "ln_out.bias",
    "head.weight": "head.weight",
}
# The low-rank maps, and the letter of their matrices in the original code
_LOW_RANK = {"decay": "w", "rate": "a", "residual": "v", "gate": "g"}
_VECTORS = {
    "mixer.mix.receptance": "att.x_r",
    "mixer.mix.decay": "att.x_w",
    "mixer.mix.key": "att.x_k",
    "mixer.mix.value": "att.x_v",
    "mixer.mix.rate": "att.x_a",
    "mixer.mix.gate": "att.x_g",
    "mixer.decay.bias": "att.w0",
    "mixer.rate.bias": "att.a0",
    "mixer.residual.bias": "att.v0",
    "mixer.removal": "att.k_k",
    "mixer.replacement": "att.k_a",
    "ffn.mix": "ffn.x_k",
}
_IN_BLOCK = {
    **_VECTORS,
    **{
        f"{ours}.{each}": f"{theirs}.{each}"
        for ours, theirs in (("mixer_norm", "ln1"), ("ffn_norm", "ln2"))
        for each in ("weight", "bias")
    },
    **{f"mixer.{name}.weight": f"att.{name}.weight" for name in ("receptance", "key", "value", "output")},
    **{f"mixer.{name}.down_weight": f"att.{letter}1" for name, letter in _LOW_RANK.items()},
    **{f"mixer.{name}.up_weight": f"att.{letter}2" for name, letter in _LOW_RANK.items()},
    "mixer.bonus": "att.r_k",
    "mixer.norm_weight": "att.ln_x.weight",
    "mixer.norm_bias": "att.ln_x.bias",
    "ffn.key.weight": "ffn.key.weight",
    "ffn.value.weight": "ffn.value.weight",
}
_NAMES = PublishedNames("RWKV-7", "blocks", _OUTSIDE, _IN_BLOCK)
published_name = _NAMES.published
_UNUSED = re.compile(r"blocks\.0\.att\.v[012]")
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")


def our_name(name: str) -> str:
    """Convert the name of a parameter from the original code to `rwkv7`.

    Args:
        name: Name in the original code.

    Returns:
        Name in `rwkv7`.

    Raises:
        InvalidValue: The name is unknown.
    """
    if _UNUSED.fullmatch(name):
        raise InvalidValue(f"{name!r} is not a parameter of RWKV-7; remove it")
    return _NAMES.ours(name)


def from_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from the original code to `rwkv7`, without the tensors of layer 0 that have no use."""
    ours = {our_name(name): weight for name, weight in weights.items() if not _UNUSED.fullmatch(name)}
    return {name: weight.flatten() if _is_vector(name) else weight for name, weight in ours.items()}


def to_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from `rwkv7` to the original code."""
    return {
        published_name(name): weight.view(1, 1, -1) if _is_vector(name) else weight for name, weight in weights.items()
    }


def state_from_published(state: Tensor) -> Tensor:
    """Convert a tuned state (H, values N, keys N) of RWKV-PEFT to the state of a layer of `rwkv7`: both are equal."""
    return state


def our_config(weights: dict[str, Tensor], ctx_len: int, **fields: Any) -> Rwkv7Config:
    """Read the settings of a model from the shapes of its weights in the original code.

    Published models choose the ranks of the low-rank maps by several rules, so only the shapes give the ranks.

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
    last = f"blocks.{max(numbers, default=0)}"
    maps = {name: f"{last}.att.{letter}1" for name, letter in _LOW_RANK.items()}
    if last == "blocks.0":
        del maps["residual"]
    for name in ("emb.weight", f"{last}.att.r_k", f"{last}.ffn.key.weight", *maps.values()):
        if name not in weights or weights[name].ndim != 2 or not weights[name].numel():
            raise InvalidValue(f"the weights have no matrix {name!r}; pass all weights of a model of RWKV-7")
    vocab_size, channels = weights["emb.weight"].shape
    ranks: dict[str, Any] = {f"{name}_rank": weights[theirs].shape[1] for name, theirs in maps.items()}
    return Rwkv7Config(
        vocab_size=vocab_size,
        ctx_len=ctx_len,
        layers=1 + max(numbers, default=0),
        channels=channels,
        heads=len(weights[f"{last}.att.r_k"]),
        ffn_ratio=len(weights[f"{last}.ffn.key.weight"]) / channels,
        **ranks,
        **fields,
    )


def check_exportable(config: Rwkv7Config) -> None:
    """Raise InvalidValue if the original code, which has fixed constants, does not compute the same model."""
    if config.group_norm_eps != Rwkv7Config.group_norm_eps:
        raise InvalidValue(
            f"group_norm_eps is {config.group_norm_eps:g}, but the original code has {Rwkv7Config.group_norm_eps:g};"
            " use the Hugging Face form (hf)"
        )


def unused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the original code that no model uses: v0, v1 and v2 of layer 0."""
    return {name: weight for name, weight in weights.items() if _UNUSED.fullmatch(name)}


def _is_vector(name: str) -> bool:
    """Return whether the original code stores a parameter of `rwkv7` as (1, 1, C)."""
    return name.startswith("blocks.") and name.split(".", 2)[2] in _VECTORS
