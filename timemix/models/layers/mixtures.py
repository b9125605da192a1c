"""Mixtures of each normalized token with the previous token, which the sublayers of RWKV-4 to RWKV-7 read."""

import torch
from torch import Tensor, nn

from timemix.models.config import Ideas
from timemix.models.layers.linear import LayerNorm, product_dtype, to_product_dtype
from timemix.models.layers.token_shift import previous_token
from timemix.ops.common import fused
from timemix.ops.common.norms import norm_mixtures
from timemix.ops.common.spread import broadcast_parameter


def learned(config: Ideas, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the mixtures of a time-mix with parameters, in a model that may lack ideas of its architecture.

    Args:
        config: Settings of the model.
        names: Names of the vectors that read the mixtures in a whole model.
    """
    ideas = {"decay": "token_decay", "rate": "delta_rule"}
    shifted = config.uses("token_shift") and config.uses("learned_shift")
    return tuple(name for name in names if shifted and config.uses(ideas.get(name, name)))


def shares(
    mix: nn.ParameterDict, names: tuple[str, ...], norm: LayerNorm, *, current: bool, halved: bool = False
) -> tuple[Tensor, ...]:
    """Return the share of the previous token (C,) in each mixture.

    Args:
        mix: Parameters (C,) by name of the mixture.
        names: Names of the mixtures.
        norm: LayerNorm of the sublayer.
        current: Whether the parameters are shares of the current token instead.
        halved: Whether a mixture without a parameter has the share 1 in the first half of the channels, as in the RWKV
            of 2021. Otherwise its share is 0.
    """
    fixed = torch.zeros_like(norm.weight)
    if halved:
        fixed[: len(fixed) // 2] = 1
    own = {name: 1 - x if current else x for name, x in mix.items()}
    return tuple(own.get(name, fixed) for name in names)


def wide(x: Tensor) -> Tensor:
    """Cast x to at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def interpolated(x: Tensor, previous: Tensor, weight: Tensor) -> Tensor:
    """Compute x + weight * (previous - x) for x and previous (B, T, C) and weight (C,), in the dtype of products."""
    return to_product_dtype(x + (previous - x) * broadcast_parameter(weight, x))


def normed_mixtures(
    norm: LayerNorm,
    x: Tensor,
    mix: tuple[Tensor, ...],
    state: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Normalize x, and interpolate between each token and the previous token.

    Args:
        norm: LayerNorm of the sublayer.
        x: Input of the sublayer (B, T, C).
        mix: Share of the previous token in each mixture (C,).
        state: Normalized token before x (B, 1, C); None: zeros, and the next state is None.
        lengths: Number of valid tokens of each row (B,); None: all tokens are valid.
        resets: Whether the previous token of each token is zero (B, T) bool; None: never.

    Returns:
        The mixtures (B, T, C), in the dtype of products, and the next state.
    """
    if lengths is None and x.dtype == torch.float32 and fused.serves(x):
        mixed = norm_mixtures(x, norm.weight, norm.bias, norm.eps, mix, state, product_dtype(x), resets)
        return mixed, None if state is None else norm(x[:, -1:])
    y = norm(x)
    previous, state = previous_token(y, state, lengths, resets)
    return tuple(interpolated(y, previous, each) for each in mix), state
