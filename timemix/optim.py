"""The optimizer, what it decays, and the learning rate over a run."""

import math

import torch
from torch import nn

from timemix.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two AdamW groups: the weights of linear layers inside blocks, which are decayed, and all the rest."""
    decayed = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }
    named = dict(model.named_parameters())
    return [
        {"params": [p for name, p in named.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over `parameter_groups`, in the framework's fused form."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate when a share `progress` (0 to 1) of the run's tokens has been seen.

    Rises linearly from 0 over `warmup`, then goes from lr to lr_final by the schedule. Without warm-up the
    first step takes lr itself.
    """
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    rest = (progress - config.warmup) / max(1 - config.warmup, 1e-12)
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * rest)) / 2
    elif config.schedule == "linear":
        share = 1 - rest
    else:
        share = min(1.0, (1 - rest) / max(config.decay, 1e-12))
    return config.lr_final + (config.lr - config.lr_final) * share
