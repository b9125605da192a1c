"""wkv7 in C, token by token, forward and backward. The file wkv7.c contains the formulas.

The C code supports float32 on the CPU. It requires a C compiler.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timemix.ops.common.derivatives import once_differentiable
from timemix.ops.common.kernels import Kernels, starts_and_scratch

CHUNK = 16
"""Number of tokens from one stored state to the next."""

MOST = 256
"""Largest head size N."""

ARRAYS = 12 * CHUNK + 12
"""Number of vectors of a head in the memory of a thread."""

FLAGS = ("-fno-finite-math-only", "-fno-associative-math", f"-DCHUNK={CHUNK}", f"-DARRAYS={ARRAYS}", f"-DMOST={MOST}")
"""Flags of the compiler. -fno-finite-math-only preserves NaN, because a NaN shows that a run diverged.
-fno-associative-math preserves the accuracy of small decays, see wkv7.c."""


# The file time_mix.c includes wkv7.c.
KERNELS = Kernels(Path(__file__).with_name("time_mix.c"), *FLAGS, most=MOST)
"""The C code of wkv7."""


def compiled_wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute wkv7 in C. Inputs and the state before every `CHUNK` tokens are stored for the backward pass.

    Args:
        r: Receptances (B, T, H, N), float32.
        w: Log-decays (B, T, H, N), at most 0.
        k: Keys (B, T, H, N).
        v: Values (B, T, H, N).
        a: Vectors that read the previous state by the product S a (B, T, H, N).
        b: Vectors along which S a is added to the state (B, T, H, N).
        state: State S before these tokens, of shape (B, H, values N, keys N).
        resets: Whether to set S to zero before each token (B, T); None for never.

    Returns:
        y (B, T, H, N), and the state after these tokens.
    """
    apply: Any = _Compiled.apply
    # PyTorch runs the forward pass of a function without gradients, so `torch.is_grad_enabled` is False inside it.
    y, end = apply(torch.is_grad_enabled(), state, resets, *(x.contiguous() for x in (r, w, k, v, a, b)))
    return y, end


class _Inputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "BTHN"] + [(name, ctypes.c_void_p) for name in (*"rwkvab", "resets")]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "rwkvab"]


def _inputs(inputs: tuple[Tensor, ...], resets: Tensor | None) -> _Inputs:
    address = None if resets is None else resets.data_ptr()
    return _Inputs(*inputs[0].shape, *(x.data_ptr() for x in inputs), address)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, is_training: bool, state: Tensor, resets: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        resets = None if resets is None else resets.contiguous()
        # The C code updates the state in place, so it gets a copy.
        y, end = torch.empty_like(inputs[0]), state.clone(memory_format=torch.contiguous_format)
        starts, scratch = starts_and_scratch(end, y.shape[1], CHUNK, ARRAYS)
        kept = starts if is_training and any(ctx.needs_input_grad) else None
        KERNELS.call("timemix_wkv7", _inputs(inputs, resets), end, y, kept, scratch)
        ctx.save_for_backward(*inputs, kept, resets)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, starts, resets = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        d_state = d_end.clone(memory_format=torch.contiguous_format)
        _, scratch = starts_and_scratch(d_state, 0, CHUNK, ARRAYS)
        addresses = _Gradients(*(x.data_ptr() for x in gradients))
        given = _inputs(tuple(inputs), resets)
        KERNELS.call("timemix_wkv7_back", given, starts, dy.contiguous(), d_state, addresses, scratch)
        return None, d_state, None, *gradients
