"""Conversion of weights and settings from and to the Hugging Face form of RWKV-4 (transformers, model type `rwkv`).

All tensors have the same shapes as in the original code: a conversion only renames them. The field `rescale_every` of
config.json does not change the stored weights: transformers divides them after loading.
"""

from typing import Any

from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.published import PublishedNames
from timemix.models.rwkv4.config import Rwkv4Config

MODEL_TYPE = "rwkv"
"""Value of `model_type` in config.json."""
# Fields of config.json that are equal in all models
_CONSTANTS = {
    "layer_norm_epsilon": 1e-5,
    "rescale_every": 6,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_OUTSIDE = {
    "emb.weight": "rwkv.embeddings.weight",
    "blocks.0.ln0.weight": "rwkv.blocks.0.pre_ln.weight",
    "blocks.0.ln0.bias": "rwkv.blocks.0.pre_ln.bias",
    "ln_out.weight": "rwkv.ln_out.weight",
    "ln_out.bias": "rwkv.ln_out.bias",
    "head.weight": "head.weight",
}
_IN_BLOCK = {
    **{f"{norm}.{each}": f"{norm}.{each}" for norm in ("ln1", "ln2") for each in ("weight", "bias")},
    **{f"att.{name}.weight": f"attention.{name}.weight" for name in ("receptance", "key", "value", "output")},
    **{f"ffn.{name}.weight": f"feed_forward.{name}.weight" for name in ("receptance", "key", "value")},
    **{f"att.time_mix_{name[0]}": f"attention.time_mix_{name}" for name in ("receptance", "key", "value")},
    **{f"ffn.time_mix_{name[0]}": f"feed_forward.time_mix_{name}" for name in ("receptance", "key")},
    **{f"att.{name}": f"attention.{name}" for name in ("time_decay", "time_first")},
}
_NAMES = PublishedNames("the Hugging Face form of RWKV-4", "rwkv.blocks", _OUTSIDE, _IN_BLOCK)


def from_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from the Hugging Face form to the original names.

    Args:
        weights: Weights by their names in the Hugging Face form.

    Returns:
        Weights by their original names.

    Raises:
        InvalidValue: A name is unknown.
    """
    return {_NAMES.ours(name): x for name, x in weights.items()}


def to_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights from the original names to the Hugging Face form.

    Args:
        weights: Weights by their original names.

    Returns:
        Weights by their names in the Hugging Face form.
    """
    return {_NAMES.published(name): x for name, x in weights.items()}


def settings(document: dict[str, Any], config: Rwkv4Config) -> dict[str, Any]:
    """Check that config.json describes a model of RWKV-4. The shapes of the weights give all settings.

    Args:
        document: Content of config.json.
        config: Settings that the shapes of the weights give.

    Returns:
        Fields of `Rwkv4Config` that only config.json gives: none.

    Raises:
        InvalidValue: The model differs from RWKV-4.
    """
    expected = {name: _CONSTANTS[name] for name in ("layer_norm_epsilon", "tie_word_embeddings")}
    for name, value in (expected | {"attention_hidden_size": config.channels}).items():
        if (found := document.get(name)) not in (None, value):
            raise InvalidValue(f"its config.json has {name} {found!r}; only {value!r} is supported")
    return {}


def document(config: Rwkv4Config, end: int | None) -> dict[str, Any]:
    """Return the content of config.json for a model.

    Args:
        config: Settings of the model.
        end: Id of the token at the end of a text, at which transformers ends a generated text; None: no such token.

    Returns:
        A JSON object.
    """
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "context_length": config.ctx_len,
        "hidden_size": config.channels,
        "attention_hidden_size": config.channels,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.layers,
        **_CONSTANTS,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
    }
