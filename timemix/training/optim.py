"""Optimizers, their weight decay, and the learning-rate schedule."""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from timemix.config.run import TrainConfig
from timemix.models.layers.block import Recipe
from timemix.models.layers.lora import LoraLinear
from timemix.runtime.distributed import part_like, whole


def _is_matrix(model: nn.Module) -> dict[str, bool]:
    """For each parameter name, return whether it is a matrix of a linear map or of a low-rank term inside a block."""
    matrices = {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
        for own in (("down", "up") if isinstance(module, LoraLinear) else ("weight",))
    }
    return {name: name in matrices for name, _ in model.named_parameters()}


def build_optimizers(
    model: nn.Module, config: TrainConfig, precision: str = "float32", recipe: Recipe | None = None
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a run. Each parameter belongs to exactly one optimizer.

    AdamW (PyTorch's fused version) applies weight decay only to the weights of linear layers inside blocks. With
    `config.optimizer` "muon", Muon updates the weights of linear layers inside blocks, and AdamW updates all other
    parameters.

    Args:
        model: The model to train.
        config: Optimizer, learning rate, weight decay, betas and epsilon.
        precision: Type of Muon's matrix products. A float64 model always uses float64.
        recipe: Exceptions of the architecture: learning-rate factors and additional weight decay.

    Source:
        AdamW: arXiv 1711.05101.
    """
    recipe = recipe or Recipe()
    matrices: list[nn.Parameter] = []
    # Keys of `others`: weight decay, factor of the learning rate, and whether the parameters belong to the embedding.
    others: dict[tuple[float, float, bool], list[nn.Parameter]] = {(0.0, 1.0, False): []}
    is_matrix = _is_matrix(model)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
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
    """An optimizer without PyTorch's wrappers for torch.compile, because these wrappers import the compiler.

    Importing the compiler takes 2.5 s of processor time, half the time of a run of one step. timemix never compiles
    optimizers.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(_Uncompiled, torch.optim.AdamW):
    """PyTorch's AdamW without its wrappers for torch.compile."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(_Uncompiled):
    """Muon: momentum with orthogonalized updates, for matrices only.

    For a weight of shape (rows, columns) with the Nesterov momentum M of its gradient:

        W <- (1 - lr weight_decay) W - 0.2 sqrt(max(rows, columns)) lr orthogonalized(M)

    The factor 0.2 sqrt(max(rows, columns)) gives the updates the same size as the updates of AdamW. AdamW and Muon can
    therefore use one learning rate and one weight decay. The updates equal the updates of torch.optim.Muon with
    `match_rms_adamw`, with two differences. `orthogonalized` needs fewer iterations than torch.optim.Muon. The matrix
    products of `orthogonalized` run in `precision`. On a CPU without bfloat16 instructions, matrix products in bfloat16
    take thirty times as long as in float32.

    Args:
        matrices: Parameters of shape (rows, columns).
        lr: Learning rate.
        weight_decay: Weight decay.
        precision: Type of the matrix products: "float32", "bfloat16" or "float64".

    Source:
        https://kellerjordan.github.io/posts/muon/; the factor of the updates: arXiv 2502.16982.
    """

    momentum = 0.95

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, precision: str) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the matrices. Matrices of equal shape are orthogonalized in one batch."""
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
        """Add the gradient to the momentum of a matrix, and return the Nesterov direction."""
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(state["momentum_buffer"], self.momentum)


# Coefficients of three polynomials a x + b x^3 + c x^5 (arXiv 2505.16932). The first polynomial has the smallest
# maximal error on [0.01, 1]. Each next polynomial has the smallest maximal error on the range of values of the previous
# polynomial. The ranges have a margin of 2 %, because rounding may take a singular value past 1, where the polynomials
# diverge.
_QUINTICS = ((7.9347, -22.2580, 15.8016), (3.5653, -2.5649, 0.4859), (2.6091, -1.8632, 0.4099))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices with their singular values moved to between 0.7 and 1.3.

    Three rounds with different polynomials have the effect of five rounds with the usual polynomial. A singular value s
    below a hundredth of the Frobenius norm F can end below 0.7, at no more than 74 s / F.

    Args:
        matrices: Shape (n, rows, columns).

    Source:
        arXiv 2505.16932.
    """
    # (n, rows, columns) -> (n, short side, long side), so that the Gram matrix is small
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in _QUINTICS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.mT if wide is not matrices else x
    return result


def state_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of the tensors that an optimizer of `build_optimizers` stores for each parameter."""
    return ("momentum_buffer",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")


def begin_step(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of each group of parameters, and remove the gradients of the last step.

    Args:
        optimizers: The optimizers, from `build_optimizers`.
        lr: Learning rate of the step, which each group multiplies by its own factor.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.zero_grad(set_to_none=True)


def learning_rate(config: TrainConfig, step: int, warmup_floor: float = 0.0) -> float:
    """Return the learning rate of a step.

    The rate rises linearly to `config.lr` over the warm-up, then follows the schedule to `config.lr_final`. All steps
    have the same number of tokens, so a share of the steps is the same share of the tokens.

    Args:
        config: Learning rates, schedule, warm-up and number of steps.
        step: Number of the step, counted from 0.
        warmup_floor: Share of `config.lr` at which the warm-up starts, from 0 to 1.
    """
    warmup = config.warmup * config.steps
    # Measurements of speed run more steps than the run has.
    step = min(step, config.steps)
    if step < warmup:
        # Without a floor, the rate would be 0 in step 0, so the warm-up begins one step later.
        begun = step if warmup_floor else step + 1
        return config.lr * (warmup_floor + (1 - warmup_floor) * min(1.0, begun / warmup))
    progress = (step - warmup) / max(config.steps - warmup, 1)
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * progress)) / 2
    elif config.schedule == "linear":
        share = 1 - progress
    else:
        # Warm-up and decay are shares of one run, so a long warm-up shortens the decay.
        share = min(1.0, (1 - step / config.steps) / max(min(config.decay, 1 - config.warmup), 1e-12))
    return config.lr_final + (config.lr - config.lr_final) * share
