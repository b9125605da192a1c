"""Conversion of weights and settings from and to the Hugging Face form of RWKV-7 (flash-linear-attention, rwkv7-hf).

    original                                      Hugging Face
    matrices w1, w2 ... of the low-rank maps      transposed, in a sequence `w_lora.lora` with the bias w0
    vectors w0, a0, v0, k_k, k_a, ffn.x_k         (C,) instead of (1, 1, C)
    blocks.0.att.v0, v1, v2                       left out

Early files of flash-linear-attention store x_r, x_w, x_k, x_v, x_a and x_g as one tensor x_x (6, C).
"""

import re
from typing import Any

from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.published import PublishedNames
from timemix.models.rwkv7.config import Rwkv7Config

MODEL_TYPE = "rwkv7"
"""Value of `model_type` in config.json."""
_NORM_EPS = 1e-5
# Fields of config.json that are equal in all models
_CONSTANTS = {
    "attn_mode": "chunk",
    "hidden_act": "sqrelu",
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": _NORM_EPS,
    "fuse_norm": False,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_STACKED = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
_OUTSIDE = {
    "emb.weight": "model.embeddings.weight",
    "blocks.0.ln0.weight": "model.layers.0.pre_norm.weight",
    "blocks.0.ln0.bias": "model.layers.0.pre_norm.bias",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_TRANSPOSED = {f"att.{x}{n}": f"attn.{x}_lora.lora.{2 * n - 2}.weight" for x in "wavg" for n in (1, 2)}
_FLAT = {
    **{f"att.{x}0": f"attn.{x}_lora.lora.2.bias" for x in "wav"},
    "att.k_k": "attn.k_k",
    "att.k_a": "attn.k_a",
    "ffn.x_k": "ffn.x_k",
}
_IN_BLOCK = {
    **_TRANSPOSED,
    **_FLAT,
    **{f"att.{x}": f"attn.{x}" for x in (*_STACKED, "r_k")},
    **{f"att.{x}.weight": f"attn.{x[0]}_proj.weight" for x in ("receptance", "key", "value", "output")},
    **{
        f"{original}.{x}": f"{ours}.{x}"
        for original, ours in (("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("att.ln_x", "attn.g_norm"))
        for x in ("weight", "bias")
    },
    "ffn.key.weight": "ffn.key.weight",
    "ffn.value.weight": "ffn.value.weight",
}
_NAMES = PublishedNames("the Hugging Face form of RWKV-7", "model.layers", _OUTSIDE, _IN_BLOCK)
_IN_ORIGINAL = re.compile(r"blocks\.\d+\.(.+)")


def _kind(name: str) -> str:
    """Return the part of an original name after the number of the layer."""
    found = _IN_ORIGINAL.fullmatch(name)
    return found[1] if found else ""


def from_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from the Hugging Face form to the original names and shapes.

    Args:
        weights: Weights by their names in the Hugging Face form.

    Returns:
        Weights by their original names. The weights are views.

    Raises:
        InvalidValue: A name is unknown, or a weight has two names.
    """
    found: dict[str, Tensor] = {}
    for name, x in weights.items():
        stem, _, last = name.rpartition(".")
        is_stack = last == "x_x" and x.shape[:1] == (len(_STACKED),)
        rows = {f"{stem}.{each}": row for each, row in zip(_STACKED, x, strict=True)} if is_stack else {name: x}
        for each, row in rows.items():
            own = _NAMES.ours(each)
            if own in found:
                raise InvalidValue(f"{name!r} is a second name of a weight; keep only one of them")
            found[own] = row
    return {name: _changed(name, x) for name, x in found.items()}


def to_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from the original names and shapes to the Hugging Face form.

    Args:
        weights: Weights by their original names, without the unused tensors of layer 0.

    Returns:
        Weights by their names in the Hugging Face form. The weights are views.
    """
    flat = {name: x.flatten() if _kind(name) in _FLAT else x for name, x in weights.items()}
    return {_NAMES.published(name): x.t() if _kind(name) in _TRANSPOSED else x for name, x in flat.items()}


def _changed(name: str, x: Tensor) -> Tensor:
    """Return a weight of the Hugging Face form in the original shape. The caller checks all shapes later."""
    if _kind(name) in _TRANSPOSED:
        return x.mT if x.ndim == 2 else x
    is_vector = _kind(name) in _FLAT or _kind(name).removeprefix("att.") in _STACKED
    return x.reshape(1, 1, -1) if is_vector else x


def settings(document: dict[str, Any], config: Rwkv7Config) -> dict[str, Any]:
    """Return the settings of a model that only config.json gives: the shapes of the weights give all sizes.

    Args:
        document: Content of config.json.
        config: Settings that the shapes of the weights give.

    Returns:
        Fields of `Rwkv7Config`.

    Raises:
        InvalidValue: The model differs from RWKV-7.
    """
    for name in ("norm_eps", "norm_bias", "hidden_act", "tie_word_embeddings"):
        if (found := document.get(name, value := _CONSTANTS[name])) != value:
            raise InvalidValue(f"its config.json has {name} {found!r}; only {value!r} is supported")
    # Code that reads the Hugging Face form computes the constant of the norm over each head from the size of a head.
    return {"group_norm_eps": config.head_size * _NORM_EPS}


def document(config: Rwkv7Config, end: int | None) -> dict[str, Any]:
    """Return the content of config.json for a model.

    Args:
        config: Settings of the model.
        end: Id of the token at the end of a text, at which transformers ends a generated text; None: no such token.

    Returns:
        A JSON object.

    Raises:
        InvalidValue: The Hugging Face form has no such model.
    """
    eps = config.head_size * _NORM_EPS
    if abs(config.group_norm_eps - eps) > 1e-12:
        raise InvalidValue(
            f"group_norm_eps is {config.group_norm_eps:g}, but the Hugging Face form requires {eps:g} for heads of"
            f" {config.head_size} channels; use the original form (pth)"
        )
    ranks = {"decay": "decay", "rate": "a", "residual": "v", "gate": "gate"}
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.channels,
        "hidden_ratio": config.ffn_ratio,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.layers,
        "head_dim": config.head_size,
        "num_heads": config.heads,
        "attention_hidden_size": config.channels,
        "num_attention_heads": config.heads,
        "value_dim": [config.channels] * config.layers,
        **{f"{theirs}_low_rank_dim": config.ranks[ours] for ours, theirs in ranks.items()},
        "max_position_embeddings": config.ctx_len,
        **_CONSTANTS,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    }
