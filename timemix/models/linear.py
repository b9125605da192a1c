"""Linear maps: one row as fast as many, several of one input at once, and the precision they run in."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Up to here the weights are read faster from the left, measured on two cores.
FEW_ROWS = 4


class Linear(nn.Linear):
    """nn.Linear that reads its weights with all threads for a few rows too, as in generation.

    A product of one row runs on one thread in common CPU libraries, a product with two columns on all: 16 and 46 GB/s
    on two cores.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        if not self._few_rows(x):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        # Repeated, not expanded: a stride of 0 would send the product down a slow path.
        columns = rows.repeat(2, 1).t() if len(rows) == 1 else rows.t()
        y = (self.weight @ columns)[:, : len(rows)].t()
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1)

    def _few_rows(self, x: Tensor) -> bool:
        return (
            x.shape[:-1].numel() <= FEW_ROWS
            and x.device.type == "cpu"
            and x.dtype != torch.bfloat16
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )


def to_product_dtype(x: Tensor) -> Tensor:
    """x in the precision of matrix products: autocast's where it is on, else its own.

    Cast once here, rather than by autocast before each of the linear maps that read x.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return x.to(torch.get_autocast_dtype(device))
    return x


def joint_linear(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """Outputs of several linear maps of the same x (..., C): in training by one matrix product."""
    # Without gradients the product is made once, and joining the weights costs more than it saves.
    if not torch.is_grad_enabled():
        return tuple(linear(x) for linear in linears)
    weight = torch.cat([linear.weight.to(x.dtype) for linear in linears])
    bias = torch.cat([linear.bias.to(x.dtype) for linear in linears])
    return F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)
