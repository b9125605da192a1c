"""Properties of this machine: speed of matrix products and memory, sizes of memory and caches, processor name."""

import contextlib
import ctypes
import functools
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor


def keep_freed_memory() -> None:
    """Keep memory that tensors free within this process, instead of returning it to the system at once.

    Otherwise every large tensor gets fresh pages, and each page costs a page fault: 94,000 for each training step of
    `seed` size, a quarter of its time. For programs that train; the setting lasts as long as the process. It has an
    effect on Linux with glibc only.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@functools.cache
def matrix_product_peak(precision: str, device: torch.device) -> float:
    """Measure the speed of square matrix products, in about 0.1 s, once in a process.

    Args:
        precision: Name of a dtype: "float32", "bfloat16" or "float64".
        device: The device.

    Returns:
        Floating-point operations per second.
    """
    size = 8192 if device.type == "cuda" else 1024
    # Random numbers: products of ones or zeros use less power, so a GPU computes them faster than real data.
    a, b = torch.rand(2, size, size, dtype=getattr(torch, precision), device=device).unbind()
    return 2 * size**3 / _fastest(lambda: a @ b, device)


def _fastest(call: Callable[[], object], device: torch.device, seconds: float = 0.1) -> float:
    """Return the seconds of the fastest, least disturbed call among those that fit into `seconds`."""
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


@functools.cache
def memory_bandwidth(device: torch.device) -> float:
    """Measure the memory bandwidth in about 0.1 s, once in a process, by a sum over more numbers than the caches hold.

    Args:
        device: The device.

    Returns:
        Bytes per second.
    """
    numbers: Tensor = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    return numbers.numel() * numbers.element_size() / _fastest(numbers.sum, device)


def resident_memory() -> int:
    """Return the bytes of this process that are resident in memory."""
    return psutil.Process().memory_info().rss


def address_space() -> int:
    """Return the bytes of address space that this process has reserved, which RLIMIT_AS limits."""
    return psutil.Process().memory_info().vms


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes: allocated on a GPU, else resident; None if unavailable.

    On Linux it is VmHWM, which psutil does not report. ru_maxrss is used on macOS only: on Linux it begins with the
    memory of the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next((int(value.split()[0]) * 1024 for value in _fields("/proc/self/status", "VmHWM")), None)


def processor_name() -> str:
    """Return the model name of the processor, which psutil does not report, and `platform` not on Linux."""
    return next(iter(_fields("/proc/cpuinfo", "model name")), platform.processor() or platform.machine())


def _fields(path: str, name: str) -> list[str]:
    """Return the values of all lines `name: value` in a file of the kernel; an empty list without such a file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name]


def largest_cache() -> int | None:
    """Return the bytes of the largest cache of a processor; None if unavailable."""
    # psutil reports no caches.
    units = {"K": 2**10, "M": 2**20}
    try:
        sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size[:-1]) * units[size[-1]] for size in sizes)
    except (OSError, ValueError, KeyError):
        return None
