"""wkv4 in C, token by token, forward and backward. The file wkv4.c contains the formulas.

The C code supports float32 on the CPU. It requires a C compiler.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timemix.ops.common.derivatives import once_differentiable
from timemix.ops.common.kernels import Kernels

CHUNK = 16
"""Number of tokens from one stored state to the next."""

FLAGS = ("-fno-finite-math-only", "-fno-associative-math", f"-DCHUNK={CHUNK}")
"""Flags of the compiler. -fno-finite-math-only preserves NaN, because a NaN shows that a run diverged.
-fno-associative-math preserves the accuracy of small decays, see wkv4.c."""


KERNELS = Kernels(Path(__file__).with_name("wkv4.c"), *FLAGS)
"""The C code of wkv4."""


def compiled_wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    lengths: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute wkv4 in C. Inputs and the state before every `CHUNK` tokens are stored for the backward pass.

    Args:
        w: Log-decay (C,), at most 0, float32.
        u: Bonus of the current token (C,).
        k: Keys (B, T, C).
        v: Values (B, T, C).
        state: State (a, b, p) before these tokens, of shape (B, 3, C).
        lengths: Number of valid tokens in each row (B,).
        resets: Whether to forget all previous tokens before each token (B, T); None for never.

    Returns:
        y (B, T, C), and the state after the valid tokens.
    """
    apply: Any = _Compiled.apply
    # PyTorch runs the forward pass of a function without gradients, so `torch.is_grad_enabled` is False inside it.
    y, end = apply(torch.is_grad_enabled(), state, lengths, resets, *(x.contiguous() for x in (w, u, k, v)))
    return y, end


class _Inputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "BTC"] + [
        (name, ctypes.c_void_p) for name in (*"wukv", "lengths", "resets")
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "kvwu"]


def _inputs(inputs: tuple[Tensor, ...], lengths: Tensor, resets: Tensor | None) -> _Inputs:
    address = None if resets is None else resets.data_ptr()
    return _Inputs(*inputs[2].shape, *(x.data_ptr() for x in inputs), lengths.data_ptr(), address)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, is_training: bool, state: Tensor, lengths: Tensor, resets: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        k = inputs[2]
        lengths, resets = lengths.long().contiguous(), None if resets is None else resets.contiguous()
        # The C code updates the state in place, so it gets a copy.
        y, end = torch.empty_like(k), state.clone(memory_format=torch.contiguous_format)
        B, T, C = k.shape
        is_kept = is_training and any(ctx.needs_input_grad)
        starts = k.new_empty(B, -(-T // CHUNK), 3, C) if is_kept else None
        KERNELS.call("timemix_wkv4", _inputs(inputs, lengths, resets), end, y, starts)
        ctx.save_for_backward(*inputs, starts, lengths, resets)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, starts, lengths, resets = ctx.saved_tensors
        w, _, k, v = inputs
        dk, dv, dw, du = (
            torch.empty_like(k),
            torch.empty_like(v),
            w.new_empty(len(k), len(w)),
            w.new_empty(len(k), len(w)),
        )
        d_state = d_end.clone(memory_format=torch.contiguous_format)
        addresses = _Gradients(*(x.data_ptr() for x in (dk, dv, dw, du)))
        given = _inputs(tuple(inputs), lengths, resets)
        KERNELS.call("timemix_wkv4_back", given, starts, dy.contiguous(), d_state, addresses)
        return None, d_state, None, None, dw.sum(0), du.sum(0), dk, dv
