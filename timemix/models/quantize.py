"""Weights in fewer bits."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from timemix.models.language_model import LanguageModel

Weights = Literal["float32", "bfloat16", "int8"]
WEIGHTS: tuple[Weights, ...] = ("float32", "bfloat16", "int8")


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit integers (out, in) and a scale for each output (out,): weight = scale x integers, within scale / 2."""
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def rounded(model: LanguageModel, weights: Weights) -> LanguageModel:
    """The model with its linear weights rounded, held in its own type; itself where nothing is to round."""
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
