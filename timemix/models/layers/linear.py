"""Linear maps: one row as fast as many, several of one input at once, and the precision they run in."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.ops.common.spread import broadcast_parameter, embedding

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
            return linear(x, self.weight, self.bias)
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


def product_dtype(x: Tensor) -> torch.dtype:
    """The precision of matrix products of x: autocast's where it is on, else its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(device)
    return x.dtype


def to_product_dtype(x: Tensor) -> Tensor:
    """x in `product_dtype`: cast once here, rather than by autocast before each of the linear maps that read x."""
    return x.to(product_dtype(x))


def joint_linear(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """Outputs of several linear maps of the same x (..., C): in training by one matrix product."""
    # Without gradients the product is made once, and joining the weights costs more than it saves.
    if not torch.is_grad_enabled():
        return tuple(each(x) for each in linears)
    weight, bias = side_by_side(*linears)
    result: tuple[Tensor, ...] = linear(x, weight.to(x.dtype), bias.to(x.dtype)).split(
        [each.out_features for each in linears], dim=-1
    )
    return result


def side_by_side(*linears: Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of several linear maps of the same input as of one."""
    return torch.cat([each.weight for each in linears]), torch.cat([each.bias for each in linears])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in_features) to (..., out_features)."""
    if bias is None or not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return y + broadcast_parameter(bias, y)


class Embedding(nn.Embedding):
    """nn.Embedding, the same when compiled but for where its gradient is summed."""

    def reset_parameters(self) -> None:
        # Without memory there is nothing to fill, and trying takes torch 2 s of imports.
        if self.weight.device.type != "meta":
            super().reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(self.weight, tokens) if torch.compiler.is_compiling() else super().forward(tokens)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, the same when compiled but for where its gradient is summed."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return y * broadcast_parameter(self.weight, y) + broadcast_parameter(self.bias, y)
