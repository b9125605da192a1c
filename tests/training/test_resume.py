"""A run that is stopped, killed or hits a full disk resumes and ends bit-identical."""

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.ends import metrics, same_end, stop_at
from tests.helpers.killed_run import CONFIG, config, start
from tests.helpers.pairwise import pairwise
from tests.helpers.runs import small_config, small_trainer, with_model, write_text_file
from timemix.data.prepare import prepare
from timemix.errors import CannotWrite, Interrupted, InUse
from timemix.runs import folder as run_folder
from timemix.storage import files
from timemix.storage.locks import FolderLock
from timemix.training import saving
from timemix.training.start import new_run, resume_run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("precision", "optimizer", "order", "accumulation", "arch"),
    pairwise(["float32", "bfloat16", "float64"], ["adamw", "muon"], ["random", "epoch"], [1, 2], ["rwkv1", "rwkv7"]),
)
def test_stopped_and_resumed_twice_is_the_undisturbed_run(tmp_path, precision, optimizer, order, accumulation, arch):
    settings = {"precision": precision, "optimizer": optimizer, "accumulation": accumulation, "weight_decay": 0.1}
    config = with_model(small_config(write_text_file(tmp_path), arch, steps=9, **settings), dropout=0.2)
    config = replace(config, data=replace(config.data, order=order))
    new_run(config, tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        new_run(config, tmp_path / "stopped").run(stop_at(3))
    with pytest.raises(Interrupted):
        resume_run(tmp_path / "stopped").run(stop_at(5))
    resumed = resume_run(tmp_path / "stopped")
    assert resumed.step == 5
    resumed.run()
    same_end(tmp_path / "whole", tmp_path / "stopped")


class Killed:
    """Runs of `killed_run`, each killed at a random instant."""

    SLOW = 0.02

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokens = folder, folder / "tokens"
        prepare(self.tokens, small_config(write_text_file(folder)).data)
        self.events = self._to_its_end("whole")
        assert self.events.count("step") == CONFIG["steps"]

    def _to_its_end(self, name: str) -> list[str]:
        child, events = start(self.folder / name, self.tokens, self.SLOW)
        seen = []
        with events, contextlib.suppress(EOFError):
            while True:
                seen.append(events.recv())
        child.join()
        assert child.exitcode == 0
        return seen

    def kill(self, name: str, event: str, number: int, delay: float) -> None:
        """Start or resume a run, and kill it `delay` seconds after the `number`-th occurrence of an event."""
        child, events = start(self.folder / name, self.tokens, self.SLOW)
        with events:
            with contextlib.suppress(EOFError):
                while number:
                    number -= events.recv() == event
            time.sleep(delay)
            child.kill()
            child.join()

    def finish(self, name: str) -> None:
        self._to_its_end(name)
        same_end(self.folder / "whole", self.folder / name)


def test_killed_in_training_and_in_saves(tmp_path):
    runs = Killed(tmp_path)
    draw = random.Random(1)
    runs.kill("run", "saving", 9, runs.SLOW * draw.random())
    assert list((tmp_path / "run" / "checkpoints").glob(".*")), "it was not killed inside a save"
    runs.kill("run", "step", 4, 0.0)
    runs.kill("run", "saving", 4, runs.SLOW * draw.random())
    runs.finish("run")


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    runs = Killed(tmp_path)
    draw = random.Random(2)
    inside = 0
    for i in range(50):
        event = ("saving", "step")[i % 2]
        number = draw.randint(1, runs.events.count(event))
        runs.kill(f"run-{i}", event, number, draw.random() * (runs.SLOW if event == "saving" else 0.01))
        inside += bool(list((tmp_path / f"run-{i}" / "checkpoints").glob(".*")))
        runs.finish(f"run-{i}")
    assert inside >= 20


@pytest.mark.parametrize("removed", [0, 1])
def test_killed_while_old_checkpoints_are_removed(tmp_path, monkeypatch, removed):
    """Killed at the last step: only the resume can remove old checkpoints, and none may be incomplete."""
    undisturbed = small_trainer(tmp_path, name="whole", valid_every=100, save_every=3)
    undisturbed.run()
    trainer = small_trainer(tmp_path, valid_every=100, save_every=3)
    remove = shutil.rmtree

    class Kill(BaseException):
        pass

    def killed(path, *args, **kwargs):
        if trainer.step == 8 and Path(path).name.startswith(".step-00000006.removed"):
            if removed:
                (Path(path) / "training.json").unlink()
            raise Kill
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Kill):
        trainer.run()
    monkeypatch.undo()
    resume_run(trainer.out).run()
    same_end(undisturbed.out, trainer.out)


def test_killed_before_old_checkpoints_are_removed(tmp_path, monkeypatch):
    undisturbed = small_trainer(tmp_path, name="whole", valid_every=100)
    undisturbed.run()
    trainer = small_trainer(tmp_path, valid_every=100)
    monkeypatch.setattr(saving, "prune", lambda run: None)
    trainer.run()
    monkeypatch.undo()
    assert len(run_folder.checkpoints(trainer.out)) == 2
    resume_run(trainer.out)
    same_end(undisturbed.out, trainer.out)


def full_disk(folder: str):
    """Return a `_sync` that finds no space for files of folders with this prefix."""
    sync = files._sync

    def full(path: Path) -> None:
        if any(part.startswith(folder) for part in path.parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    return full


def test_a_full_disk_stops_the_run_at_the_last_good_checkpoint(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, valid_every=100)
    monkeypatch.setattr(files, "_sync", full_disk(".step-00000008"))
    with pytest.raises(CannotWrite, match=r"step 8: no space left .*; the last good checkpoint is .*step-00000004$"):
        trainer.run()
    monkeypatch.undo()
    assert [p.name for p in (trainer.out / "checkpoints").iterdir()] == ["step-00000004"]
    resume_run(trainer.out).run()
    undisturbed = small_trainer(tmp_path, name="whole", valid_every=100)
    undisturbed.run()
    same_end(undisturbed.out, trainer.out)


def test_training_can_continue_on_a_full_disk(tmp_path, monkeypatch, caplog):
    trainer = small_trainer(tmp_path, steps=12, valid_every=100, full_disk="continue")
    monkeypatch.setattr(files, "_sync", full_disk(".step-00000008"))
    trainer.run()
    assert "step 8: no space left on the device" in caplog.text
    assert "step-00000004; training continues" in caplog.text
    assert "checkpoints works again after 1 failure" in caplog.text
    assert run_folder.newest(trainer.out).name == "step-00000012"


def test_the_last_checkpoint_must_be_written(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, valid_every=100, full_disk="continue")
    monkeypatch.setattr(files, "_sync", full_disk(".step-00000008"))
    with pytest.raises(CannotWrite, match="no space left"):
        trainer.run()


@pytest.mark.parametrize("full", ["stop", "continue"])
def test_a_full_disk_leaves_no_half_line_of_metrics(tmp_path, monkeypatch, full):
    trainer = small_trainer(tmp_path, full_disk=full)
    whole = small_trainer(tmp_path, name="whole", full_disk=full)
    whole.run()
    path, open_file = trainer.out / "metrics.jsonl", Path.open

    class Short:
        """A file on a disk with ten free bytes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, raw):
            return self.file.write(raw[:10])

    def opened(self, *args, **kwargs):
        file = open_file(self, *args, **kwargs)
        return Short(file) if self == path and trainer.step == 4 else file

    monkeypatch.setattr(Path, "open", opened)
    if full == "stop":
        with pytest.raises(CannotWrite, match=r"no space left on the device for .*metrics.jsonl"):
            trainer.run()
        assert metrics(trainer.out) == [line for line in metrics(whole.out) if line["step"] < 4]
    else:
        trainer.run()
        assert metrics(trainer.out) == metrics(whole.out)


def test_a_run_in_use_is_refused_and_its_user_named(tmp_path):
    trainer = small_trainer(tmp_path)
    with pytest.raises(InUse, match=rf"run is in use by process {os.getpid()} on \S+ since .*; wait until it ends"):
        resume_run(trainer.out)
    trainer.run()
    resume_run(trainer.out)


def test_the_error_names_the_process_that_holds_the_run(tmp_path):
    trainer = small_trainer(tmp_path)
    command = [sys.executable, "-m", "timemix", "train", "--resume", trainer.out]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert f"is in use by process {os.getpid()} on" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from timemix.storage.locks import FolderLock;"
        "lock = FolderLock(Path(sys.argv[1])); lock.take(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    child.wait()
    lock = FolderLock(tmp_path)
    lock.take()
    assert lock.taken_over is not None
    assert lock.taken_over.startswith(f"process {child.pid} on ")
    lock.release()
    lock.take()
    assert lock.taken_over is None


def test_a_config_of_the_kill_test_is_a_hard_one(tmp_path):
    """Saves occur between lines of metrics, lines between saves, and some checkpoints are saved for their loss."""
    made = config(write_text_file(tmp_path))
    train = made.train
    assert train.save_every % train.log_every
    assert train.save_every % train.valid_every
    assert made.model.dropout > 0
