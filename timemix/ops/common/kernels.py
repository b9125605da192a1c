"""C code that computes a recurrence in float32 on the CPU, and the choice between it and other backends."""

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timemix.ops.common import library as packages
from timemix.runtime import native
from timemix.runtime.device import autocast

FEW_TOKENS = 4
"""Number of tokens up to which "auto" chooses "reference" instead of "chunked"."""


class Kernels:
    """The C code of a recurrence. The code is compiled on first use, and not used in code that torch.compile compiles.

    Args:
        source: The C file.
        *flags: Flags of the compiler for this file.
        most: Largest head size N; None if the recurrence has no heads.

    Attributes:
        flags: Flags of the compiler for this file.
    """

    def __init__(self, source: Path, *flags: str, most: int | None = None) -> None:
        self._source, self.flags, self._most = source, flags, most

    def library(self) -> tuple[ctypes.CDLL | None, str]:
        """Compile and load the code.

        Returns:
            The library and the compiler, or None and the reason why the code cannot be compiled or loaded.
        """
        return native.library(self._source, *self.flags)

    def compiles(self) -> bool:
        """Return whether the C code can be compiled and loaded.

        Returns:
            False if there is no C compiler, or compiling or loading failed.
        """
        return self.library()[0] is not None

    def hindrance(self, x: Tensor) -> str | None:
        """Return the reason why the C code cannot compute the recurrence.

        Args:
            x: An input of the recurrence (..., N), in the dtype of the computation.

        Returns:
            The reason; None if the C code can compute the recurrence.
        """
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"the C code needs float32 on the cpu, not {str(x.dtype).removeprefix('torch.')} on {x.device.type}"
        if self._most is not None and x.shape[-1] > self._most:
            return f"the C code needs a head size of at most {self._most}"
        if torch.compiler.is_compiling():
            return "torch.compile cannot compile calls of C code"
        code, reason = self.library()
        return None if code else reason

    def call(self, name: str, *arguments: Any) -> None:
        """Call a C function with the number of threads and further arguments.

        Args:
            name: Name of the function.
            *arguments: Contiguous tensors and structures, passed by address; None, passed as NULL; numbers of ctypes.
        """
        code, _ = self.library()
        assert code is not None
        getattr(code, name)(ctypes.c_int64(torch.get_num_threads()), *map(native.passed, arguments))


def starts_and_scratch(state: Tensor, tokens: int, chunk: int, arrays: int) -> tuple[Tensor, Tensor]:
    """Allocate memory for a recurrence whose state is a matrix per head (heads.h).

    Args:
        state: State (B, H, N, N), float32.
        tokens: Number T of tokens.
        chunk: Number of tokens from one stored state to the next, CHUNK in C.
        arrays: Number of vectors of a head in the memory of a thread, ARRAYS in C.

    Returns:
        The state before every `chunk` tokens, to be stored for the backward pass, and memory for each thread, SCRATCH
        in C.
    """
    B, H, N, _ = state.shape
    padded = -(-N // 16) * 16
    starts = state.new_empty(B, H, -(-tokens // chunk), N, padded)
    scratch = state.new_empty(torch.get_num_threads(), (arrays + (chunk + 2) * N) * padded)
    return starts, scratch


def choose(
    backend: str, x: Tensor, hindrances: Mapping[str, Callable[[], str | None]], chunked: str
) -> tuple[str, str]:
    """Choose the backend of a recurrence.

    Args:
        backend: "auto", "reference", "chunked" or a name in `hindrances`.
        x: An input of the recurrence (B, T, ...), in the dtype of the computation.
        hindrances: For each backend that needs more than PyTorch, such as "c" and "fla", a function that returns the
            reason why the backend cannot run; None if it can run.
        chunked: Reason to choose "chunked".

    Returns:
        The name of the backend, and the reason for the choice.

    Raises:
        ValueError: The backend is unknown or cannot run.
    """
    if backend == "auto":
        if hindrances["c"]() is None:
            return "c", "the C code supports the dtype and the device"
        if x.shape[1] <= FEW_TOKENS:
            return "reference", f"a loop over at most {FEW_TOKENS} tokens"
        # The kernels of fla compute in bfloat16, so "auto" chooses them only where autocast lowers the precision.
        lower = x.device.type in packages.DEVICES and torch.is_autocast_enabled(x.device.type)
        if lower and "fla" in hindrances and hindrances["fla"]() is None:
            return "fla", "the package flash-linear-attention supports the dtype and the device"
        return "chunked", chunked
    known = ("reference", "chunked", *hindrances)
    if backend not in known:
        raise ValueError(f"backend={backend!r} is not supported; choose auto, {', '.join(known)}")
    reason = hindrances[backend]() if backend in hindrances else None
    if reason is not None:
        raise ValueError(f"{backend=} is not available: {reason}; choose auto")
    return backend, "asked for"


def check_shapes(name: str, x: Tensor, others: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Check the shapes of the arguments of a recurrence.

    Args:
        name: Name of the argument that gives the sizes, for the message.
        x: The argument that gives the sizes.
        others: Each other argument by name, with the shape that it must have; None is not checked.

    Raises:
        ValueError: An argument has another shape, or `resets` is not bool.
    """
    for other, (given, shape) in others.items():
        if given is not None and given.shape != shape:
            raise ValueError(
                f"{other} has shape {tuple(given.shape)}; with {name} of shape {tuple(x.shape)} it must be {shape}"
            )
    resets, _ = others.get("resets", (None, ()))
    # The C code reads one byte for each token.
    if resets is not None and resets.dtype != torch.bool:
        raise ValueError(f"resets is {resets.dtype}; it must be torch.bool")


def chosen(
    choose_backend: Callable[[str, Tensor, Tensor | None], tuple[str, str]],
    shape: tuple[int, ...],
    precision: str,
    device: torch.device,
    resets: bool,
) -> str:
    """Choose the backend of a recurrence in training, for the log.

    Args:
        choose_backend: Function that chooses from "auto", an input of the recurrence, and its resets (B, T) or None.
        shape: Shape (B, T, ...) of the input.
        precision: Precision of matrix products, such as "bfloat16".
        device: Device of the model.
        resets: Whether the state is reset at the first token of each document.

    Returns:
        The name of the backend, and the reason in parentheses.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    # An expanded tensor has a shape, but no memory.
    x = torch.empty(1, dtype=dtype, device=device).expand(shape)
    firsts = torch.empty(1, dtype=torch.bool, device=device).expand(shape[:2]) if resets else None
    with autocast(precision, device):
        return "{} ({})".format(*choose_backend("auto", x, firsts))
