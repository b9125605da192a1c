"""Whether torch.compile pays for a run."""

import os
import shutil

import torch

from timemix.errors import InvalidValue

COMPILE_FROM = 2e13
"""Floating-point operations of a run from which compiling pays: some 100 s on two cores, where it takes 10 to 40 s."""


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
    if flops < COMPILE_FROM:
        return False, "the run is too short to gain by it"
    return True, "the run is long enough to gain by it"


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would call, None where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)
