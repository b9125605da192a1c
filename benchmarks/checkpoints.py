"""Measure the cost of checkpoints: python benchmarks/checkpoints.py [FOLDER]

The script prints the median time of a training step, and of saving a checkpoint that is synced to the disk of FOLDER
(default: the current folder). With the default intervals, a run saves every 500 steps, and after each validation (every
250 steps) that gives the lowest loss so far. A run therefore saves at most twice in 500 steps.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from timemix.config.presets import preset
from timemix.config.run import TrainConfig
from timemix.data.config import DataConfig
from timemix.runs.folder import newest
from timemix.training.start import new_run
from timemix.training.trainer import Trainer


def timed(action: Callable[[], object]) -> float:
    """Return the duration of a call in seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    place = sys.argv[1] if len(sys.argv) > 1 else "."
    default = TrainConfig()
    saves = default.save_every // default.valid_every
    for name, steps in (("cpu-small", 200), ("seed", 3)):
        with tempfile.TemporaryDirectory(dir=place) as folder:
            config = preset(name)
            config = replace(config, data=replace(config.data, source=DataConfig.source))
            trainer = new_run(config, Path(folder) / "run")
            trainer.train_step()
            step = median(timed(trainer.train_step) for _ in range(steps))
            save = median(timed_save(trainer) for _ in range(5))
            size = sum(p.stat().st_size for p in newest(trainer.out).iterdir())
            share = saves * save / (default.save_every * step)
            print(
                f"{name}: saving {size / 2**20:.1f} MiB takes {save * 1e3:.0f} ms, a training step takes"
                f" {step * 1e3:.0f} ms, so saving takes at most {share:.2%} of the training time"
            )


def timed_save(trainer: Trainer) -> float:
    """Return the seconds of saving a checkpoint and removing the previous checkpoint."""
    # Each save needs a new step number, because timemix removes the checkpoint of an older step.
    trainer.step += 1
    return timed(trainer.save)


if __name__ == "__main__":
    main()
