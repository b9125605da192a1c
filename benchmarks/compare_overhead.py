"""Measure the overhead of `timemix compare`: its total time minus the time of its training runs.

    python benchmarks/compare_overhead.py TEXT [--tokens 500000]

The script compares two architectures at cpu-small size, with one seed and no tuning. From this comparison, the script
calculates the overhead of comparisons with 1, 3 and 9 runs per variant.
"""

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

from timemix.experiments.compare import Comparison
from timemix.experiments.report import write_report
from timemix.experiments.spec import Experiment
from timemix.experiments.variants import Variant
from timemix.training.trainer import Trainer


@contextlib.contextmanager
def unwatched(job, config):
    """Ignore the progress of a run."""
    yield lambda progress: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="text file to train on")
    parser.add_argument("--tokens", type=int, default=500_000, help="training tokens of a run; default: 500000")
    options = parser.parse_args()
    in_runs = 0.0
    run = Trainer.run

    def timed(self, *arguments):
        nonlocal in_runs
        start = time.perf_counter()
        try:
            return run(self, *arguments)
        finally:
            in_runs += time.perf_counter() - start

    Trainer.run = timed
    experiment = Experiment(
        title="overhead",
        variants=(Variant("rwkv1"), Variant("mha_rotary", {"model": {"arch": "mha_rotary"}})),
        tokens=options.tokens,
        seeds=(1,),
        base={"data": {"source": options.text}, "train": {"valid_every": 10**6}},
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        comparison = Comparison(experiment, Path(folder))
        began = time.perf_counter() - start
        comparison.run(unwatched, print)
        ran = time.perf_counter() - start - began
        write_report(comparison)
        whole = time.perf_counter() - start
    report = whole - began - ran
    between = (ran - in_runs) / 2
    print(f"start {began:.1f} s, between runs {between:.2f} s per run, report {report / 2:.1f} s per variant")
    for runs in (1, 3, 9):
        per_run = in_runs / 2
        cost = (began + report + 2 * runs * between) / (2 * runs * per_run)
        print(f"2 variants, {runs} runs per variant, {per_run:.0f} s per run: overhead {cost:.1%} of the runs")


if __name__ == "__main__":
    main()
