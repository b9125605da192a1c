"""Drawing of runs in training: the picture follows the losses, and ends with the runs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.commands import run_command
from tests.helpers.runs import small_trainer
from timemix.cli import follow as following
from timemix.storage.locks import FolderLock


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(following, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(following, "LARGEST_SHARE", 1e6)
    return partial(run_command, capsys)


@pytest.fixture
def run(tmp_path):
    """A complete run."""
    trainer = small_trainer(tmp_path, steps=4)
    trainer.run()
    return trainer.out


def acting(monkeypatch, *actions):
    """Run the next action in each pause between two looks."""
    left = list(actions)
    monkeypatch.setattr(following.time, "sleep", lambda seconds: left.pop(0)())
    return left


def test_each_new_line_is_drawn_until_the_runs_end(call, run, monkeypatch):
    pictures, lock = [], FolderLock(run)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.unlink()
    lock.take()

    def look(text):
        pictures.append((run / "loss.png").read_bytes() if (run / "loss.png").exists() else None)
        metrics.write_text(text)

    def end():
        look("".join(lines))
        lock.release()

    left = acting(
        monkeypatch, partial(look, lines[0]), partial(look, "".join(lines[:2])), lambda: look("".join(lines[:2])), end
    )
    status, out, err = call("plot", "run", "--follow")
    assert (status, out, left) == (0, "run/loss.png\n", [])
    assert err.splitlines() == [
        "run/loss.png shows the newest losses; Ctrl-C ends the drawing, not the training",
        "cannot read run/metrics.jsonl: No such file or directory; waiting for the first losses",
        "run is complete: 4 steps",
    ]
    assert pictures[0] is None
    assert pictures[1] != pictures[2] == pictures[3] != (run / "loss.png").read_bytes()


def test_several_runs_are_drawn_to_the_end_of_the_last(call, run, monkeypatch, tmp_path):
    other = small_trainer(tmp_path, steps=8, name="other")
    other.run()
    other.lock.take()
    config = other.out / "config.toml"
    config.write_text(config.read_text().replace("steps = 8", "steps = 900"))
    acting(monkeypatch, lambda: None, other.lock.release)
    status, out, err = call("plot", "run", "other", "--follow", "--out", "both.png")
    assert (status, out) == (0, "both.png\n")
    assert Path("both.png").exists()
    assert err.splitlines()[1:] == [
        "run is complete: 4 steps",
        "other is stopped at step 8 of 900, and no process trains it; resume it with: timemix train --resume other",
    ]


def test_a_run_that_no_process_trains_is_drawn_once(call, run):
    status, out, err = call("plot", "run", "--follow")
    assert (status, out, err) == (0, "run/loss.png\n", "run is complete: 4 steps\n")


@pytest.mark.parametrize(
    ("others", "way"), [([], "name another run"), (["run"], "draw the others with: timemix plot run --follow")]
)
def test_a_run_that_is_removed_meanwhile(call, run, monkeypatch, others, way):
    lock = FolderLock(Path(shutil.copytree(run, "other")))
    lock.take()
    acting(monkeypatch, lambda: shutil.rmtree("other"))
    status, out, err = call("plot", *others, "other", "--follow", "--out", "both.png")
    lock.release()
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"timemix: other was removed meanwhile; {way}"
    assert "is damaged" not in err


def test_a_missing_run_is_named(call, run):
    status, _, err = call("plot", "run", "nope", "--follow")
    assert (status, err) == (2, "timemix: there is no run folder nope; the runs in . are run\n")


def test_a_run_without_losses_that_nothing_trains_is_an_error(call, run):
    (run / "metrics.jsonl").write_text("")
    status, _, err = call("plot", "run", "--follow")
    assert status == 2
    assert "run/metrics.jsonl has no losses yet; plot again when the run has trained further" in err


@pytest.mark.slow
def test_ctrl_c_ends_the_drawing(run):
    lock = FolderLock(run)
    lock.take()
    command = [sys.executable, "-m", "timemix", "plot", "run", "--follow"]
    process = subprocess.Popen(command, cwd=run.parent, stderr=subprocess.PIPE, text=True, env=os.environ)
    while not (run / "loss.png").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    lock.release()
    assert process.returncode == 130
    assert "Traceback" not in err
