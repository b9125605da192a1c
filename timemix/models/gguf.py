"""Names and settings that the models of several versions of RWKV share in GGUF, the file format of llama.cpp."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.published import PublishedNames

_OUTSIDE = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
_IN_BLOCK = {
    **{
        f"{theirs}.{each}": f"{name}.{each}"
        for theirs, name in (("ln1", "attn_norm"), ("ln2", "attn_norm_2"), ("att.ln_x", "time_mix_ln"))
        for each in ("weight", "bias")
    },
    **{f"att.{name}.weight": f"time_mix_{name}.weight" for name in ("receptance", "key", "value", "output")},
    **{f"ffn.{name}.weight": f"channel_mix_{name}.weight" for name in ("key", "value")},
}
_GROUP_NORM_EPS = 64e-5
NO_END = 2**20
"""Context length in tokens of a model whose context has no end: the number that llama.cpp's own converter writes."""


def gguf_names(model: str, in_block: dict[str, str]) -> PublishedNames:
    """Return the names of the tensors of a version in GGUF.

    Args:
        model: Name of the version, for error messages.
        in_block: Name in GGUF of each tensor of a block that only this version has, by its published name. Both names
            follow the number of the layer.
    """
    return PublishedNames(model, "blk", _OUTSIDE, _IN_BLOCK | in_block)


def fused_mixtures(weights: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the vectors of the mixtures of each time-mix as one tensor.

    Args:
        weights: Weights by their published names.
        names: Names of the vectors (1, 1, C) in a time-mix, in the order of llama.cpp.

    Returns:
        A tensor (number of vectors, 1, 1, C) for each block, by its name in GGUF.
    """
    blocks = [name.split(".")[1] for name in weights if name.endswith(".att.ln_x.weight")]
    return {
        f"blk.{n}.time_mix_lerp_fused.weight": torch.stack([weights[f"blocks.{n}.att.{each}"] for each in names])
        for n in blocks
    }


def shared_settings(config: Any) -> dict[str, int | float]:
    """Return the settings that every version has, without the name of the architecture before each key.

    Args:
        config: Settings of the model.

    Raises:
        InvalidValue: The model has another constant in the norm of each head than llama.cpp, where it is fixed.
    """
    if config.group_norm_eps != _GROUP_NORM_EPS:
        raise InvalidValue(
            f"group_norm_eps is {config.group_norm_eps:g}, but llama.cpp has {_GROUP_NORM_EPS:g}; export a model with"
            " this constant"
        )
    return {
        "context_length": NO_END,
        "embedding_length": config.channels,
        "block_count": config.layers,
        "feed_forward_length": config.ffn_hidden,
        "attention.head_count": 0,
        "attention.layer_norm_epsilon": 1e-5,
        "wkv.head_size": config.head_size,
    }
