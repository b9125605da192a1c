"""The optimizers, what it decays, and the learning rate over a run."""

import math

import torch
from torch import nn

from timemix.config import TrainConfig
from timemix.errors import UserError


def _is_matrix(model: nn.Module) -> dict[str, bool]:
    """Of each parameter by name, whether it is the weight of a linear layer inside a block."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }
    return {name: name in matrices for name, _ in model.named_parameters()}


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: each parameter in one of them.

    AdamW (arXiv 1711.05101), in the framework's fused form, decays only the weights of linear layers inside blocks.
    With `muon` these go to Muon (https://kellerjordan.github.io/posts/muon/), whose updates are scaled to the size of
    AdamW's (arXiv 2502.16982), so that one learning rate and weight decay serve both.

    Raises UserError for `muon` where the framework has none.
    """
    named, is_matrix = dict(model.named_parameters()), _is_matrix(model)
    matrices = [p for name, p in named.items() if is_matrix[name]]
    rest = [p for name, p in named.items() if not is_matrix[name]]
    groups = [{"params": rest, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"train.optimizer muon needs torch 2.9 or later; this is {torch.__version__}")
        muon = torch.optim.Muon(
            matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    else:
        groups.insert(0, {"params": matrices, "weight_decay": config.weight_decay})
    return [*optimizers, torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)]


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the tensors that an optimizer of `build_optimizers` keeps for each parameter."""
    return ("momentum_buffer",) if type(optimizer).__name__ == "Muon" else ("step", "exp_avg", "exp_avg_sq")


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
