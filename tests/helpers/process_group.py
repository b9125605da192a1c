"""Runs of two processes for tests/test_distributed.py: torchrun ... -m tests.helpers.process_group FOLDER NAME..."""

import errno
import json
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.helpers.runs import small_config, with_model
from timemix.cli.terminal import exit_process
from timemix.errors import CannotWrite, Interrupted, TimemixError, Unavailable
from timemix.evaluation.loss import loss_per_token
from timemix.models.config import ModelConfig
from timemix.models.registry import find_architecture, list_architectures
from timemix.runs import save
from timemix.runtime.distributed import PATIENCE, Elsewhere, World, joined
from timemix.storage.sharded import StoredTensors
from timemix.storage.tensors import write_tensors
from timemix.training import samples, start
from timemix.training.parallel import new_model
from timemix.training.saving import gathered
from timemix.training.start import new_run, resume_run

SETTINGS = {
    "plain": {},
    "accumulated": {"accumulation": 2},
    "float64": {"precision": "float64"},
    "muon": {"optimizer": "muon", "weight_decay": 0.1},
    "mha_pro": {},
    "rwkv7": {"precision": "float64"},
    "masked": {"precision": "float64", "accumulation": 2},
}

MASKED = "".join(
    json.dumps({"prompt": "a" * (1 + 7 * i % 40), "completion": f"the cat sat on mat {i}." * (i % 3 + 1)}) + "\n"
    for i in range(60)
)
"""Conversations for "masked": windows have different numbers of counted targets, and some have none."""


def config(folder: Path, name: str, strategy: str):
    arch = name if name in list_architectures() else "rwkv1"
    # 5 heads of 3 channels give two processes parts of unequal size.
    settings = {"steps": 6, "valid_every": 3, "save_every": 3, "log_every": 1} | SETTINGS[name]
    tokens = folder / ("masked-tokens" if name == "masked" else "tokens")
    made = small_config(tokens, arch, strategy=strategy, **settings)
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


def save_initial_values(folder: Path, world: World) -> None:
    """Save the initial values of sharded models of every architecture, and the memory that they took."""
    for name in list_architectures():
        for initial in ("zero", "original"):
            made = initial_config(name, initial)
            torch.manual_seed(7)
            model, _ = new_model(made, "shard", world, torch.device("cpu"), torch.float32)
            weights = gathered(model.state_dict(), world)
            if world.first:
                write_tensors(folder / f"initial-{name}-{initial}-{world.size}.safetensors", weights, {})


def initial_config(name: str, initial: str) -> ModelConfig:
    """Return the config of a model whose rows are not multiples of 2 or 4."""
    fields = {"layers": 2, "channels": 30, "heads": 5, "ctx_len": 9, "vocab_size": 23, "initial": initial}
    kind = find_architecture(name).config
    return kind(arch=name, **{key: value for key, value in fields.items() if key in kind.__dataclass_fields__})


def resume_and_save(folder: Path, strategy: str, world: World) -> None:
    """Resume a copy of a run and save it at once."""
    trainer = resume_run(folder / f"copied-{strategy}-{world.size}", world, {"strategy": strategy})
    trainer.save()
    trainer.lock.release()


def check_longer_than_an_exchange_waits(folder: Path, world: World) -> None:
    """Process 0 alone reads and calls a hook for longer than an exchange may take; one process refuses a run."""
    check = StoredTensors.check_content

    def slowly(self, rank=0, size=1):
        time.sleep(4.0 if world.first else 0.0)
        check(self, rank, size)

    def refuse(config, world):
        if not world.first:
            raise Unavailable("only process 1 has too little memory")

    set_timeout = dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=2), dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredTensors, "check_content", slowly)
        resume_run(folder / f"copied-shard-{world.size}", world).lock.release()
    hooked = new_run(config(folder, "plain", "shard"), folder / f"hooked-{world.size}", world)
    hooked.run(hooks=[lambda line: time.sleep(4.0 * (line["step"] == 1))])
    set_timeout(PATIENCE, dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "refuse_too_large", refuse)
        for begin in (
            lambda: new_run(config(folder, "plain", "shard"), folder / f"refused-{world.size}", world),
            lambda: resume_run(folder / f"copied-shard-{world.size}", world),
        ):
            with pytest.raises(Elsewhere if world.first else Unavailable):
                begin()


def sample_without_copies(folder: Path, world: World) -> None:
    """Draw a sample of a sharded model, of which only process 0 may create a copy, in the type of its weights."""
    made = config(folder, "float64", "shard")
    trainer = new_run(made, folder / f"sampled-{world.size}", world)
    copy = samples.whole_model(trainer.model, "shard", world)
    assert (copy is trainer.model) != world.first
    if world.first:
        assert copy.head.weight.dtype == torch.float64
    trainer.save()
    trainer.sample()
    trainer.lock.release()


def save_on_a_full_disk(folder: Path, world: World) -> None:
    """Save a sharded run while the disk of the last process is full, once to stop and once to train on."""

    def write(path, tensors, metadata):
        if world.rank == world.size - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_tensors(path, tensors, metadata)

    trainer = new_run(config(folder, "plain", "shard"), folder / f"full-{world.size}", world)
    trainer.save()
    trainer.train_step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "write_tensors", write)
        with pytest.raises(CannotWrite if world.first else Elsewhere, match="no space left" if world.first else None):
            trainer.save()
        assert trainer.save(go_on=True) is None
    kept = world.first_does(lambda: [path.name for path in (trainer.out / "checkpoints").iterdir()])
    assert kept in (["step-00000000"], None)
    assert (trainer.save() is not None) == world.first
    trainer.lock.release()


def main() -> None:
    if sys.argv[2:] == ["exact"]:
        with joined() as world:
            for strategy in ("replicate", "shard"):
                resume_and_save(Path(sys.argv[1]), strategy, world)
            check_longer_than_an_exchange_waits(Path(sys.argv[1]), world)
            sample_without_copies(Path(sys.argv[1]), world)
            save_initial_values(Path(sys.argv[1]), world)
            save_on_a_full_disk(Path(sys.argv[1]), world)
        return
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
    exit_process(0)
