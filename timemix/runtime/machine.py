"""What this machine gives: its speed, its memory, a compiler, and how to keep what it gave."""

import contextlib
import ctypes
import functools
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor


def keep_freed_memory() -> None:
    """Keeps memory that tensors free within this process, rather than give it back to the system at once.

    Every large tensor would else be given fresh pages, each a page fault: 94,000 a training step of `seed` size, a
    quarter of its time. For programs that train; it lasts as long as the process. Linux with glibc; elsewhere nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def free_memory(device: torch.device) -> int | None:
    """Bytes of memory free on a device, None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


@functools.cache
def matrix_product_peak(precision: str, device: torch.device) -> float:
    """Floating-point operations per second of square matrix products, measured in about 0.1 s, once in a process."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.ones(2, size, size, dtype=getattr(torch, precision), device=device).unbind()
    return 2 * size**3 / _fastest(lambda: a @ b, device)


def _fastest(call, device: torch.device, seconds: float = 0.1) -> float:
    """Seconds of the fastest of the calls that fit into some time: the least disturbed."""
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
    """Bytes per second that a sum over more numbers than the caches hold reads from memory; measured in about 0.1 s."""
    numbers: Tensor = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    return numbers.numel() * numbers.element_size() / _fastest(numbers.sum, device)


def peak_memory(device: torch.device) -> int | None:
    """Most memory of this process so far in bytes: allocated on a GPU, else resident; None where no one tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def largest_cache() -> int | None:
    """Bytes of the largest cache of a processor, None where the system does not tell."""
    units = {"K": 2**10, "M": 2**20}
    try:
        sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size[:-1]) * units[size[-1]] for size in sizes)
    except (OSError, ValueError, KeyError):
        return None


def process_memory(name: str) -> int | None:
    """Bytes of a line of /proc/self/status, None where there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
