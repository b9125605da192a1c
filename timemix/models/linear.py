"""Linear maps that share an input, and the precision they run in."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def to_product_dtype(x: Tensor) -> Tensor:
    """x in the precision of matrix products: autocast's where it is on, else its own.

    Cast once here, rather than by autocast before each of the linear maps that read x.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(device))
    return x


def joint_linear(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Outputs of several linear maps of the same x (..., C), by one matrix product."""
    weight = torch.cat([linear.weight.to(x.dtype) for linear in linears])
    bias = torch.cat([linear.bias.to(x.dtype) for linear in linears])
    return F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)
