"""Speed side by side in one run: the op, or a training step, against a plain writing, attention, and the machine.

Each path must first give what the plain writing gives; the figures of one that does not are withheld. Paths take turns,
so that what else the machine does falls on all of them.
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from timemix._version import __version__
from timemix.reporting.markdown import markdown_table
from timemix.runtime.machine import free_memory, matrix_product_peak, memory_bandwidth, processor_name

Say = Callable[[str], None]


@dataclass
class Contender:
    """A path in a benchmark: what is timed, how many tokens that is, and why its figure is withheld, if it is."""

    name: str
    call: Callable[[], object]
    tokens: int
    fault: str | None = None


def too_large(matrix: int, device: torch.device) -> str | None:
    """Why matrices of so many numbers do not fit: three and their gradients, in float32."""
    free, needed = free_memory(device), 24 * matrix
    if needed < free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"


def race(contenders: list[Contender], seconds: float, device: torch.device, say: Say) -> list[dict[str, Any]]:
    """Times of each path, all taking turns, until `seconds` have gone for each on average, three rounds at least."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {c.name: [] for c in contenders if c.fault is None}
    running = [c for c in contenders if c.fault is None]
    for contender in list(running):
        say(f"warming up {contender.name}")
        try:
            for _ in range(2):
                contender.call()
        except (RuntimeError, MemoryError) as error:
            contender.fault = f"fails: {next(iter(str(error).splitlines()), type(error).__name__)[:200]}"
            running.remove(contender)
    end = time.perf_counter() + seconds * len(running)
    rounds = 0
    while running and (rounds < 3 or time.perf_counter() < end):
        for contender in running:
            start = time.perf_counter()
            contender.call()
            synchronize()
            times[contender.name].append(time.perf_counter() - start)
        rounds += 1
    base = times.get(contenders[0].name) or None
    rows = []
    for contender in contenders:
        row: dict[str, Any] = {"name": contender.name}
        if contender.fault is not None:
            rows.append(row | {"withheld": contender.fault})
            continue
        own = times[contender.name]
        middle = statistics.median(own)
        row |= {"seconds": middle, "rounds": rounds, "tokens_per_second": contender.tokens / middle}
        if base is not None:
            work = contender.tokens / contenders[0].tokens
            ratios = sorted(work * a / b for a, b in zip(base, own, strict=True))
            row["ratio"] = {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
        rows.append(row)
    return rows


def machine_now(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, and the limits, measured now."""
    peaks = {f"{p}_peak": matrix_product_peak(p, device) for p in ("float32", "bfloat16")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "timemix": f"{__version__}{_commit()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        **peaks,
        "bandwidth": memory_bandwidth(device),
    }


def _commit() -> str:
    """The commit that runs, where the package lies in a git work tree."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" ({done.stdout.strip()})"


_MORE = {
    "share_of_peak": "share of peak, 6 N D",
    "share_of_floor": "share of the floor",
    "state_bytes": "state, bytes",
    "peak_memory": "largest memory of the process so far",
}


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    machine = report["machine"]
    parts = [
        f"{report['work']}. {machine['processor']}, {machine['threads']} threads, torch {machine['torch']},"
        f" timemix {machine['timemix']}, {machine['date']}. Measured in the same run: matrix products"
        f" {machine['float32_peak'] / 1e9:.0f} GFLOP/s in float32, {machine['bfloat16_peak'] / 1e9:.0f} in bfloat16;"
        f" memory read at {machine['bandwidth'] / 1e9:.0f} GB/s."
    ]
    for result in report["results"]:
        more = {key: head for key, head in _MORE.items() if any(key in row for row in result["paths"])}
        title = result.get("title", f"ctx_len {result.get('ctx_len')}")
        rows = [[title, "ms", "tokens/s", f"ratio to {result['paths'][0]['name']}", *more.values()]]
        for row in result["paths"]:
            if "withheld" in row:
                rows.append([row["name"], row["withheld"], *["-"] * (len(rows[0]) - 2)])
                continue
            ratio = row.get("ratio")
            spread = "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            cells = [row["name"], f"{1e3 * row['seconds']:.{1 if row['seconds'] > 0.01 else 3}f}"]
            cells += [f"{row['tokens_per_second']:,.0f}", spread]
            for key in more:
                value = row.get(key)
                cells.append("-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.0%}")
            rows.append(cells)
        parts.append(markdown_table(rows))
    return "\n\n".join(parts) + "\n"
