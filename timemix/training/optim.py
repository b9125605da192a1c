"""The optimizers, what it decays, and the learning rate over a run."""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from timemix.config.run import TrainConfig
from timemix.models.layers.block import Recipe
from timemix.runtime.distributed import part_like, whole


def _is_matrix(model: nn.Module) -> dict[str, bool]:
    """Of each parameter by name, whether it is the weight of a linear layer inside a block."""
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }
    return {name: name in matrices for name, _ in model.named_parameters()}


def build_optimizers(
    model: nn.Module, config: TrainConfig, precision: str = "float32", recipe: Recipe | None = None
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: each parameter in one of them.

    AdamW (arXiv 1711.05101), in the framework's fused form, decays only the weights of linear layers inside blocks.
    With `muon` these go to Muon, whose products run in `precision`, but in float64 for a model of that type.
    `recipe`: what the architecture wants otherwise.
    """
    recipe = recipe or Recipe()
    matrices: list[nn.Parameter] = []
    # By weight decay, multiple of the learning rate, and whether it is of the embedding.
    others: dict[tuple[float, float, bool], list[nn.Parameter]] = {(0.0, 1.0, False): []}
    is_matrix = _is_matrix(model)
    for name, p in model.named_parameters():
        embeds = name.startswith("embedding.")
        scale = recipe.scale_of(name) * (config.embedding_lr if embeds else 1.0)
        if is_matrix[name] and scale == 1:
            matrices.append(p)
            continue
        decays = is_matrix[name] or (recipe.decay_all_matrices and p.ndim == 2 and name.endswith(".weight"))
        others.setdefault((config.weight_decay if decays else 0.0, scale, embeds), []).append(p)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale, _), parameters in others.items()
        if parameters
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        optimizers.append(Muon(matrices, config.lr, config.weight_decay, precision))
    else:
        groups.insert(0, {"params": matrices, "weight_decay": config.weight_decay})
    return [*optimizers, AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)]


class _Uncompiled(torch.optim.Optimizer):
    """An optimizer that torch.compile never sees: without PyTorch's guards against it, which import the compiler.

    That takes 2.5 s of processor time, half of what a run of one step takes.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(_Uncompiled, torch.optim.AdamW):
    """PyTorch's AdamW."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(_Uncompiled):
    """Momentum, orthogonalized (https://kellerjordan.github.io/posts/muon/), for matrices only.

    Updates are scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate and weight decay serve both.
    As torch.optim.Muon with `match_rms_adamw`, but for fewer rounds of `orthogonalized` and for products in float32:
    on processors without bfloat16 instructions those of bfloat16 take thirty times as long.
    """

    momentum = 0.95

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, precision: str) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Matrices of one shape are orthogonalized together."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    updates[matrix.shape].append((matrix, self._next(matrix)))
            for shape, pairs in updates.items():
                matrices = torch.stack([whole(update) for _, update in pairs])
                dtype = torch.float64 if matrices.dtype == torch.float64 else getattr(torch, self.precision)
                lr = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for (matrix, _), update in zip(pairs, orthogonalized(matrices.to(dtype)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(part_like(update.to(matrix.dtype), matrix), alpha=-lr)
        return loss

    def _next(self, matrix: nn.Parameter) -> Tensor:
        """The direction (Nesterov) after the momentum has taken in the gradient."""
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(state["momentum_buffer"], self.momentum)


# Of a x + b x^3 + c x^5: on [0.01, 1] the first has the least largest error, the next on what that leaves, and so on
# (arXiv 2505.16932), but for 2 % in hand, since a singular value that rounding takes past 1 would be thrown far off.
_QUINTICS = ((7.9347, -22.2580, 15.8016), (3.5653, -2.5649, 0.4859), (2.6091, -1.8632, 0.4099))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values moved to between 0.7 and 1.3.

    Of values below a hundredth of the Frobenius norm it makes at most 74 times that share. Three polynomials do
    what the usual one does in five rounds.
    """
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in _QUINTICS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.mT if wide is not matrices else x
    return result


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the tensors that an optimizer of `build_optimizers` keeps for each parameter."""
    return ("momentum_buffer",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")


def learning_rate(config: TrainConfig, step: int, warmup_floor: float = 0.0) -> float:
    """Learning rate of a step, counted from 0.

    Rises linearly over the warm-up, from `warmup_floor` of it, to lr, then goes to lr_final by the schedule. Every step
    has as many tokens as any other, so a share of the steps is a share of the tokens.
    """
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.lr * (warmup_floor + (1 - warmup_floor) * min(1.0, (step + 1) / warmup))
    progress = (step - warmup) / max(config.steps - warmup, 1)
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * progress)) / 2
    elif config.schedule == "linear":
        share = 1 - progress
    else:
        # Warm-up and decay are shares of the same run; the decay takes what a long warm-up leaves.
        share = min(1.0, (1 - step / config.steps) / max(min(config.decay, 1 - config.warmup), 1e-12))
    return config.lr_final + (config.lr - config.lr_final) * share
