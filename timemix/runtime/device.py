"""Number formats of the matrix products, and how `auto` chooses."""

import contextlib

import torch

from timemix.errors import Unavailable


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """Return the precision that `precision` stands for on a device, and the reason."""
    if precision != "auto":
        return precision, "asked for"
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older torch cannot tell; without native instructions bfloat16 is slower than float32.
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        has_it = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    if has_it:
        return "bfloat16", f"the {device.type} has bfloat16 instructions"
    return "float32", f"the {device.type} has no bfloat16 instructions"


def choose_device(device: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """Return the device that `device` stands for in a process of a machine, and the reason.

    Raises Unavailable for a device that torch does not know or this machine does not have.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank), "there is a CUDA device"
        return torch.device("cpu"), "there is no CUDA device"
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise Unavailable(
            f"device {device!r} cannot be used: it is no device of PyTorch; use auto, cpu, cuda or cuda:1"
        ) from error
    try:
        torch.zeros(1, device=found).item()
    except NotImplementedError as error:
        raise Unavailable(
            f"device {device!r} cannot be used: this PyTorch was built without {found.type}; use auto or cpu"
        ) from error
    except (RuntimeError, AssertionError, ImportError) as error:
        # What follows the first sentence lists every backend.
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise Unavailable(f"device {device!r} cannot be used: {reason}; use auto or cpu") from error
    return found, "asked for"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Matrix products in bfloat16 where the precision says so; nothing else changes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
