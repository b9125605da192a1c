"""Measured steps, and the table and verdicts of a speed experiment."""

import json
import math

import pytest

from timemix.bench import measure
from timemix.bench.measure import StepFailure, StepSpeed, measure_training
from timemix.config.run import RunConfig, TrainConfig
from timemix.errors import DamagedFile, FileError, Unavailable
from timemix.experiments import speed
from timemix.experiments.spec import SpeedExperiment, SpeedVerdict
from timemix.experiments.speed import build_table, run_speed, slope
from timemix.experiments.variants import Variant
from timemix.models.registry import model_config
from timemix.storage.json_files import to_json


@pytest.mark.slow
def test_a_step_is_measured_in_its_own_process():
    model = model_config("rwkv1", layers=1, heads=2, channels=64, ctx_len=64, vocab_size=50)
    small = RunConfig(model=model, train=TrainConfig(batch_size=4, precision="float32"))
    large = RunConfig(model=model, train=TrainConfig(batch_size=128, precision="float32"))
    a, b = measure_training(small, steps=1), measure_training(large, steps=1)
    assert a.tokens_per_second == pytest.approx(4 * 64 / a.step_seconds)
    # 128 rows store at least the inputs of the three products of 64 channels, and their outputs.
    assert b.peak_memory > 128 * 64 * 64 * 4 * 6
    assert b.peak_memory > a.peak_memory


@pytest.mark.slow
def test_want_of_memory_is_an_error_of_that_size_alone():
    model = model_config("rwkv1", layers=1, heads=1, channels=16, ctx_len=2**20, vocab_size=50, backend="dense")
    assert measure_training(RunConfig(model=model, train=TrainConfig(batch_size=1)), steps=1) == StepFailure(
        "out of memory"
    )


def test_slope_of_power_laws():
    assert slope({t: 3.0 * t**2 for t in (64, 128, 256, 512)}) == pytest.approx(2)
    # The slope is fitted to the upper half.
    assert slope({64: 1.0, 128: 1.0, 256: 8.0, 512: 16.0}) == pytest.approx(1)
    assert slope({64: 2.0, 128: 4.0}) == pytest.approx(1)
    assert slope({64: 2.0}) is None


EXPERIMENT = SpeedExperiment(
    title="x",
    variants=(Variant("fast"), Variant("slow", {"model": {"arch": "mha_rotary"}}), Variant("large")),
    ctx_lens=(16, 32),
    tokens=64,
    rounds=3,
    verdicts=(
        SpeedVerdict("faster", "fast", "slow"),
        SpeedVerdict("slower", "slow", "fast"),
        SpeedVerdict("smaller", "fast", "slow", of="memory"),
        SpeedVerdict("fits", "fast", "large"),
        SpeedVerdict("does not", "large", "fast"),
    ),
)


def measured(config, steps):
    if config.model.arch == "mha_rotary":
        return StepSpeed(1.0, 100.0, 2 * 2**20)
    if measured.calls % 3 == 2:
        return StepFailure("out of memory")
    return StepSpeed(1.0, 200.0 + measured.calls, 2**20)


@pytest.fixture
def counted(monkeypatch):
    measured.calls = -1

    def call(config, steps):
        measured.calls += 1
        return measured(config, steps)

    monkeypatch.setattr(speed, "measure_training", call)


def test_verdicts_follow_the_ratios(counted, tmp_path):
    lines = []
    table = to_json(run_speed(EXPERIMENT, tmp_path / "out", lines.append))
    assert len(lines) == 2 * 3 * 3
    assert [v["verdict"] for v in table["verdicts"]] == [
        "holds",
        "does not hold",
        "holds",
        "holds: large runs out of memory",
        "does not hold: large runs out of memory",
    ]
    found = json.loads((tmp_path / "out" / "measurements.json").read_text())
    logs = [math.log(found[f"fast 32 {r}"]["tokens_per_second"] / 100) for r in range(3)]
    assert table["verdicts"][0]["ratio"]["mean"] == pytest.approx(math.exp(sum(logs) / 3))
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| large | - | - | - |" in text
    assert (tmp_path / "out" / "speed.png").stat().st_size > 5000


def test_what_is_measured_is_not_measured_again(counted, tmp_path):
    run_speed(EXPERIMENT, tmp_path / "out", lambda line: None)
    lines = []
    again = to_json(run_speed(EXPERIMENT, tmp_path / "out", lines.append))
    assert lines == []
    assert again["variants"][1]["memory"][32] == [2 * 2**20] * 3
    other = SpeedExperiment(title="x", variants=EXPERIMENT.variants, ctx_lens=(16,), tokens=64)
    with pytest.raises(FileError, match=r"different: ctx_lens"):
        run_speed(other, tmp_path / "out", lines.append)


def test_a_folder_of_something_else_is_refused(counted, tmp_path):
    (tmp_path / "table.md").write_text("my table")
    with pytest.raises(FileError, match="is not the folder of a comparison, and not empty"):
        run_speed(EXPERIMENT, tmp_path, lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "table.md"}


def test_damaged_measurements_name_the_file_to_remove(counted, tmp_path):
    run_speed(EXPERIMENT, tmp_path, lambda line: None)
    (tmp_path / "measurements.json").write_text("")
    with pytest.raises(DamagedFile, match="measurements.json is damaged; remove it to measure again"):
        run_speed(EXPERIMENT, tmp_path, lambda line: None)


def test_a_step_has_all_contexts_of_a_window(monkeypatch):
    shapes = []
    monkeypatch.setattr(measure, "_step", lambda model, optimizers, shape, *others: shapes.append(shape))
    monkeypatch.setattr(measure, "_limit_memory", lambda device: None)
    model = model_config("rwkv7", layers=1, heads=1, channels=64, ctx_len=16, vocab_size=50)
    found = measure._measure(RunConfig(model=model, train=TrainConfig(batch_size=4, contexts=3, accumulation=2)), 1)
    assert shapes[1:] == [(2, 48)] * 2
    assert found.tokens_per_second == pytest.approx(4 * 48 / found.step_seconds)


def test_a_folder_belongs_to_one_device(counted, tmp_path):
    path = tmp_path / "out" / "experiment.json"
    run_speed(EXPERIMENT, tmp_path / "out", lambda line: None, device="cpu")
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"device": "cuda"}))
    with pytest.raises(FileError, match=r"different: device\)"):
        run_speed(EXPERIMENT, tmp_path / "out", lambda line: None, device="cpu")
    # A folder of an earlier version does not name its device.
    del written["device"]
    path.write_text(json.dumps(written))
    run_speed(EXPERIMENT, tmp_path / "out", lambda line: None, device="cpu")


def test_other_failures_are_measured_again_and_decide_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "measure_training", lambda config, steps: StepFailure("illegal memory access"))
    table = to_json(run_speed(EXPERIMENT, tmp_path / "out", lambda line: None))
    assert {v["verdict"] for v in table["verdicts"]} == {"not compared"}
    assert json.loads((tmp_path / "out" / "measurements.json").read_text()) == {}
    with pytest.raises(Unavailable, match="device 'cuda:99'"):
        run_speed(EXPERIMENT, tmp_path / "other", lambda line: None, device="cuda:99")


def test_a_table_of_one_round_decides_nothing():
    one = SpeedExperiment(title="x", variants=(Variant("a"), Variant("b")), ctx_lens=(16,), tokens=64, rounds=1,
                          verdicts=(SpeedVerdict("c", "a", "b"),))  # fmt: skip
    found = {f"{n} 16 0": StepSpeed(1.0, s, None) for n, s in (("a", 2.0), ("b", 1.0))}
    assert build_table(one, found).verdicts[0].verdict == "undecided"
