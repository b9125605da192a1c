"""The choice of the device and of the precision of a run."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

from timemix.errors import Unavailable


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """Choose the precision of matrix products.

    Args:
        precision: Name of a precision, or "auto" for bfloat16 on a device with bfloat16 instructions, else float32.
        device: Device of the matrix products.

    Returns:
        The precision, and the reason for the choice.
    """
    if precision != "auto":
        return precision, "asked for"
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older PyTorch versions report no capabilities. Without bfloat16 instructions, bfloat16 is slower than float32.
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        has_it = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    if has_it:
        return "bfloat16", f"the {device.type} has bfloat16 instructions"
    return "float32", f"the {device.type} has no bfloat16 instructions"


def choose_device(device: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Choose the device of a process.

    Args:
        device: Name of a PyTorch device, or "auto" for a CUDA device if the machine has one, else the CPU.
        local_rank: Rank of the process on its machine, which is the index of the CUDA device for "auto".

    Returns:
        The device, and the reason for the choice.

    Raises:
        Unavailable: The device does not exist in PyTorch or on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank), "there is a CUDA device"
        return torch.device("cpu"), "there is no CUDA device"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise Unavailable(
            f"device {device!r} cannot be used: PyTorch does not know it; use auto, cpu, cuda or cuda:1"
        ) from error
    try:
        torch.zeros(1, device=found).item()
    except NotImplementedError as error:
        raise Unavailable(
            f"device {device!r} cannot be used: this PyTorch was built without {found.type}; use auto or cpu"
        ) from error
    except (RuntimeError, AssertionError, ImportError) as error:
        # PyTorch's message lists every backend after the first sentence.
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise Unavailable(f"device {device!r} cannot be used: {reason}; use auto or cpu") from error
    return found, "asked for"


_recording = ContextVar("recording", default=False)


def is_recording() -> bool:
    """Return whether a CUDA graph is being recorded in this thread. Meanwhile, code must not read the device."""
    return _recording.get()


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Make `is_recording` true in the `with` block."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that a function launches.

    Args:
        work: Function that reads and writes tensors of a CUDA device, the same tensors in each call. `work` runs once
            before the recording, to load the libraries of its kernels. The recording does not run the kernels.

    Returns:
        Function that runs the recorded kernels on the same tensors, by a single launch.
    """
    with recording():
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), recording():
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context that runs matrix products in bfloat16 if `precision` is "bfloat16", else changes nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
