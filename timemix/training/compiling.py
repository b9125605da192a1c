"""The decision to use torch.compile in a run, and the compiled model."""

import os
import shutil
from typing import cast

import torch
from torch import nn

from timemix.errors import InvalidValue

COMPILE_FROM = 2e13
"""Least number of floating-point operations of a run for which compiling saves time on a CPU.

Two cores need about 100 s for 2e13 operations, and compiling takes 10 to 40 s.
"""

COMPILE_FROM_ON_A_GPU = 3e15
"""Least number of floating-point operations of a run for which compiling saves time on a GPU.

On an H200, compiling takes 40 s and saves 25 ms in a step of 1.8e12 operations.
"""


def choose_compile(
    asked: str,
    flops: float,
    device: torch.device,
    processes: int = 1,
    *,
    fused: bool = False,
    ragged: bool = False,
) -> tuple[bool, str]:
    """Return whether to compile the model of a run, and the reason as text.

    The decision depends only on the arguments and the C++ compiler, so a resumed run gets the same decision.

    Args:
        asked: Value of `train.compile`: "auto", "on" or "off".
        flops: Floating-point operations of the whole run.
        device: Device of the model.
        processes: Number of processes of the run.
        fused: Whether C code computes the recurrence of the model (`Block.runs_in_c`).
        ragged: Whether the model computes rows of many lengths, each of which would be compiled.

    Raises:
        InvalidValue: `asked` is "on" and the model cannot be compiled.
    """
    hindrance = None
    if processes > 1:
        hindrance = "compiling supports one process only"
    elif ragged:
        hindrance = "the lengths of the documents vary (data.cross_documents is False)"
    elif device.type == "cpu" and cpp_compiler() is None:
        hindrance = "no C++ compiler is installed"
    if asked == "on":
        if hindrance:
            raise InvalidValue(f"train.compile is 'on', but {hindrance}; leave train.compile out")
        return True, "asked for"
    if asked == "off":
        return False, "asked for"
    if hindrance:
        return False, hindrance
    if fused:
        return False, "compiling would replace the model's own C code"
    if flops < (COMPILE_FROM_ON_A_GPU if device.type == "cuda" else COMPILE_FROM):
        return False, "the run is too short for compiling to save time"
    return True, "the run is long enough for compiling to save time"


def compiled_model(model: nn.Module, device: torch.device, accumulation: int = 1) -> nn.Module:
    """Return a model compiled for batches of one shape.

    On a GPU, the forward and backward passes become CUDA graphs. Without CUDA graphs, launching the kernels of a model
    with 17 M parameters takes nearly three times as long as running the kernels. The gradients lie in memory of the
    CUDA graphs, and the next backward pass overwrites this memory. Gradient accumulation therefore needs compiled code
    without CUDA graphs.

    Args:
        model: The model, which shares its parameters with the compiled model.
        device: Device of the model.
        accumulation: Number of pieces of a batch whose gradients are summed.

    Returns:
        A compiled module with the same parameters as `model`.
    """
    graphs = device.type == "cuda" and accumulation == 1
    return cast(nn.Module, torch.compile(model, dynamic=False, mode="reduce-overhead" if graphs else None))


def cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that torch.compile calls, or None if no compiler is installed."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)
