"""OpenMP threads that leave processors to other processes.

OpenMP threads wait for one another many times in a training step. By default, waiting threads spin. Spinning is fast on
an idle machine. If another process also computes, spinning is slow, because a spinning thread occupies a processor that
working threads need. Two threads then train 3 to 60 times slower than one thread.

GNU's OpenMP library, which PyTorch uses on Linux, lets waiting threads sleep if it manages more threads than there are
processors. So while other processes need the processors, this module keeps a team of idle OpenMP threads. PyTorch's
number of threads stays the same, so its results stay bit-identical.

If OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, that variable controls how threads wait, and this module does nothing.
"""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

from timemix.runtime.processes import cores

INTERVAL = 0.25
"""Minimum time between two measurements of the load, in seconds."""

TOLERANCE = 0.25
"""Number of processors that other processes may use before threads sleep. An idle system uses fewer processors."""


class Load:
    """The load by other processes, which decides whether waiting OpenMP threads spin or sleep.

    Args:
        processors: Number of processors that this process may use.
    """

    def __init__(self, processors: int) -> None:
        self.processors = processors
        # The OpenMP library reads the environment only once, when the library is loaded.
        self._may_choose = sys.platform == "linux" and not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
        self._free = float(processors)
        self._lock = threading.Lock()
        self._before = _counters()
        self._team: _IdleTeam | None = None

    def share(self) -> int:
        """Measure the load, at most once in `INTERVAL`, and let waiting threads sleep if processors are scarce.

        Returns:
            Number of threads for code whose results do not depend on the number of threads. This number is at least 1,
            and is lower than PyTorch's number of threads if other processes occupy processors.
        """
        threads = torch.get_num_threads()
        if threads == 1 or not self._may_choose:
            return threads
        if time.monotonic() - self._before[0] > INTERVAL and self._lock.acquire(blocking=False):
            try:
                self._measure()
                self._let_threads_sleep(self._free < threads - TOLERANCE, threads)
            finally:
                self._lock.release()
        return max(1, min(threads, round(self._free)))

    def _measure(self) -> None:
        """Compute the mean number of processors that were free or used by this process since the last measurement."""
        now = _counters()
        self._free = (now[1] - self._before[1]) / (now[0] - self._before[0])
        self._before = now

    def _let_threads_sleep(self, wanted: bool, threads: int) -> None:
        if wanted and self._team is None:
            self._team = _IdleTeam(max(2, self.processors - threads + 2))
        elif not wanted and self._team is not None:
            self._team.end()
            self._team = None


class _IdleTeam:
    """A team of idle OpenMP threads, in each OpenMP library of this process, until a call of `end`.

    The library assigns a team to the thread that starts the team, and removes the team when that thread ends.
    """

    def __init__(self, threads: int) -> None:
        self._threads, self._ended = threads, threading.Event()
        threading.Thread(target=self._hold, name="idle OpenMP team", daemon=True).start()

    def end(self) -> None:
        """End the team."""
        self._ended.set()

    def _hold(self) -> None:
        """Start a team in each loaded OpenMP library, and wait for a call of `end`."""
        # psutil would take 25 times longer, because it also reads the size of each mapped file.
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        for path in {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}:
            library = ctypes.CDLL(path)
            # A compiler emits the call below for `#pragma omp parallel num_threads(threads)`.
            without_effect = ctypes.cast(library.omp_get_level, ctypes.c_void_p)
            library.GOMP_parallel(without_effect, None, ctypes.c_uint(self._threads), ctypes.c_uint(0))
        self._ended.wait()


def _counters() -> tuple[float, float]:
    """Return the wall time, and the time in which processors were idle or used by this process, in seconds."""
    times = psutil.cpu_times(percpu=True)
    own = psutil.Process().cpu_affinity() if sys.platform == "linux" else range(len(times))
    idle = sum(times[i].idle + getattr(times[i], "iowait", 0.0) for i in own if i < len(times))
    return time.monotonic(), idle + time.process_time()


_LOAD = Load(cores())

share = _LOAD.share
