"""Rounding of linear weights to bfloat16, int8 or int4."""

import copy
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.language_model import LanguageModel
from timemix.models.layers.mixtures import wide

Weights = Literal["float32", "bfloat16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = ("float32", "bfloat16", "int8", "int4")

GROUP = 32
"""Number of inputs that share a scale in int4."""

LEVELS = (-127, -100, -79, -63, -49, -36, -24, -12, 0, 11, 23, 36, 50, 65, 83, 106)
"""The values of the codes 0 to 15 in int4.

The levels minimise the squared error of normally distributed weights (Lloyd's algorithm, with the scales of
`quantized_in_groups`). The level of largest magnitude is negative, and the sign of a scale assigns it to either end.
"""

_STARTS = tuple(sign * share / 127 for share in (0.7, 0.77, 0.84, 0.91, 0.98, 1.05, 1.12, 1.19) for sign in (1, -1))
"""Scales at which the search begins, as multiples of the largest magnitude of a group."""

# Code of the level nearest to each whole number from -256 to 255. A number outside this range is clipped to it.
_CODES = np.abs(np.arange(-256, 256)[:, None] - np.array(LEVELS)).argmin(1).astype(np.uint8)
_NEAREST = np.array(LEVELS, np.float32)[_CODES]


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits: weight[o, i] = scale[o] integers[o, i], with an error of at most scale[o] / 2.

    scale[o] = max_i |weight[o, i]| / 127.

    Args:
        weight: Weight (outputs, inputs).

    Returns:
        integers (outputs, inputs) int8, -127 to 127, and scale (outputs,).
    """
    # In bfloat16, a quotient near 127 would be rounded to 128, which int8 does not have.
    weight = wide(weight)
    # The clamp avoids a division by 0 for an output whose weights are all 0.
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def quantized_in_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight to 4 bits: weight[o, i] = scale[o, i // GROUP] LEVELS[codes[o, i]].

    Each scale is the best of several scales: from each start, every weight gets the nearest level, and a scale follows
    by least squares.

    Args:
        weight: Weight (outputs, inputs).

    Returns:
        codes (outputs, inputs) uint8, 0 to 15, and scale (outputs, groups) bfloat16, of any sign.
    """
    outputs, inputs = weight.shape
    groups = -(-inputs // GROUP)
    codes = np.empty((outputs, groups, GROUP), np.uint8)
    scale = torch.empty(outputs, groups, dtype=torch.bfloat16)
    # Blocks of outputs, whose numbers stay in the processor's cache.
    size = max(1, 2**16 // max(1, inputs))
    for begin in range(0, outputs, size):
        rows = weight[begin : begin + size].detach().cpu().float()
        block = F.pad(rows, (0, -inputs % GROUP)).view(-1, groups, GROUP).numpy()
        # A division by the largest magnitude avoids overflow. The smallest divisor avoids a division by 0.
        largest = np.abs(block).max(-1).clip(1e-30)
        own = torch.from_numpy(largest * _best_scale(block / largest[..., None])).to(torch.bfloat16)
        scale[begin : begin + size] = own
        divisor = own.float().numpy()[..., None]
        codes[begin : begin + size] = _nearest(
            _CODES, np.divide(block, divisor, out=np.zeros_like(block), where=divisor != 0)
        )
    return torch.from_numpy(codes.reshape(outputs, -1)[:, :inputs]), scale


def _best_scale(groups: np.ndarray) -> np.ndarray:
    """Return the scale (outputs, groups) of least squared error for groups (outputs, groups, GROUP) from -1 to 1.

    For levels q of weights w, the least error of a scale is sum w^2 - (sum w q)^2 / sum q^2.
    """
    best, most = np.zeros(groups.shape[:2], np.float32), np.zeros(groups.shape[:2], np.float32)
    for start in _STARTS:
        q = _nearest(_NEAREST, groups * np.float32(1 / start))
        # At least 1, for groups whose levels are all 0.
        norm = np.einsum("ogi,ogi->og", q, q).clip(1)
        inner = np.einsum("ogi,ogi->og", groups, q)
        gain = inner**2 / norm
        best, most = np.where(gain > most, inner / norm, best), np.maximum(gain, most)
    return best


def _nearest(table: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the entries of _CODES or _NEAREST for numbers x."""
    found: np.ndarray = table.take((x + np.float32(256.5)).astype(np.intp), mode="clip")
    return found


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the weight (outputs, inputs) float32 that `quantized_in_groups` has rounded.

    Args:
        codes: Codes (outputs, inputs).
        scale: Scales (outputs, groups).
    """
    levels = torch.tensor(LEVELS, dtype=torch.float32)[codes.long()]
    return levels * scale.float().repeat_interleave(GROUP, 1)[:, : codes.shape[1]]


def at_least_int8(weights: Weights) -> Weights:
    """Return the format of the head and of low-rank maps: int8 in a model with int4 weights.

    The loss depends most on the head. Low-rank maps are small.

    Args:
        weights: Format of the other linear weights.
    """
    return "int8" if weights == "int4" else weights


def linear_weights(model: LanguageModel, weights: Weights) -> Iterator[tuple[Tensor, Weights]]:
    """Yield the weight (outputs, inputs) of each linear map of a model, and the format to which the weight is rounded.

    Args:
        model: The model. A module with the attribute `low_rank_weights` names its weights (inputs, outputs) there.
        weights: Format to which most weights are rounded.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight, at_least_int8(weights) if module is model.head else weights
        for name in getattr(module, "low_rank_weights", ()):
            yield getattr(module, name).t(), at_least_int8(weights)


def rounded(model: LanguageModel, weights: Weights) -> LanguageModel:
    """Round the linear weights of a model.

    Args:
        model: The model, which stays unchanged.
        weights: Format to round to: "float32", "bfloat16", "int8" or "int4".

    Returns:
        A copy of the model with rounded weights, stored in the model's own dtype. For "float32", the result
        is the model itself.
    """
    if weights == "float32":
        return model
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight, own in linear_weights(model, weights):
            weight.copy_(_rounded(weight, own))
    return model


def _rounded(weight: Tensor, weights: Weights) -> Tensor:
    if weights == "bfloat16":
        return weight.to(torch.bfloat16)
    if weights == "int4":
        return dequantized(*quantized_in_groups(weight))
    integers, scale = quantized(weight)
    return integers * scale[:, None]
