"""torch.compile: the decision whether it saves time in a run, and the compiled model."""

import os
import shutil
from typing import cast

import torch
from torch import nn

from timemix.errors import InvalidValue

COMPILE_FROM = 2e13
"""Floating-point operations of a run from which compiling saves time on a CPU.

Two cores need about 100 s for them, and compiling takes 10 to 40 s.
"""

COMPILE_FROM_ON_A_GPU = 3e15
"""Floating-point operations of a run from which compiling saves time on a GPU.

On an H200, compiling takes 40 s and saves 25 ms in a step of 1.8e12 operations.
"""


def choose_compile(
    asked: str, flops: float, device: torch.device, processes: int = 1, *, fused: bool = False
) -> tuple[bool, str]:
    """Return whether to compile the model of a run, and the reason in words.

    The decision depends on the arguments and the C++ compiler alone, so a resumed run decides as before.

    Args:
        asked: `train.compile`: "auto", "on" or "off".
        flops: Floating-point operations of the whole run.
        device: Device of the model.
        processes: Number of processes of the run.
        fused: Whether `ops.common.fused` runs the whole model. Compiled code is no faster then (docs/performance.md).

    Raises:
        InvalidValue: `asked` is "on" and the model cannot be compiled.
    """
    hindrance = None
    if processes > 1:
        hindrance = "it supports one process only"
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
        return False, "its own C code is as fast"
    if flops < (COMPILE_FROM_ON_A_GPU if device.type == "cuda" else COMPILE_FROM):
        return False, "the run is too short to save time by it"
    return True, "the run is long enough to save time by it"


def compiled_model(model: nn.Module, device: torch.device, accumulation: int = 1) -> nn.Module:
    """Return a model compiled for batches of one shape.

    On a GPU, forward and backward become CUDA graphs. Without graphs, at 17 M parameters, launching the kernels takes
    nearly three times as long as running them. Gradients lie in memory of the graphs, which the next backward
    overwrites. Accumulated gradients therefore need compiled code without graphs.

    Args:
        model: The model; its parameters are shared.
        device: Device of the model.
        accumulation: Number of pieces of a batch whose gradients are summed.

    Returns:
        A module with the same parameters.
    """
    graphs = device.type == "cuda" and accumulation == 1
    return cast(nn.Module, torch.compile(model, dynamic=False, mode="reduce-overhead" if graphs else None))


def cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that torch.compile calls, None if none is installed."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)
