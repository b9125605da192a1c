"""Small runs for the tests of training, generation, evaluation and the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from tests.helpers.models import heads_of
from timemix.config.run import RunConfig, TrainConfig
from timemix.data.config import DataConfig
from timemix.models.registry import model_config
from timemix.runs.folder import checkpoint_name, checkpoints
from timemix.storage.files import remove_folder
from timemix.training.start import new_run
from timemix.training.trainer import Trainer

TEXT = "".join(f"the cat sat on mat {i % 7}. the dog ran to hut {i % 5}!\n" for i in range(60))


def small_config(source, arch="rwkv1", **train):
    settings = {"steps": 8, "batch_size": 4, "lr": 1e-2, "log_every": 2, "valid_every": 4, "save_every": 4}
    return RunConfig(
        model=model_config(arch, layers=2, channels=16, ctx_len=16, **heads_of(arch, 4)),
        data=DataConfig(source=str(source)),
        train=TrainConfig(**(settings | {"precision": "float32"} | train)),
    )


def write_text_file(folder: Path, text: str = TEXT) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def small_trainer(folder: Path, arch="rwkv1", name="run", **train) -> Trainer:
    return new_run(small_config(write_text_file(folder), arch, **train), folder / name)


def with_model(config: RunConfig, **fields) -> RunConfig:
    return replace(config, model=replace(config.model, **fields))


def save_another(run: Path) -> None:
    """Imitate the training of a run: a newer checkpoint appears atomically, and the earlier ones are removed."""
    old = checkpoints(run)
    step = int(old[-1].name.removeprefix("step-")) + 4
    partial = shutil.copytree(old[-1], run / "checkpoints/.partial")
    progress = json.loads((partial / "training.json").read_text())
    (partial / "training.json").write_text(json.dumps(progress | {"step": step, "valid_step": step}))
    partial.rename(old[-1].with_name(checkpoint_name(step)))
    for folder in old:
        remove_folder(folder)
