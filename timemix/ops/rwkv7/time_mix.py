"""The time-mix of RWKV-7 between its matrix products, in C. The file time_mix.c contains the formulas.

The C code supports products in float32 and bfloat16 on the CPU. `models/rwkv7/model.py` contains the same formulas in
PyTorch.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timemix.ops.common import fused
from timemix.ops.common.derivatives import once_differentiable
from timemix.ops.common.kernels import check_shapes, starts_and_scratch
from timemix.ops.rwkv7.compiled import ARRAYS, CHUNK, KERNELS, MOST


class Products(NamedTuple):
    """Outputs of matrix products without biases (B, T, C), in one dtype, float32 or bfloat16.

    Args:
        receptance: Receptances.
        key: Keys.
        value: Values.
        decay: Logits of the decay.
        rate: Logits of the in-context learning rate; None only in a model without the delta rule.
        residual: Logits of the share of the values of layer 0; None in layer 0.
        gate: Gates; None only in a model without gates.
    """

    receptance: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    rate: Tensor | None
    residual: Tensor | None
    gate: Tensor | None


class Vectors(NamedTuple):
    """Parameters of a time-mix, each with C numbers.

    Args:
        decay: Bias of the logits of the decay.
        rate: Bias of the logits of the in-context learning rate.
        residual: Bias of the logits of the share of the values of layer 0; None in layer 0.
        removal: Factors of the keys whose directions are removed from the state.
        replacement: Weight of the in-context learning rate in the factor of a key.
        bonus: Weight of the current token.
        norm_weight: Weight of the norm of each head.
        norm_bias: Bias of the norm of each head.
    """

    decay: Tensor
    rate: Tensor
    residual: Tensor | None
    removal: Tensor
    replacement: Tensor
    bonus: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def supports(x: Tensor, head_size: int) -> bool:
    """Return whether to use `time_mix` in a model.

    Args:
        x: A product (B, T, C).
        head_size: Number N of channels of a head.

    Returns:
        False if the C code does not support the product or is slower than PyTorch.
    """
    return head_size <= MOST and fused.serves(x) and KERNELS.compiles()


def time_mix(
    products: Products,
    vectors: Vectors,
    first: Tensor | None,
    state: Tensor,
    eps: float,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the input of the output product of a time-mix.

    Stored for the backward pass are the arguments, and the state before every 16 tokens.

    Args:
        products: Outputs of the matrix products (B, T, C).
        vectors: Parameters (C,).
        first: Values of layer 0 (B, T, C), float32; None in layer 0.
        state: State before these tokens (B, H, values N, keys N), float32. It is not changed, and gets a gradient.
        eps: Constant that the norm of each head adds to the variance.
        resets: Whether to set the state to zero before each token (B, T) bool; None for never.

    Returns:
        The input of the output product (B, T, C), in the dtype of the products, and the state after these tokens.

    Raises:
        ValueError: `first`, `state` or `resets` has another shape, or `resets` is not bool.
    """
    (B, T, C), N = products.key.shape, state.shape[-1]
    others = {"first": (first, (B, T, C)), "state": (state, (B, C // N, N, N)), "resets": (resets, (B, T))}
    check_shapes("key", products.key, others)
    apply: Any = _TimeMix.apply
    given = (each if each is None else each.contiguous() for each in products)
    numbers = (each if each is None else each.float().flatten().contiguous() for each in vectors)
    optional = (each if each is None else each.contiguous() for each in (first, resets))
    # PyTorch runs the forward pass of a function without gradients, so `torch.is_grad_enabled` is False inside it.
    y, end = apply(torch.is_grad_enabled(), eps, state, *optional, *given, *numbers)
    return y, end


class _Inputs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "BTHN"),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (*Products._fields, "first", "resets")),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (*Products._fields, "first")]


class _Vectors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in Vectors._fields]


def _type(x: Tensor) -> ctypes.c_int64:
    """Return the index of a dtype in `enum type` (ops/common/types.h)."""
    return ctypes.c_int64((torch.float32, torch.bfloat16).index(x.dtype))


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if each is None else each.data_ptr() for each in tensors]


def _inputs(eps: float, state: Tensor, first: Tensor | None, resets: Tensor | None, products: Products) -> _Inputs:
    B, H, N, _ = state.shape
    return _Inputs(B, products.key.shape[1], H, N, eps, *_addresses(*products, first, resets))


class _TimeMix(torch.autograd.Function):
    """Autograd function for the kernels of time_mix.c."""

    @staticmethod
    def forward(
        ctx: Any,
        is_training: bool,
        eps: float,
        state: Tensor,
        first: Tensor | None,
        resets: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor]:
        products, vectors = Products(*tensors[:7]), Vectors(*tensors[7:])
        # The C code updates the state in place, so it gets a copy.
        y, end = torch.empty_like(products.key), state.clone(memory_format=torch.contiguous_format)
        starts, scratch = starts_and_scratch(end, y.shape[1], CHUNK, ARRAYS)
        kept = starts if is_training and any(ctx.needs_input_grad) else None
        given = _inputs(eps, end, first, resets, products), _Vectors(*_addresses(*vectors))
        KERNELS.call("timemix_time_mix", _type(y), *given, end, y, kept, scratch)
        ctx.eps = eps
        ctx.save_for_backward(first, resets, *tensors, kept)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        first, resets, *tensors, starts = ctx.saved_tensors
        products, vectors = Products(*tensors[:7]), Vectors(*tensors[7:])
        gradients = [None if x is None else torch.empty_like(x) for x in (*products, first)]
        # Sums over the tokens of each sequence: (B, C)
        sums = [None if x is None else x.new_zeros(len(dy), len(x)) for x in vectors]
        d_state = d_end.clone(memory_format=torch.contiguous_format)
        _, scratch = starts_and_scratch(d_state, 0, CHUNK, ARRAYS)
        given = _inputs(ctx.eps, d_state, first, resets, products), _Vectors(*_addresses(*vectors))
        found = _Gradients(*_addresses(*gradients)), _Vectors(*_addresses(*sums))
        KERNELS.call("timemix_time_mix_back", _type(dy), *given, starts, dy.contiguous(), d_state, *found, scratch)
        return None, None, d_state, gradients.pop(), None, *gradients, *(None if x is None else x.sum(0) for x in sums)
