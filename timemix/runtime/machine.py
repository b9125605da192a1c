"""Properties of this machine: speed of matrix products, memory bandwidth, memory and cache sizes, processor name."""

import contextlib
import ctypes
import functools
import mmap
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor


def keep_freed_memory() -> None:
    """Reuse the memory of freed tensors in this process, instead of returning the memory to the system at once.

    Without this setting, every large tensor gets new pages, and each new page costs a page fault. A training step of a
    model of `seed` size then has 94,000 page faults, which take a quarter of the step's time. Training programs call
    this function. The setting lasts until the process ends, and has an effect only on Linux with glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def huge_pages(size: int) -> Tensor:
    """Return memory that begins with zeros, in huge pages if the system has them.

    A processor looks up the address of each page. With 4 KiB pages, these look-ups slow down the reading of memory.

    Args:
        size: Number of bytes. Memory that is never written takes no space.

    Returns:
        The memory (size,) uint8.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def ones_in_huge_pages(count: int) -> Tensor:
    """Return ones (count,) float32, whose sum needs the time to read the memory."""
    return huge_pages(4 * count).view(torch.float32).fill_(1)


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@functools.cache
def matrix_product_peak(precision: str, device: torch.device) -> float:
    """Measure the speed of square matrix products in about 0.1 s. The result is cached in the process.

    Args:
        precision: Name of a dtype: "float32", "bfloat16" or "float64".
        device: The device.

    Returns:
        Floating-point operations per second.
    """
    size = 8192 if device.type == "cuda" else 1024
    # The matrices are random. With ones or zeros, a GPU uses less power and is faster than with real data.
    a, b = torch.rand(2, size, size, dtype=getattr(torch, precision), device=device).unbind()
    return 2 * size**3 / _fastest(lambda: a @ b, device)


def _fastest(call: Callable[[], object], device: torch.device, seconds: float = 0.1) -> float:
    """Call a function repeatedly for `seconds`, and return the time of the fastest call in seconds."""
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
    """Measure the memory bandwidth in about 0.1 s, by summing more numbers than the caches hold.

    The result is cached in the process.

    Args:
        device: The device.

    Returns:
        Bytes per second.
    """
    numbers: Tensor = torch.ones(2**28, device=device) if device.type == "cuda" else ones_in_huge_pages(2**26)
    return numbers.numel() * numbers.element_size() / _fastest(numbers.sum, device)


def resident_memory() -> int:
    """Return the resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def address_space() -> int:
    """Return the size of the address space of this process in bytes, which RLIMIT_AS limits."""
    return psutil.Process().memory_info().vms


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes, allocated on a GPU or resident on a CPU; None if unavailable.

    On Linux, the peak is VmHWM, which psutil does not report. On macOS, the peak is ru_maxrss. On Linux, ru_maxrss is
    wrong, because it starts at the memory of the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next((int(value.split()[0]) * 1024 for value in _fields("/proc/self/status", "VmHWM")), None)


def processor_name() -> str:
    """Return the model name of the processor from /proc/cpuinfo, or from `platform` if that file is unavailable."""
    return next(iter(_fields("/proc/cpuinfo", "model name")), platform.processor() or platform.machine())


def _fields(path: str, name: str) -> list[str]:
    """Return the values of all lines `name: value` in a file of the kernel, or an empty list without the file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name]


def largest_cache() -> int | None:
    """Return the size of the largest cache of a processor in bytes; None if unavailable."""
    # psutil does not report cache sizes.
    units = {"K": 2**10, "M": 2**20}
    try:
        sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size[:-1]) * units[size[-1]] for size in sizes)
    except (OSError, ValueError, KeyError):
        return None
