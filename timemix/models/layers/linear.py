"""Linear, embedding and norm layers, joint products of linear layers with one input, and dtype of matrix products."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.ops.common.spread import broadcast_parameter, embedding

# Up to this number of rows, weight @ columns is faster than rows @ weight^T, measured on two cores.
FEW_ROWS = 4


class Linear(nn.Linear):
    """nn.Linear that uses all threads even for a few rows, as in generation.

    Common CPU libraries compute a product with one row on one thread, but a product with two columns on all threads. On
    two cores, a product with one row reads 16 GB/s of weights, and a product with two columns reads 46 GB/s.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        if not self._few_rows(x):
            return linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        # The row is repeated, not expanded: a stride of 0 would select a slow path. (rows, in) -> (in, columns)
        columns = rows.repeat(2, 1).t() if len(rows) == 1 else rows.t()
        y = (self.weight @ columns)[:, : len(rows)].t()
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], len(self.weight))

    def _few_rows(self, x: Tensor) -> bool:
        # An exported graph is for any number of rows, so its condition must not read the number of rows.
        return (
            not torch.compiler.is_compiling()
            and x.shape[:-1].numel() <= FEW_ROWS
            and x.device.type == "cpu"
            and x.dtype != torch.bfloat16
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of x: the autocast dtype if autocast is on and x is float32, else x.dtype."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype == torch.float32:
        return torch.get_autocast_dtype(device)
    return x.dtype


def to_product_dtype(x: Tensor) -> Tensor:
    """Cast x to `product_dtype` once. Without this cast, autocast would cast x for each linear map that reads x."""
    return x.to(product_dtype(x))


def are_plain(*linears: nn.Module) -> bool:
    """Return whether linear maps consist of a weight and a bias alone. A map with a LoRA adapter of peft does not."""
    return all(isinstance(each, Linear) for each in linears)


def joint_linear(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """Apply several linear maps to one x (..., C). Training joins the maps into one matrix product.

    Args:
        x: Input (..., C).
        *linears: Linear maps, each with a bias.

    Returns:
        The outputs, each (..., out_features).
    """
    # Without a backward pass, joining the weights costs more time than the joint product saves.
    if not (torch.is_grad_enabled() and are_plain(*linears)):
        return tuple(each(x) for each in linears)
    weight, bias = side_by_side(*linears)
    result: tuple[Tensor, ...] = linear(x, weight.to(x.dtype), bias.to(x.dtype)).split(
        [each.out_features for each in linears], dim=-1
    )
    return result


def side_by_side(*linears: Linear) -> tuple[Tensor, Tensor]:
    """Concatenate the weights (outputs, inputs) and biases (outputs,) of several linear maps along their outputs."""
    return torch.cat([each.weight for each in linears]), torch.cat([each.bias for each in linears])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map x (..., in_features) to (..., out_features). In compiled code, PyTorch's kernel sums the bias gradient."""
    if bias is None or not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return y + broadcast_parameter(bias, y)


class Embedding(nn.Embedding):
    """nn.Embedding whose gradient is summed by PyTorch's kernel even in compiled code (`ops.common.spread`)."""

    def reset_parameters(self) -> None:
        """Fill the weight, except on the meta device."""
        # On the meta device there is no memory to fill, and PyTorch would spend 2 s on imports.
        if self.weight.device.type != "meta":
            super().reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up the embeddings (B, T, C) of token ids (B, T)."""
        return embedding(self.weight, tokens) if torch.compiler.is_compiling() else super().forward(tokens)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose gradient is summed by PyTorch's kernel even in compiled code (`ops.common.spread`)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., C) to (..., C)."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return y * broadcast_parameter(self.weight, y) + broadcast_parameter(self.bias, y)
