"""Number of parameters and FLOPs per token of a model, computed from its settings."""

import torch

from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of each part of a model, without allocating memory for its weights.

    Args:
        config: Settings of the model.

    Returns:
        Number of parameters by part: "embedding", "mixers", "ffns", "head", "norms", other parts of the model, and
        "total".
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    counts = {"embedding": 0, "mixers": 0, "ffns": 0, "head": 0, "norms": 0}
    for name, p in model.named_parameters():
        part = "norms" if "norm" in name else name.split(".")[0]
        if part == "blocks":
            part = f"{name.split('.')[2]}s"
        counts[part] = counts.get(part, 0) + p.numel()
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: ModelConfig) -> int:
    """Estimate the floating-point operations per token of a forward pass over ctx_len tokens.

    The estimate is two operations for each weight of a matrix product, plus the operations of `Block.mixing_flops`.
    A training step needs 3x as many operations as a forward pass.

    Args:
        config: Settings of the model.

    Returns:
        Number of operations.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    weights = sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2 and "weight" in name)  # type: ignore[attr-defined]
    return 2 * (weights + config.vocab_size * config.channels) + model.block.mixing_flops(config)
