"""Conversion of weights and settings from and to LlamaForCausalLM of `transformers`, whose layouts timemix uses too."""

from typing import Any

from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.llama.config import LlamaConfig
from timemix.models.published import PublishedNames

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "mixer_norm.weight": "input_layernorm.weight",
    "mixer.query.weight": "self_attn.q_proj.weight",
    "mixer.key.weight": "self_attn.k_proj.weight",
    "mixer.value.weight": "self_attn.v_proj.weight",
    "mixer.output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
_NAMES = PublishedNames("LlamaForCausalLM without biases", "model.layers", _OUTSIDE, _IN_BLOCK)
published_name, our_name = _NAMES.published, _NAMES.ours


def from_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the names of weights from LlamaForCausalLM to `llama`. A tied head becomes a copy of the embedding."""
    ours = {our_name(name): weight for name, weight in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if "head.weight" not in ours and "embedding.weight" in ours:
        ours["head.weight"] = ours["embedding.weight"].clone()
    return ours


def to_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the names of weights from `llama` to LlamaForCausalLM."""
    return {published_name(name): weight for name, weight in weights.items()}


def published_config(config: LlamaConfig) -> dict[str, Any]:
    """Convert the settings of a model to the content of a config.json of `transformers`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.channels,
        "intermediate_size": config.ffn_hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads // config.groups,
        "max_position_embeddings": config.ctx_len,
        "rope_theta": config.rotary_base,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.initial_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def our_config(published: dict[str, Any]) -> LlamaConfig:
    """Convert the content of a config.json of `transformers` to settings of `llama`.

    Args:
        published: Content of the config.json.

    Returns:
        The settings.

    Raises:
        InvalidValue: `llama` does not support a setting, such as biases, scaled rotary positions, an activation other
            than SiLU, a head size other than channels / heads, or a hidden size that is not a multiple of 8.
    """
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads, hidden, channels = (published[f] for f in ("num_attention_heads", "intermediate_size", "hidden_size"))
    for name, found, wanted in (
        ("model_type", published.get("model_type", "llama"), "llama"),
        ("hidden_act", published.get("hidden_act", "silu"), "silu"),
        ("attention_bias", published.get("attention_bias", False), False),
        ("mlp_bias", published.get("mlp_bias", False), False),
        ("rope_type", kind, "default"),
        ("head_dim", published.get("head_dim") or channels // heads, channels // heads),
        ("intermediate_size", hidden, max(8, round(hidden / 8) * 8)),
    ):
        if found != wanted:
            raise InvalidValue(f"{name} is {found!r}; llama supports {wanted!r} only")
    kv_heads = published.get("num_key_value_heads") or heads
    return LlamaConfig(
        vocab_size=published["vocab_size"],
        ctx_len=published["max_position_embeddings"],
        layers=published["num_hidden_layers"],
        channels=channels,
        heads=heads,
        kv_heads=0 if kv_heads == heads else kv_heads,
        ffn_ratio=hidden / channels,
        rotary_base=float(rope.get("rope_theta", published.get("rope_theta", 10000.0))),
        norm_eps=float(published.get("rms_norm_eps", 1e-6)),
        initial_std=float(published.get("initializer_range", 0.02)),
    )
