"""Conversion of settings from and to format version 1, in which `model` had the subtables `mixer` and `ffn`."""

from typing import Any

from timemix.models.config import ModelConfig
from timemix.storage.settings import to_dict

_PARTS = ("mixer", "ffn")
_ORDER = (
    "arch",
    "vocab_size",
    "ctx_len",
    "layers",
    "heads",
    "channels",
    "ffn_ratio",
    "token_shift",
    "token_shift_top",
    "dropout",
    "initial",
)
"""The fields of the class `ModelConfig` in version 1, in the order of their definition."""


def flattened(data: dict[str, Any]) -> dict[str, Any]:
    """Move the fields of `model.mixer` and `model.ffn` to `model` in settings of format version 1."""
    model = data.get("model")
    if not isinstance(model, dict):
        return data
    flat = {name: value for name, value in model.items() if name not in _PARTS}
    for part in _PARTS:
        inner = model.get(part, {})
        flat |= inner if isinstance(inner, dict) else {part: inner}
    return data | {"model": flat}


def nested(config: ModelConfig) -> dict[str, Any] | None:
    """Return a model's settings in format version 1; None for an architecture that version 1 did not have."""
    if config.version_1 is None:
        return None
    flat = to_dict(config)
    parts = {part: {name: flat.pop(name) for name in fields} for part, (_, fields) in config.version_1.items()}
    return flat | parts


def representation(config: ModelConfig) -> str | None:
    """Return the `repr` of a model's settings in version 1; None for an architecture that version 1 did not have.

    Saved states contain a hash of the model, which version 1 computed from the weights and this `repr`.
    """
    if config.version_1 is None:
        return None
    parts = {
        part: f"{name}({', '.join(f'{field}={getattr(config, field)!r}' for field in fields)})"
        for part, (name, fields) in config.version_1.items()
    }
    own = {name: repr(getattr(config, name)) for name in _ORDER}
    return f"ModelConfig({', '.join(f'{name}={value}' for name, value in (own | parts).items())})"
