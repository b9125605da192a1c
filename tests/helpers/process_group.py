"""Runs of two processes for tests/test_distributed.py: torchrun ... -m tests.helpers.process_group FOLDER NAME..."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import small_config, with_model
from timemix.errors import Interrupted, TimemixError
from timemix.evaluation.loss import loss_per_token
from timemix.runtime.distributed import Elsewhere, World, joined
from timemix.training.start import new_run, resume_run

SETTINGS = {
    "plain": {},
    "accumulated": {"accumulation": 2},
    "float64": {"precision": "float64"},
    "muon": {"optimizer": "muon", "weight_decay": 0.1},
    "mha_pro": {},
}


def config(folder: Path, name: str, strategy: str):
    arch = name if name.startswith("mha") else "rwkv1"
    # 5 heads of 3 channels give two processes parts of unequal size.
    settings = {"steps": 6, "valid_every": 3, "save_every": 3, "log_every": 1} | SETTINGS[name]
    made = small_config(folder / "tokens", arch, strategy=strategy, **settings)
    return with_model(made, heads=5, channels=15)


def stop_and_resume(folder: Path, strategy: str, world: World) -> None:
    """Stop a run, resume a run that one process started, and write the losses that each process has."""

    def stop(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        new_run(config(folder, "plain", strategy), folder / f"stopped-{strategy}", world).run(stop)
    trainer = resume_run(folder / f"handed-{strategy}", world, {"sample_every": 4})
    assert trainer.step == 3
    trainer.run()
    # Validation batches that do not divide evenly among the processes.
    losses = [loss_per_token(trainer.model, np.arange(n) % 7, tokens_per_batch=16, world=world) for n in (17, 50, 81)]
    (folder / f"losses-{strategy}-{world.rank}.json").write_text(json.dumps(losses))


def by_the_clock(folder: Path, strategy: str, world: World) -> None:
    """Create a run of some seconds, and write the steps that each process counts."""
    made = config(folder, "plain", strategy)
    made = replace(made, train=replace(made.train, seconds=0.5, sample_every=2))
    trainer = new_run(made, folder / f"clock-{strategy}", world)
    (folder / f"steps-{strategy}-{world.rank}.json").write_text(json.dumps(trainer.config.train.steps))
    trainer.lock.release()


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    with joined() as world:
        world.first_does(lambda: None)
        for strategy in ("replicate", "shard"):
            for name in names:
                new_run(config(folder, name, strategy), folder / f"{name}-{strategy}-{world.size}", world).run()
            if "plain" in names:
                stop_and_resume(folder, strategy, world)
                by_the_clock(folder, strategy, world)

        def fail():
            raise TimemixError("only process 0 says this")

        with pytest.raises(TimemixError if world.first else Elsewhere):
            world.first_does(fail)


if __name__ == "__main__":
    main()
