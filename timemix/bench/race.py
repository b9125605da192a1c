"""Speed side by side in one run: an op or a training step beside the naive implementation, attention and the machine.

Each path must first give the values of the naive implementation; otherwise its figures are withheld. Paths take turns,
so that what else the machine does falls on all of them.
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
    """A path in a benchmark: what is timed, how many tokens that is, and why its figure is withheld, if it is."""

    name: str
    call: Callable[[], object]
    tokens: int
    fault: str | None = None


@dataclass(frozen=True)
class Ratio:
    """Of the rounds' ratios in speed to the first path."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Path:
    """What was measured of a path, or why its figures are withheld.

    seconds: median over the rounds. share_of_peak: of the peak of matrix products, counted as 6 N D.
    share_of_floor: the time that reading its bytes from memory takes, over the time that it took.
    state_bytes: size of a text's state. peak_memory: of the process so far, in bytes. call_memory: most bytes
    that a call allocates on a GPU beside what is there before it.
    """

    name: str
    withheld: str | None = field(default=None, metadata=OPTIONAL)
    seconds: float | None = field(default=None, metadata=OPTIONAL)
    rounds: int | None = field(default=None, metadata=OPTIONAL)
    tokens_per_second: float | None = field(default=None, metadata=OPTIONAL)
    ratio: Ratio | None = field(default=None, metadata=OPTIONAL)
    share_of_floor: float | None = field(default=None, metadata=OPTIONAL)
    state_bytes: int | None = field(default=None, metadata=OPTIONAL)
    peak_memory: int | None = field(default=None, metadata=OPTIONAL)
    call_memory: int | None = field(default=None, metadata=OPTIONAL)
    share_of_peak: float | None = field(default=None, metadata=OPTIONAL)
    parameters: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Machine:
    """What the figures depend on, and the limits, measured in the same run: operations and bytes per second."""

    processor: str
    threads: int
    date: str
    timemix: str
    torch: str
    python: str
    float32_peak: float
    bfloat16_peak: float
    bandwidth: float

    def peak(self, precision: str) -> float:
        return self.bfloat16_peak if precision == "bfloat16" else self.float32_peak


@dataclass(frozen=True, kw_only=True)
class Heat:
    """Paths that were timed against one another."""

    ctx_len: int | None = field(default=None, metadata=OPTIONAL)
    title: str | None = field(default=None, metadata=OPTIONAL)
    bandwidth: float | None = field(default=None, metadata=OPTIONAL)
    paths: list[Path]


@dataclass(frozen=True)
class Report:
    """The content of bench.json."""

    work: str
    machine: Machine
    results: list[Heat]


def too_large(matrix: int, device: torch.device) -> str | None:
    """Why matrices of so many numbers do not fit: three and their gradients, in float32."""
    free, needed = free_memory(device), 24 * matrix
    if needed < free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"


def race(contenders: list[Contender], seconds: float, device: torch.device, say: Say) -> list[Path]:
    """Times of each path, all taking turns, until `seconds` have gone for each on average, three rounds at least."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders if c.fault is None}
    running = [c for c in contenders if c.fault is None]
    memory: dict[str, int] = {}
    for contender in list(running):
        say(f"warming up {contender.name}")
        try:
            # Twice: the first call allocates, or compiles. Once for a slow path that is not compiled.
            for _ in range(2):
                before, start = _start_of_memory(device), time.perf_counter()
                contender.call()
                if device.type == "cuda":
                    memory[contender.name] = (peak_memory(device) or 0) - before
                taken = time.perf_counter() - start
                if taken > seconds and not contender.name.endswith(" compiled"):
                    say(f"{contender.name}: {taken:.1f} s a call")
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
    """Return the bytes allocated on a GPU, and have the peak count from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def machine_now(device: torch.device) -> Machine:
    """What the figures depend on, and the limits, measured now."""
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
    """The commit that runs, where the package lies in a git work tree."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" ({done.stdout.strip()})"


_MORE = {
    "share_of_peak": "share of peak, 6 N D",
    "share_of_floor": "share of the floor",
    "state_bytes": "state, bytes",
    "peak_memory": "largest memory of the process so far",
    "call_memory": "memory of a call, bytes",
}


def to_markdown(report: Report) -> str:
    """The report as a person reads it."""
    machine = report.machine
    parts = [
        f"{report.work}. {machine.processor}, {machine.threads} threads, torch {machine.torch},"
        f" timemix {machine.timemix}, {machine.date}. Measured in the same run: matrix products"
        f" {machine.float32_peak / 1e9:.0f} GFLOP/s in float32, {machine.bfloat16_peak / 1e9:.0f} in bfloat16;"
        f" memory read at {machine.bandwidth / 1e9:.0f} GB/s."
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
