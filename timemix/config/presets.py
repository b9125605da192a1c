"""Presets: named settings of a run."""

from typing import Any

from timemix.config.run import RunConfig, TrainConfig
from timemix.data.config import DataConfig
from timemix.errors import InvalidValue, nearest
from timemix.models.registry import DEFAULT_ARCHITECTURE, find_architecture, model_config

_SIZES: dict[str, dict[str, Any]] = {
    "demo": {
        "model": {"layers": 4, "heads": 4, "channels": 128, "ctx_len": 128, "ffn_ratio": 2.5, "dropout": 0.2},
        "data": {"order": "epoch"},
        "train": {"steps": 1400, "batch_size": 16, "lr": 4e-3, "warmup": 0.02, "weight_decay": 0.1},
        "ffn": {"activation": "mish"},
    },
    "cpu-small": {
        "model": {"layers": 4, "heads": 4, "channels": 128, "ctx_len": 64, "ffn_ratio": 2.5},
        "data": {"order": "epoch"},
        "train": {"steps": 2000, "batch_size": 12, "lr": 4e-3, "warmup": 0.02, "weight_decay": 0.1},
        # On tinyshakespeare, the loss with mish is 0.008 nats lower than with gelu, in agreement with a comment in the
        # 2021 code.
        "ffn": {"activation": "mish"},
    },
    # This preset aims at the lowest loss on tinyshakespeare within the training time of nanoGPT's CPU configuration
    # (docs/records.md).
    "record": {
        "model": {
            "layers": 3,
            "heads": 4,
            "channels": 128,
            "ctx_len": 256,
            "ffn_ratio": 2.0,
            "token_shift": (0.5, 0.25),
        },
        "data": {"order": "epoch"},
        "train": {
            "steps": 1440,
            "batch_size": 8,
            "optimizer": "muon",
            "lr": 8e-3,
            "lr_final": 0.0,
            "embedding_lr": 3.0,
            "schedule": "linear",
            "warmup": 0.02,
            "betas": (0.9, 0.95),
            "weight_decay": 0.3,
            "valid_every": 2000,
            "save_every": 2000,
        },
        "ffn": {"activation": "silu"},
    },
    # This preset trains on 500,000 samples of 256 tokens, with a cosine schedule without warm-up.
    "seed": {
        "model": {
            "layers": 5,
            "heads": 8,
            "channels": 512,
            "ctx_len": 256,
            "ffn_ratio": 3.0,
            "vocab_size": 136,
        },
        "train": {"steps": 7813, "batch_size": 64, "lr": 6e-4, "lr_final": 2e-4},
        # For the published figure, the attention models were trained with a lower learning rate and weight decay.
        "attention": {"lr": 4e-4, "weight_decay": 0.01},
    },
    # docs/log/2026-11-27-rwkv7-small.md compares settings.
    "rwkv7-small": {
        "arch": "rwkv7",
        "model": {"layers": 4, "heads": 4, "channels": 128, "ctx_len": 128},
        "data": {"order": "epoch"},
        "train": {
            "steps": 1800,
            "batch_size": 6,
            "optimizer": "muon",
            "lr": 8e-3,
            "embedding_lr": 3.0,
            "warmup": 0.02,
            "weight_decay": 0.1,
        },
    },
    # This preset has the size of the published model of 191 M parameters, and the learning rate and weight decay of the
    # original training code for this size.
    "rwkv7-0.1b": {
        "arch": "rwkv7",
        "model": {"layers": 12, "heads": 12, "channels": 768, "ctx_len": 4096, "vocab_size": 65536},
        "data": {"tokenizer": "world"},
        "train": {
            "steps": 20_000,
            "batch_size": 64,
            "accumulation": 64,
            "lr": 6e-4,
            "lr_final": 6e-5,
            "warmup": 0.0005,
            "weight_decay": 0.1,
        },
    },
}
PRESETS = tuple(_SIZES)
DEFAULT_PRESET = "cpu-small"
# The activation of a preset applies only to architectures with a channel-mix.
_CHANNEL_MIXES = ("rwkv1", "rwkv1_exp", "mha_pro")
_ATTENTION = ("mha_rotary", "mha_shift", "mha_pro")
# The original training code of an architecture differs in these settings from the defaults.
_RECIPES: dict[str, dict[str, Any]] = {"rwkv7": {"eps": 1e-18}}


def preset(name: str, arch: str | None = None) -> RunConfig:
    """Return the run config of a preset for an architecture.

    Args:
        name: Name of the preset, one of `PRESETS`.
        arch: Name of the architecture. Default: the architecture of the preset.

    Raises:
        InvalidValue: The preset or the architecture is unknown.
    """
    if name not in _SIZES:
        raise InvalidValue(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    sizes = _SIZES[name]
    arch = sizes.get("arch", DEFAULT_ARCHITECTURE) if arch is None else arch
    fields = sizes["model"] | (sizes.get("ffn", {}) if arch in _CHANNEL_MIXES else {})
    known = find_architecture(arch).config.__dataclass_fields__
    model = model_config(arch, **{field: value for field, value in fields.items() if field in known})
    train = sizes["train"] | (sizes.get("attention", {}) if arch in _ATTENTION else {}) | _RECIPES.get(arch, {})
    return RunConfig(model=model, data=DataConfig(**sizes.get("data", {})), train=TrainConfig(**train))
