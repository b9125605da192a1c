"""A run that can be killed at a known instant: it reports each step and each part of a slowed save as it begins.

Runs are children of a fork server that has imported torch already, so starting one takes little time.
"""

import multiprocessing
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from tests.helpers.runs import small_config, with_model
from timemix.storage import files
from timemix.training.start import new_run, resume_run

CONFIG = {"steps": 30, "save_every": 7, "valid_every": 10, "log_every": 4, "accumulation": 2}


def config(tokens: Path):
    return with_model(small_config(tokens, **CONFIG), dropout=0.1)


def start(folder: Path, tokens: Path, seconds: float) -> tuple[BaseProcess, Connection]:
    """Start or resume a run in a new process; return the process and its events.

    Args:
        folder: Run folder.
        tokens: Prepared folder, for a new run.
        seconds: Delay of each file of a checkpoint.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    events, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_train, args=(folder, tokens, seconds, theirs))
    child.start()
    theirs.close()
    return child, events


def _train(folder: Path, tokens: Path, seconds: float, events: Connection) -> None:
    torch.set_num_threads(1)
    trainer = resume_run(folder) if folder.exists() else new_run(config(tokens), folder)
    sync = files._sync

    def slow_sync(path: Path) -> None:
        events.send("saving")
        time.sleep(seconds)
        sync(path)

    files._sync = slow_sync
    trainer.run(lambda progress: events.send("step"))
