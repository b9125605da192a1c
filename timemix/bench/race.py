"""Compare the speed of several contenders in one run, and measure the limits of the machine.

A contender is an implementation of an op, of a training step or of generation. If the values of a contender differ from
the values of the naive implementation, the figures of this contender are withheld. The contenders run in turn, so that
load by other programs affects all contenders.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date

import torch

from timemix._version import __version__
from timemix.reporting.markdown import markdown_table
from timemix.runtime.machine import free_memory, matrix_product_peak, memory_bandwidth, peak_memory, processor_name
from timemix.storage.json_files import OPTIONAL

Say = Callable[[str], None]


@dataclass
class Contender:
    """One implementation to time in a benchmark."""

    name: str
    call: Callable[[], object]
    """Function to time."""
    tokens: int
    """Number of tokens that a call processes."""
    fault: str | None = None
    """Reason to withhold the figures of this contender, or None to show the figures."""


@dataclass(frozen=True)
class Ratio:
    """Speed of a contender divided by the speed of the first contender, as median and range over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Path:
    """Figures of a contender, or the reason to withhold these figures."""

    name: str
    withheld: str | None = field(default=None, metadata=OPTIONAL)
    """Reason to withhold the figures, None if the figures are valid."""
    seconds: float | None = field(default=None, metadata=OPTIONAL)
    """Median duration of a call over the rounds, in seconds."""
    rounds: int | None = field(default=None, metadata=OPTIONAL)
    tokens_per_second: float | None = field(default=None, metadata=OPTIONAL)
    ratio: Ratio | None = field(default=None, metadata=OPTIONAL)
    """Speed relative to the first contender."""
    share_of_floor: float | None = field(default=None, metadata=OPTIONAL)
    """Time to read all weights and the state from memory, divided by the measured time of a step."""
    state_bytes: int | None = field(default=None, metadata=OPTIONAL)
    """Size of the state of one text, in bytes."""
    peak_memory: int | None = field(default=None, metadata=OPTIONAL)
    """Peak memory of the process up to this measurement, in bytes."""
    call_memory: int | None = field(default=None, metadata=OPTIONAL)
    """Peak memory that a call allocates on a GPU, without memory allocated earlier, in bytes."""
    share_of_peak: float | None = field(default=None, metadata=OPTIONAL)
    """Speed of a training step as a share of the peak speed of matrix products. The speed counts 6 N D operations for N
    parameters and D tokens."""
    parameters: int | None = field(default=None, metadata=OPTIONAL)
    """Number of parameters."""


@dataclass(frozen=True)
class Machine:
    """Names of the machine and the software versions, and the limits of the machine as measured in this run."""

    processor: str
    threads: int
    date: str
    timemix: str
    """Version of timemix, with the git commit if known."""
    torch: str
    python: str
    float32_peak: float
    """Peak speed of matrix products in float32, in operations per second."""
    bfloat16_peak: float
    """Peak speed of matrix products in bfloat16, in operations per second."""
    bandwidth: float
    """Speed of reading memory, in bytes per second."""

    def peak(self, precision: str) -> float:
        """Return the peak speed of matrix products in a precision, in operations per second."""
        return self.bfloat16_peak if precision == "bfloat16" else self.float32_peak


@dataclass(frozen=True, kw_only=True)
class Heat:
    """Results of contenders that were timed in alternation."""

    ctx_len: int | None = field(default=None, metadata=OPTIONAL)
    title: str | None = field(default=None, metadata=OPTIONAL)
    bandwidth: float | None = field(default=None, metadata=OPTIONAL)
    paths: list[Path]


@dataclass(frozen=True)
class Report:
    """Results of a benchmark, and content of bench.json."""

    work: str
    machine: Machine
    results: list[Heat]


def too_large(matrix: int, device: torch.device) -> str | None:
    """Return a message if three float32 matrices and their gradients exceed the free memory, otherwise None.

    Args:
        matrix: Number of elements of one matrix.
        device: Device of the matrices.
    """
    free, needed = free_memory(device), 24 * matrix
    if needed < free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB of memory, but {free / 2**30:.0f} GiB are free"


def race(contenders: list[Contender], seconds: float, device: torch.device, say: Say) -> list[Path]:
    """Time all contenders in alternation.

    Args:
        contenders: The contenders. A contender with a fault is not timed. Ratios are relative to the first contender.
        seconds: Mean time to spend on each contender, in seconds. At least three rounds are timed.
        device: Device of the contenders.
        say: Function that prints a progress line.

    Returns:
        The figures of each contender, in the order of `contenders`.
    """
    times: dict[str, list[float]] = {c.name: [] for c in contenders if c.fault is None}
    running = [c for c in contenders if c.fault is None]
    memory: dict[str, int] = {}
    for contender in list(running):
        say(f"warming up {contender.name}")
        try:
            # Warm up with two calls, since the first call allocates or compiles. A slow contender that is not compiled
            # gets one warm-up call.
            for _ in range(2):
                before, start = _start_of_memory(device), time.perf_counter()
                contender.call()
                if device.type == "cuda":
                    memory[contender.name] = (peak_memory(device) or 0) - before
                taken = time.perf_counter() - start
                if taken > seconds and not contender.name.endswith(" compiled"):
                    say(f"{contender.name}: {taken:.1f} s per call")
                    break
        except (RuntimeError, MemoryError) as error:
            contender.fault = f"fails: {next(iter(str(error).splitlines()), type(error).__name__)[:200]}"
            running.remove(contender)
    end = time.perf_counter() + seconds * len(running)
    rounds = 0
    while running and (rounds < 3 or time.perf_counter() < end):
        for contender in running:
            start = time.perf_counter()
            contender.call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[contender.name].append(time.perf_counter() - start)
        rounds += 1
        if rounds < 3 and time.perf_counter() > end:
            say(f"round {rounds} of 3 is done")
    base = times.get(contenders[0].name) or None
    rows = []
    for contender in contenders:
        if contender.fault is not None:
            rows.append(Path(name=contender.name, withheld=contender.fault))
            continue
        own = times[contender.name]
        middle = statistics.median(own)
        ratio = None
        if base is not None:
            work = contender.tokens / contenders[0].tokens
            ratios = sorted(work * a / b for a, b in zip(base, own, strict=True))
            ratio = Ratio(statistics.median(ratios), ratios[0], ratios[-1])
        rows.append(
            Path(
                name=contender.name,
                seconds=middle,
                rounds=rounds,
                tokens_per_second=contender.tokens / middle,
                ratio=ratio,
                call_memory=memory.get(contender.name),
            )
        )
    return rows


def _start_of_memory(device: torch.device) -> int:
    """Return the allocated bytes of a GPU, and reset its peak memory."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def machine_now(device: torch.device) -> Machine:
    """Return the name of the machine and the software versions, and measure the limits of the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return Machine(
        processor=name,
        threads=torch.get_num_threads(),
        date=date.today().isoformat(),
        timemix=f"{__version__}{_commit()}",
        torch=str(torch.__version__),
        python=platform.python_version(),
        float32_peak=matrix_product_peak("float32", device),
        bfloat16_peak=matrix_product_peak("bfloat16", device),
        bandwidth=memory_bandwidth(device),
    )


def _commit() -> str:
    """Return the git commit of the package in parentheses, or "" outside a git work tree."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" ({done.stdout.strip()})"


_MORE = {
    "share_of_peak": "share of the peak",
    "share_of_floor": "share of the floor",
    "state_bytes": "size of the state, bytes",
    "peak_memory": "peak memory of the process up to this row, bytes",
    "call_memory": "peak memory of a call, bytes",
}


def to_markdown(report: Report) -> str:
    """Return a report as Markdown."""
    machine = report.machine
    parts = [
        f"{report.work}. {machine.processor}, {machine.threads} threads, torch {machine.torch},"
        f" timemix {machine.timemix}, {machine.date}. In the same run, matrix products reach"
        f" {machine.float32_peak / 1e9:.0f} GFLOP/s in float32 and {machine.bfloat16_peak / 1e9:.0f} GFLOP/s in"
        f" bfloat16, and the memory bandwidth is {machine.bandwidth / 1e9:.0f} GB/s."
    ]
    for result in report.results:
        more = {key: head for key, head in _MORE.items() if any(getattr(row, key) is not None for row in result.paths)}
        title = result.title or f"ctx_len {result.ctx_len}"
        rows = [[title, "ms", "tokens/s", f"ratio to {result.paths[0].name}", *more.values()]]
        for row in result.paths:
            if row.seconds is None or row.tokens_per_second is None:
                rows.append([row.name, row.withheld or "-", *["-"] * (len(rows[0]) - 2)])
                continue
            ratio = row.ratio
            spread = "-" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
            cells = [row.name, f"{1e3 * row.seconds:.{1 if row.seconds > 0.01 else 3}f}"]
            cells += [f"{row.tokens_per_second:,.0f}", spread]
            for key in more:
                value = getattr(row, key)
                cells.append("-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.0%}")
            rows.append(cells)
        parts.append(markdown_table(rows))
    return "\n\n".join(parts) + "\n"
