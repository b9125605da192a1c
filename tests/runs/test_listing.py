"""The list of runs: folders, progress and states."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import timemix
from tests.helpers.ends import stop_at
from tests.helpers.runs import save_another, small_trainer
from tests.helpers.tiers import examples
from timemix.cli.main import main
from timemix.errors import DamagedFile, FileError, Interrupted, MissingFile
from timemix.runs import listing, metrics
from timemix.runs.listing import RunSummary, list_runs
from timemix.runs.metrics import Metrics, newest_numbers, read_metrics
from timemix.storage.locks import FolderLock


@pytest.fixture
def runs(good, tmp_path):
    """A folder with runs at several depths, and with other folders."""
    folder = tmp_path / "runs"
    shutil.copytree(good, folder / "b")
    shutil.copytree(good, folder / "group/deep/a")
    shutil.copytree(good, tmp_path / "elsewhere")
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / ".hidden").mkdir()
    shutil.copytree(good, folder / ".hidden/run")
    (folder / "other").mkdir()
    (folder / "other/config.toml").write_text("name = 'of another program'")
    return folder


def change(run, **fields):
    """Change fields of the config."""
    path = run / "config.toml"
    lines = path.read_text().splitlines()
    named = [f"{line.split(' = ')[0]} = {fields.get(line.split(' = ')[0], line.partition(' = ')[2])}" for line in lines]
    path.write_text("\n".join(new if " = " in line else line for new, line in zip(named, lines, strict=True)))


def test_runs_are_found_at_any_depth(runs, good):
    found = list_runs(runs)
    assert [run.folder for run in found] == [str(runs / name) for name in ("b", "c", "group/deep/a")]
    loaded = timemix.load(good)
    lines = [json.loads(line) for line in (good / "metrics.jsonl").read_text().splitlines()]
    for run in found:
        assert (run.state, run.arch, run.step, run.steps) == ("complete", "rwkv1", 4, 4)
        assert run.parameters == sum(p.numel() for p in loaded.model.parameters())
        assert (run.loss, run.valid_loss) == (lines[-1]["loss"], lines[-1]["valid_loss"])
        assert 0 <= run.age < 600


def test_a_run_folder_is_a_list_of_one(good):
    assert [run.folder for run in list_runs(good)] == [str(good)]


def test_states(runs):
    change(runs / "b", steps=9)
    assert [run.state for run in list_runs(runs)] == ["stopped", "complete", "complete"]
    lock = FolderLock(runs / "b")
    lock.take()
    assert list_runs(runs)[0].state == "running"
    lock.release()
    assert list_runs(runs)[0].state == "stopped"


def test_an_early_stop_is_complete(tmp_path):
    trainer = small_trainer(tmp_path, steps=40, valid_every=1, patience=2, lr=0.0, lr_final=0.0)
    trainer.run()
    assert trainer.step < 40
    (found,) = list_runs(trainer.out)
    assert (found.state, found.step, found.steps) == ("complete", trainer.step, 40)


def test_a_run_whose_last_checkpoint_is_missing_is_not_complete(tmp_path):
    """The last line of metrics.jsonl is older than the last checkpoint, which a full disk or a kill may prevent."""
    trainer = small_trainer(tmp_path)
    with pytest.raises(Interrupted):
        trainer.run(stop_at(4))
    Metrics(trainer.out / "metrics.jsonl").write({"step": 8})
    (found,) = list_runs(trainer.out)
    assert (found.state, found.step, found.steps) == ("stopped", 8, 8)


def test_metrics_of_any_size_have_newest_numbers(runs, monkeypatch):
    path = runs / "b/metrics.jsonl"
    monkeypatch.setattr(metrics, "LARGEST_METRICS", path.stat().st_size - 1)
    monkeypatch.setattr(metrics, "TAIL", 8)
    assert list_runs(runs)[0].state == "complete"
    assert newest_numbers(runs / "b", ["step", "nothing"])["nothing"] is None
    with pytest.raises(FileError, match=r"metrics.jsonl has .* bytes, and timemix reads at most .*train.log_every"):
        read_metrics(runs / "b")


def test_a_killed_process_is_not_running(runs):
    code = f"""
import os
from pathlib import Path
from timemix.runs.metrics import newest_numbers
from timemix.storage.locks import FolderLock
FolderLock(Path({str(runs / "b")!r})).take()
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (runs / "b/.lock.json").exists()
    assert list_runs(runs)[0].state == "complete"


@pytest.mark.parametrize(
    ("holder", "state"),
    [
        ({"process": os.getpid(), "host": "another-machine", "time": 1.5e9}, "running"),
        # This process started later, so it is another process.
        ({"process": os.getpid(), "host": None, "time": 1.5e9}, "complete"),
        ({"process": 2**22 + 1, "host": None, "time": 1.5e9}, "complete"),
        ({"process": "x", "host": None, "time": 3}, "complete"),
        ({}, "complete"),
    ],
)
def test_the_file_that_names_the_holder_of_a_lock(runs, holder, state):
    if "host" in holder and holder["host"] is None:
        holder = holder | {"host": socket.gethostname()}
    (runs / "b/.lock.json").write_text(json.dumps(holder))
    assert list_runs(runs)[0].state == state


def test_a_run_before_its_first_checkpoint(runs):
    shutil.rmtree(runs / "b/checkpoints")
    (runs / "b/metrics.jsonl").write_text('{"step": 0, "tokens": 0, "seconds": 0.0, "valid_loss": 3.5}\n')
    run = list_runs(runs)[0]
    assert (run.state, run.parameters, run.step, run.loss, run.valid_loss) == ("stopped", None, 0, None, 3.5)


@pytest.mark.parametrize("damage", ["config.toml", "metrics.jsonl", "model.safetensors"])
def test_a_damaged_run_is_named_and_the_others_are_listed(runs, damage):
    (path,) = (runs / "b").rglob(damage) if damage == "model.safetensors" else [runs / "b" / damage]
    path.write_text("{{{\n{}\n")
    found = list_runs(runs)
    assert [run.state for run in found] == ["damaged", "complete", "complete"]
    assert damage in found[0].error
    assert found[0] == RunSummary(str(runs / "b"), "damaged", error=found[0].error)


def test_a_checkpoint_that_training_removes_meanwhile_is_no_damage(runs, monkeypatch):
    count, moves = listing.stored_parameters, [1]

    def after_the_training_moved_on(checkpoint):
        if moves[0]:
            moves[0] -= 1
            save_another(runs / "b")
        return count(checkpoint)

    expected = list_runs(runs)[0].parameters
    monkeypatch.setattr(listing, "stored_parameters", after_the_training_moved_on)
    run = list_runs(runs)[0]
    assert (run.state, run.parameters) == ("complete", expected)


@pytest.mark.parametrize("step", ["-5", "1e300"])
def test_an_impossible_step_is_damage(runs, step):
    (runs / "b/metrics.jsonl").write_text(f'{{"step": {step}, "loss": 1.0}}\n')
    assert list_runs(runs)[0].state == "damaged"
    assert "its newest step is" in list_runs(runs)[0].error


@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["step", "loss", "valid_loss"]), st.integers(0, 9), min_size=1)),
    end=st.sampled_from(["", '{"step": 3, "lo']),
    tail=st.integers(1, 60),
)
@examples(200)
def test_the_newest_numbers_are_those_of_all_lines(tmp_path_factory, rows, end, tail):
    """However little of the file is read first."""
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "TAIL", tail)
        found = newest_numbers(run, ("step", "loss", "valid_loss"))
    expected = {}
    for row in rows:
        expected |= row
    assert {name: value for name, value in found.items() if value is not None} == expected


def test_a_damaged_line_before_the_end_is_named(runs):
    path = runs / "b/metrics.jsonl"
    path.write_text(path.read_text() + "damage\n" + path.read_text())
    number = len(path.read_text().splitlines()) // 2 + 1
    with pytest.raises(DamagedFile, match=f"line {number} of .*metrics.jsonl is not a JSON object"):
        newest_numbers(runs / "b", ["loss"])


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_folder_that_cannot_be_read(runs, monkeypatch, error):
    inside = Path.iterdir

    def fail(folder):
        if folder == fails:
            raise error
        return inside(folder)

    monkeypatch.setattr(Path, "iterdir", fail)
    fails = runs / "group/deep"
    assert [run.folder for run in list_runs(runs)] == [str(runs / name) for name in ("b", "c")]
    fails = runs
    with pytest.raises(FileError, match=f"cannot read {runs}: {error.strerror}; check its p"):
        list_runs(runs)


def test_a_config_of_another_program_is_no_newer_version(runs):
    (runs / "b/config.toml").write_text("title = 'of another program'")
    (b, *_) = list_runs(runs)
    reason = "format_version is missing, so this is no config.toml of a run; restore it from a copy"
    assert b.error == f"{runs}/b/config.toml: {reason}"


def test_no_folder(tmp_path):
    with pytest.raises(MissingFile, match="there is no folder .*nothing; name the folder of your runs"):
        list_runs(tmp_path / "nothing")


def test_the_verb_prints_a_table(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs.parent)
    change(runs / "b", steps=10)
    old = time.time() - 3 * 3600
    os.utime(runs / "c/metrics.jsonl", (old, old))
    (runs / "group/deep/a/config.toml").write_text("x")
    with pytest.raises(SystemExit) as end:
        main(["runs"])
    assert not end.value.code
    head, b, c, a, error = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "arch", "parameters", "step", "loss", "valid", "age"]
    assert b.split()[:3] == ["b", "stopped", "rwkv1"]
    assert b.split()[4] == "4/10"
    assert c.endswith("  3 h")
    assert a.split() == ["group/deep/a", "damaged", *6 * "-"]
    assert error.startswith("group/deep/a: runs/group/deep/a/config.toml is damaged")
    # Numbers are aligned to the end of their heading.
    assert head.index("step") + 4 == b.index("4/10") + 4 == c.index("4/4") + 3


def test_the_verb_gives_json(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs.parent)
    with pytest.raises(SystemExit):
        main(["runs", "runs/b", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == "runs/b"
    (run,) = report["runs"]
    assert run.items() >= {"folder": "runs/b", "state": "complete", "step": 4, "steps": 4, "error": None}.items()


def test_the_verb_reports_a_folder_without_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main(["runs", "empty"])
    assert capsys.readouterr().out == "there is no run in empty; train one with: timemix train --out empty/NAME\n"
    with pytest.raises(SystemExit) as end:
        main(["runs"])
    assert end.value.code == 2
    assert "there is no folder runs" in capsys.readouterr().err


def test_the_list_needs_no_torch(runs):
    code = f"""
import sys
from timemix.cli.main import main
try:
    main(["runs", {str(runs)!r}])
finally:
    assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("complete") == 3
