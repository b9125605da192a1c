"""Measure the speed of timemix beside a busy process: python benchmarks/busy.py [POLICY ...] [--rounds 5] [--seconds 3]

The script times training steps and generation of a cpu-small model, on an idle machine and beside one process that
computes all the time. Each task runs with one thread, and with one thread per processor. A POLICY sets an environment
variable, such as GOMP_SPINCOUNT=0. The policy `timemix` sets no variable, so timemix decides how threads wait.
GOMP_SPINCOUNT=300000 is the default of the OpenMP library. Each figure comes from a fresh process. The cases alternate,
in reverse order in every second round. The machine should be idle. The script prints the load average at the start.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from timemix.config.presets import preset
from timemix.runtime.processes import cores

WORK = ("train", "sample")


def worker(work: str, seconds: float) -> None:
    """Run a task for a fifth of `seconds` to warm up, then for `seconds`, and print the tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        step, tokens = training(Path(folder)) if work == "train" else sampling()
        for duration in (seconds / 5, seconds):
            start, steps = time.perf_counter(), 0
            while time.perf_counter() < start + duration:
                step()
                steps += 1
            speed = steps * tokens / (time.perf_counter() - start)
    print(json.dumps(speed))


def training(folder: Path) -> tuple[Callable[[], object], int]:
    from timemix.runtime.machine import keep_freed_memory
    from timemix.training.start import new_run

    keep_freed_memory()
    trainer = new_run(preset("cpu-small"), folder / "run")
    return trainer.train_step, trainer.tokens_per_step


def sampling() -> tuple[Callable[[], object], int]:
    import torch

    from timemix.generation.engine import Engine
    from timemix.generation.request import Request
    from timemix.models.language_model import build_model

    torch.manual_seed(0)
    engine = Engine(build_model(**vars(preset("cpu-small").model) | {"vocab_size": 64}))
    engine.add(Request([0], 10**9))
    return engine.step, 1


# The busy process ends when its parent process ends, even if the parent is killed.
COMPUTE = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**5))"


@contextlib.contextmanager
def beside(busy: int) -> Iterator[None]:
    """Run `busy` computing processes during a `with` block."""
    others = [subprocess.Popen([sys.executable, "-c", COMPUTE]) for _ in range(busy)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(work: str, threads: int, policy: str, busy: int, seconds: float) -> float:
    """Return the tokens per second of a task in a fresh process, beside `busy` computing processes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["OMP_NUM_THREADS"] = str(threads)
    if "=" in policy:
        name, _, value = policy.partition("=")
        environment[name] = value
    command = [sys.executable, __file__, "--worker", work, "--seconds", str(seconds)]
    with beside(busy):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", default=["timemix", "GOMP_SPINCOUNT=300000"], help="how threads wait")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements of each case; default: 5")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of a measurement in seconds; default: 3")
    parser.add_argument("--worker", choices=WORK, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.seconds)
        return
    print("load average at the start: " + ", ".join(f"{load:.1f}" for load in os.getloadavg()))
    cases = [(1, options.policies[0]), *itertools.product([cores()], options.policies)]
    speeds = {(work, busy, *case): [] for work, busy, case in itertools.product(WORK, (0, 1), cases)}
    for number, work, busy in itertools.product(range(options.rounds), WORK, (0, 1)):
        for threads, policy in cases[:: -1 if number % 2 else 1]:
            speeds[work, busy, threads, policy].append(measure(work, threads, policy, busy, options.seconds))
    print("| work | other processes | threads | policy | tokens/s, median | least | most | ratio to one thread |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (work, busy, threads, policy), found in speeds.items():
        one = median(speeds[work, busy, 1, options.policies[0]])
        figures = f"{median(found):,.0f} | {min(found):,.0f} | {max(found):,.0f} | {median(found) / one:.2f}"
        print(f"| {work} | {busy} | {threads} | {policy} | {figures} |")


if __name__ == "__main__":
    main()
