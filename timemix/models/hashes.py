"""The hash that identifies a model."""

import hashlib
import json
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from timemix.models.language_model import LanguageModel
from timemix.storage.settings import to_dict


def model_hash(model: LanguageModel, config: str | None = None) -> str:
    """Return the SHA-256 of a model's config and weights.

    Args:
        model: The model.
        config: Text that represents the config; None: the config as JSON.

    Returns:
        The hash in hexadecimal.
    """
    weights = sorted(model.state_dict().items())
    # The hash of all weights takes a second per gigabyte, so it is computed again only if PyTorch has changed a weight.
    # `_version` counts the changes of a tensor.
    key = config, [(name, x.data_ptr(), x._version) for name, x in weights]
    known, found, _ = _HASHES.get(model, (None, "", weights))
    if key != known:
        found = _hash(config or json.dumps(to_dict(model.config), sort_keys=True), weights)
        _HASHES[model] = key, found, weights
    return found


_HASHES: "WeakKeyDictionary[LanguageModel, tuple[object, str, object]]" = WeakKeyDictionary()
"""For each model, the key of its newest hash, the hash, and the weights, whose addresses are thus in use."""


def _hash(config: str, weights: Sequence[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of a config and of weights by name."""
    sha256 = hashlib.sha256(config.encode())
    for name, weight in weights:
        sha256.update(name.encode())
        # Weights in bfloat16 give the hash of the same numbers in float32. The parts bound the memory of the copies.
        for part in weight.detach().split(4096) if weight.ndim else (weight.detach(),):
            wide: Tensor = part.to("cpu", torch.promote_types(part.dtype, torch.float32)).contiguous()
            sha256.update(wide.view(torch.uint8).numpy().data)
    return sha256.hexdigest()
