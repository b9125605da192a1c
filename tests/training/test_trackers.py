"""Trackers: what they send to each service, the ids of resumed runs, and what happens when a service fails."""

import csv
import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from tests.helpers.ends import stop_at
from tests.helpers.runs import small_trainer
from timemix.errors import CannotWrite, DamagedFile, HookFailed, Interrupted, InvalidValue, Unavailable
from timemix.runs.metrics import read_metrics
from timemix.storage.settings import to_dict
from timemix.training.start import resume_run
from timemix.training.trackers import COLUMNS, Csv, check_tracker, start_tracker


class FakeRun:
    """A run of a service, which notes each call."""

    def __init__(self, calls, id):
        self.calls, self.id, self.info = calls, id, types.SimpleNamespace(run_id=id)

    def log(self, data, step=None):
        self.calls.append(("log", data, step))

    def finish(self, exit_code=None):
        self.calls.append(("finish", exit_code))


def put_module(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__dict__.update(functions, __file__=f"{name}.py", __spec__=ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def wandb(monkeypatch):
    """A module with the functions and arguments of wandb that timemix calls."""
    calls = []

    def init(*, project, name, id, resume, dir, config, allow_val_change):
        calls.append(("init", project, name, id, resume, dir, config))
        return FakeRun(calls, id or "k3xw9a")

    def table(*, columns, data):
        return {"columns": columns, "data": data}

    monkeypatch.delenv("WANDB_DIR", raising=False)
    put_module(monkeypatch, "wandb", init=init, Table=table)
    return calls


@pytest.fixture
def mlflow(monkeypatch):
    """A module with the functions and arguments of MLflow that timemix calls."""
    calls = []

    def noted(name):
        return lambda *values, **named: calls.append((name, *values, named))

    def start_run(run_id=None, run_name=None):
        calls.append(("start_run", run_id, run_name))
        return FakeRun(calls, run_id or "0f3c")

    names = ("set_experiment", "log_params", "log_metrics", "log_text", "end_run")
    put_module(monkeypatch, "mlflow", start_run=start_run, **{name: noted(name) for name in names})
    return calls


def numbers_of(run: Path) -> list[tuple]:
    """Return the numbers of metrics.jsonl as the services get them."""
    return [({k: v for k, v in line.items() if k != "step"}, line["step"]) for line in read_metrics(run)]


def tracked(trainer, name, **options):
    trainer.run(hooks=[start_tracker(name, trainer.out, trainer.config, **options)], samples_at_end=True)


def stopped_then_resumed(tmp_path, name, **train):
    """Train to step 4, resume with more steps, and return the run folder."""
    trainer = small_trainer(tmp_path, sample_every=3, sample_prompts=("the cat",), **train)
    with pytest.raises(Interrupted):
        trainer.run(stop_at(4), hooks=[start_tracker(name, trainer.out, trainer.config)])
    tracked(resume_run(trainer.out, train={"steps": 10}), name)
    return trainer.out


def test_wandb_gets_the_numbers_settings_and_samples_of_one_run(tmp_path, wandb):
    out = stopped_then_resumed(tmp_path, "wandb")
    first, second = [call for call in wandb if call[0] == "init"]
    assert first[1:6] == ("timemix", "run", None, None, str(out))
    assert second[1:5] == ("timemix", "run", "k3xw9a", "allow")
    assert (first[6]["train"]["steps"], second[6]["train"]["steps"]) == (8, 10)
    logged = [call[1:] for call in wandb if call[0] == "log" and "samples" not in call[1]]
    assert logged == numbers_of(out)
    tables = [call[1:] for call in wandb if call[0] == "log" and "samples" in call[1]]
    assert [step for _, step in tables] == [3, 6, 9, 10]
    (row,) = tables[0][0]["samples"]["data"]
    assert tables[0][0]["samples"]["columns"] == ["step", "prompt", "text"]
    assert row[:2] == [3, "the cat"]
    assert f'--- step 3, prompt "the cat"\n{row[2]}\n\n' in (out / "samples.txt").read_text()
    assert [call[1] for call in wandb if call[0] == "finish"] == [1, 0]
    assert json.loads((out / "tracking.json").read_text()) == {"wandb": {"project": "timemix", "id": "k3xw9a"}}


def test_mlflow_gets_parameters_once_and_continues_the_run(tmp_path, mlflow):
    out = stopped_then_resumed(tmp_path, "mlflow")
    starts = [call for call in mlflow if call[0] in ("set_experiment", "start_run")]
    assert starts == [("set_experiment", "timemix", {}), ("start_run", None, "run"), ("start_run", "0f3c", None)]
    (parameters,) = [call[1] for call in mlflow if call[0] == "log_params"]
    assert parameters["model.channels"] == "16"
    assert parameters["train.lr"] == "0.01"
    assert len(parameters) == sum(map(len, to_dict(resume_run(out).config).values())) < 100
    logged = [(call[1], call[2]["step"]) for call in mlflow if call[0] == "log_metrics"]
    assert logged == numbers_of(out)
    files = {call[2]: call[1] for call in mlflow if call[0] == "log_text"}
    assert files["config.toml"] == (out / "config.toml").read_text()
    steps = [f"samples/step-{step:08d}.txt" for step in (3, 6, 9, 10)]
    assert list(files) == ["config.toml", *steps]
    assert "".join(files[name] for name in steps) == (out / "samples.txt").read_text()
    assert [call[1] for call in mlflow if call[0] == "end_run"] == ["FAILED", "FINISHED"]


@pytest.mark.slow
def test_trackio_stores_one_run_also_after_a_stop(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio", reason="the extra [trackio] is not installed")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "store")
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    out = stopped_then_resumed(tmp_path, "trackio")
    assert capsys.readouterr().out == ""
    storage = sqlite_storage.SQLiteStorage
    id = json.loads((out / "tracking.json").read_text())["trackio"]["id"]
    assert storage.get_runs("timemix") == [id]
    assert storage.get_run_config("timemix", id)["train"]["lr"] == 0.01
    logs = [{k: v for k, v in row.items() if k != "timestamp"} for row in storage.get_logs("timemix", id)]
    assert [row for row in logs if "samples" not in row] == [
        numbers | {"step": step} for numbers, step in numbers_of(out)
    ]
    tables = [row for row in logs if "samples" in row]
    assert [row["step"] for row in tables] == [3, 6, 9, 10]
    assert tables[0]["samples"]["_value"][0]["text"].startswith("the cat")


def rows_of(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_each_line_also_of_the_time_before(tmp_path):
    trainer = small_trainer(tmp_path)
    with pytest.raises(Interrupted):
        trainer.run(stop_at(4))
    (trainer.out / "metrics.csv").write_text("damaged")
    tracked(resume_run(trainer.out), "csv")
    lines, rows = read_metrics(trainer.out), rows_of(trainer.out)
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        assert line.keys() <= row.keys()
        assert row == {name: "" if line.get(name) is None else str(line[name]) for name in COLUMNS}
    assert not (trainer.out / "tracking.json").exists()


def test_rows_that_could_not_be_written_come_with_the_next(tmp_path):
    tracker = Csv(tmp_path)
    tracker({"step": 1, "loss": 3.5})
    path, tracker._path = tracker._path, tmp_path / "nowhere" / "metrics.csv"
    with pytest.raises(CannotWrite):
        tracker({"step": 2, "loss": 2.5})
    tracker._path = path
    tracker({"step": 3, "loss": 1.5})
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == [("1", "3.5"), ("2", "2.5"), ("3", "1.5")]


def test_another_project_starts_another_record(tmp_path, wandb):
    trainer = small_trainer(tmp_path)
    for project in ("a", None, "b", "b"):
        start_tracker("wandb", trainer.out, trainer.config, project)
    assert [(call[1], call[3]) for call in wandb] == [("a", None), ("a", "k3xw9a"), ("b", None), ("b", "k3xw9a")]


@pytest.mark.parametrize("content", ["", "[]", '{"wandb": 3}', '{"wandb": {"id": 7, "project": "a"}}'])
def test_a_damaged_file_of_ids_is_named(tmp_path, wandb, content):
    trainer = small_trainer(tmp_path)
    (trainer.out / "tracking.json").write_text(content)
    with pytest.raises(DamagedFile, match=r"tracking.json is damaged: "):
        start_tracker("wandb", trainer.out, trainer.config)


def test_what_is_wrong_is_said_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Unavailable, match=r"^wandb is not installed; run: pip install 'timemix\[wandb\]'$"):
        check_tracker("wandb", None)
    # wandb itself writes such a folder, which Python imports as an empty module.
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=r"^wandb is not installed"):
        check_tracker("wandb", None)
    sys.modules.pop("wandb", None)
    with pytest.raises(InvalidValue, match=r"^track_project='mine' has no effect on csv, which is a file; leave it"):
        check_tracker("csv", "mine")
    with pytest.raises(InvalidValue, match=r"^track_project='mine' needs --track; name a service$"):
        check_tracker(None, "mine")
    check_tracker("csv", None)


def test_a_service_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    def init(**arguments):
        raise SystemExit("no API key\nlog in first")

    put_module(monkeypatch, "wandb", init=init)
    trainer = small_trainer(tmp_path)
    with pytest.raises(
        Unavailable, match=r"^wandb does not start: SystemExit: no API key; correct the cause, or leave"
    ):
        start_tracker("wandb", trainer.out, trainer.config)
    assert not (trainer.out / "tracking.json").exists()


class Failing(Csv):
    """A tracker that fails at the calls named in `at`."""

    label = "failing"

    def __init__(self, *at):
        self.at, self.closed = at, []

    def _call(self, name):
        if name in self.at:
            raise ConnectionError("no route to host")

    def __call__(self, line):
        self._call("line")

    def samples(self, samples):
        self._call("samples")

    def close(self, *, complete):
        self.closed.append(complete)
        self._call("close")


@pytest.mark.parametrize(
    ("at", "warnings"),
    [
        (("samples",), ["tracker failing fails at the samples of step 4: ConnectionError: no route to host; training"]),
        (("close",), ["tracker failing fails at the end of the run: ConnectionError: no route to host"]),
        (
            ("line", "close"),
            [
                "tracker failing fails at step 0: Conn",
                "tracker failing fails at the end",
                "tracker failing failed until the",
            ],
        ),
    ],
)
def test_a_tracker_that_fails_is_reported_and_training_continues(tmp_path, caplog, at, warnings):
    trainer, tracker = small_trainer(tmp_path, sample_every=4), Failing(*at)
    trainer.run(hooks=[tracker])
    assert trainer.is_complete
    assert tracker.closed == [True]
    assert len(caplog.messages) == len(warnings)
    assert all(message.startswith(start) for message, start in zip(caplog.messages, warnings, strict=True))


@pytest.mark.parametrize(("at", "step"), [("line", 1), ("samples", 4), ("close", 8)])
def test_a_tracker_may_stop_the_run(tmp_path, caplog, at, step):
    trainer, tracker = small_trainer(tmp_path, sample_every=4, hook_errors="stop"), Failing(at)
    with pytest.raises(HookFailed, match="^tracker failing fails at .*: ConnectionError: no route to host; "):
        trainer.run(hooks=[tracker])
    assert caplog.messages == []
    assert tracker.closed == [step == 8]
    assert trainer.step == step
    assert resume_run(trainer.out).step == step


def test_a_failed_sample_at_the_end_is_no_silent_end(tmp_path):
    trainer = small_trainer(tmp_path, hook_errors="stop")
    with pytest.raises(HookFailed, match=r"at the samples of step 8: .*; the run in .*run is complete$"):
        trainer.run(hooks=[Failing("samples")], samples_at_end=True)
