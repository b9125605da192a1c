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


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step, counted from 0.

    Rises linearly over the warm-up to lr, then goes to lr_final by the schedule. Every step has as many
    tokens as any other, so a share of the steps is a share of the tokens.
    """
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    progress = (step - warmup) / max(config.steps - warmup, 1)
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * progress)) / 2
    elif config.schedule == "linear":
        share = 1 - progress
    else:
        share = min(1.0, (1 - progress) / max(config.decay, 1e-12))
    return config.lr_final + (config.lr - config.lr_final) * share
