"""LoRA: a low-rank term that is added to the frozen weight of a linear map."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from timemix.errors import InvalidValue
from timemix.models.layers.linear import Linear, linear


class LoraLinear(Linear):
    """A linear map x (base + scale up down)^T + bias, of which only `down` and `up` are trained.

    `up` begins with zeros, so the map begins exactly as the frozen map.

    Args:
        frozen: The linear map to which the term is added.
        rank: Rank R of the term, at least 1.
        scale: Factor of the term.

    Attributes:
        base: Weight (outputs, inputs) of `frozen`.
        down: Map to the R hidden channels (R, inputs).
        up: Map from the R hidden channels (outputs, R).

    Source:
        arXiv 2106.09685.
    """

    def __init__(self, frozen: nn.Linear, rank: int, scale: float) -> None:
        # The parent would create a weight, which here is computed.
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = frozen.in_features, frozen.out_features, scale
        self.base, self.bias = frozen.weight, frozen.bias
        self.down = nn.Parameter(frozen.weight.new_empty(rank, frozen.in_features))
        self.up = nn.Parameter(frozen.weight.new_zeros(frozen.out_features, rank))
        if self.down.device.type != "meta":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The merged weight (outputs, inputs), for code that reads the weight of a linear map."""
        return merged(self.base, self.down, self.up, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        # Without a gradient of the merged weight, the backward pass needs one large product less.
        return linear(x, self.base, self.bias) + self.scale * linear(linear(x, self.down, None), self.up, None)


def merged(base: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return base + scale up down (outputs, inputs), in the dtype of `base`."""
    return (base + scale * (up @ down)).to(base.dtype)


def add_lora(blocks: Sequence[nn.Module], ranks: Sequence[tuple[str, int]], alpha: float) -> None:
    """Replace linear maps of blocks by maps with a low-rank term.

    Args:
        blocks: Blocks of a model.
        ranks: Pairs of a pattern and a rank. A pattern is a name of linear maps within a block, such as "mixer.key",
            with the wildcards `*` and `?`. The last pattern that matches a linear map sets the rank of its term.
        alpha: Number whose quotient by the rank is the factor of each term.

    Raises:
        InvalidValue: A pattern matches no linear map.
    """
    names = {name for block in blocks for name, _ in _linear_maps(block)}
    for pattern, _ in ranks:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidValue(
                f"train.lora_modules has {pattern!r}, which matches no linear map of a block; the linear maps are"
                f" {', '.join(sorted(names))}"
            )
    for block in blocks:
        for name, module in list(_linear_maps(block)):
            if matching := [rank for pattern, rank in ranks if fnmatchcase(name, pattern)]:
                parent, _, own = name.rpartition(".")
                setattr(block.get_submodule(parent), own, LoraLinear(module, matching[-1], alpha / matching[-1]))


def with_lora(weights: Mapping[str, Tensor], terms: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return the weights of a model with the low-rank terms added.

    Args:
        weights: Weights by name.
        terms: Tensors "NAME.down" and "NAME.up" for each linear map NAME with a term.
        alpha: Number whose quotient by the rank is the factor of each term.
    """
    found = dict(weights)
    for name in (name.removesuffix(".down") for name in terms if name.endswith(".down")):
        base = found[f"{name}.weight"]
        down, up = terms[f"{name}.down"].to(base.device), terms[f"{name}.up"].to(base.device)
        found[f"{name}.weight"] = merged(base, down, up, alpha / len(down))
    return found


def _linear_maps(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, each) for name, each in block.named_modules() if isinstance(each, nn.Linear))
