"""Rounding of linear weights to bfloat16 or int8."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from timemix.models.language_model import LanguageModel

Weights = Literal["float32", "bfloat16", "int8"]
WEIGHTS: tuple[Weights, ...] = ("float32", "bfloat16", "int8")


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits: weight[o, i] = scale[o] integers[o, i], with an error of at most scale[o] / 2.

    scale[o] = max_i |weight[o, i]| / 127.

    Args:
        weight: Weight (outputs, inputs).

    Returns:
        integers (outputs, inputs) int8, -127 to 127, and scale (outputs,).
    """
    # The clamp avoids a division by 0 for an output whose weights are all 0.
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def rounded(model: LanguageModel, weights: Weights) -> LanguageModel:
    """Round the linear weights of a model.

    Args:
        model: The model, which stays unchanged.
        weights: Format to round to: "float32", "bfloat16" or "int8".

    Returns:
        A copy of the model with rounded weights, stored in the model's own dtype. For "float32", the result
        is the model itself.
    """
    if weights == "float32":
        return model
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                w = module.weight
                if weights == "bfloat16":
                    w.copy_(w.to(torch.bfloat16))
                else:
                    integers, scale = quantized(w)
                    w.copy_(integers * scale[:, None])
    return model
