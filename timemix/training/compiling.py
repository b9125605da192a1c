"""Whether torch.compile pays for a run, and the compiled form of a model."""

import os
import shutil
from typing import cast

import torch
from torch import nn

from timemix.errors import InvalidValue

COMPILE_FROM = 2e13
"""Floating-point operations of a run from which compiling pays: some 100 s on two cores, where it takes 10 to 40 s."""

COMPILE_FROM_ON_A_GPU = 3e15
"""The same on a GPU: an H200 saves 25 ms in a step of 1.8e12 operations, and compiling takes 40 s."""


def choose_compile(
    asked: str, flops: float, device: torch.device, processes: int = 1, *, fused: bool = False
) -> tuple[bool, str]:
    """Whether to compile the model of a run of so many operations, and the reason. The same for the same run.

    `fused`: `ops.common.fused` has the whole of it, and compiled code is no faster (benchmarks/RESULTS.md).

    Raises InvalidValue where it is asked for and cannot be done.
    """
    hindrance = None
    if processes > 1:
        hindrance = "it is for one process"
    elif device.type == "cpu" and cpp_compiler() is None:
        hindrance = "no C++ compiler was found"
    if asked == "on":
        if hindrance:
            raise InvalidValue(f"train.compile is 'on', but {hindrance}; leave it out")
        return True, "asked for"
    if asked == "off":
        return False, "asked for"
    if hindrance:
        return False, hindrance
    if fused:
        return False, "its own C code is as fast"
    if flops < (COMPILE_FROM_ON_A_GPU if device.type == "cuda" else COMPILE_FROM):
        return False, "the run is too short to gain by it"
    return True, "the run is long enough to gain by it"


def compiled_model(model: nn.Module, device: torch.device, accumulation: int = 1) -> nn.Module:
    """Return a model compiled for batches of one shape.

    On a GPU forward and backward are CUDA graphs: at 17 M parameters the launches of kernels one by one take nearly
    three times as long as the kernels. Gradients lie in the graphs' memory, which the next backward overwrites, so
    accumulated ones need a form without graphs.

    Args:
        model: The model; its parameters are shared.
        device: The device that it is on.
        accumulation: Pieces of a batch whose gradients add up.

    Returns:
        A module with the same parameters.
    """
    graphs = device.type == "cuda" and accumulation == 1
    return cast(nn.Module, torch.compile(model, dynamic=False, mode="reduce-overhead" if graphs else None))


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would call, None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)
