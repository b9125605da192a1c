"""Files of timemix 0.1.0 still load, with the same results (tests/fixtures/version1/README.md)."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import timemix
from tests.helpers.commands import run_command

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
RUNS = ("rwkv1", "rwkv1_exp", "rwkv1_free", "mha_rotary", "mha_shift", "mha_pro")
STATES = ("rwkv1", "rwkv1_exp")
COMPARE = ("compare", "experiment.toml", "--device", "cpu", "--json", "--out")


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run a command in a copy of the fixtures, check that it succeeds, and return its standard output."""
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status, out, err = run_command(capsys, *arguments)
        assert status == 0, err
        return out

    return call


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def logits_of(run):
    loaded = timemix.load(run)
    tokens = torch.from_numpy(loaded.tokenizer.encode(EXPECTED["prompt"])).long()[None]
    with torch.no_grad():
        logits, _ = loaded.model(tokens)
    return logits[0]


def greedy(call, run, *options):
    report = call("sample", run, "--tokens", 30, "--temperature", 0, "--device", "cpu", "--json", *options)
    (text,) = json.loads(report)["texts"]
    return text


def evaluation(call, run, *options):
    return json.loads(call("eval", run, "--device", "cpu", "--json", *options))


def table_of(text):
    """Return a table without times and memory, which depend on the machine."""
    table = json.loads(text)
    for row in table["variants"]:
        for name in ("tokens_per_second", "seconds", "peak_memory"):
            del row[name]
    return json.loads(json.dumps(table))


def alike(found, expected, tolerance=1e-4):
    """Return whether nested values are equal, with a tolerance for numbers. New fields of dictionaries are allowed."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(n in found and alike(found[n], expected[n]) for n in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    if isinstance(expected, float):
        return found == pytest.approx(expected, abs=tolerance)
    return found == expected


def fields_of(config):
    """Return all fields of a config by their last name, at any depth."""
    found = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        found |= fields_of(value) if dataclasses.is_dataclass(value) else {f.name: value}
    return json.loads(json.dumps(found))


def files_under(folder):
    """Return the content of the files that training writes."""
    names = ("result.json", "metrics.jsonl", "config.toml", "*.safetensors")
    return {path: path.read_bytes() for name in names for path in sorted(Path(folder).rglob(name))}


@pytest.mark.parametrize("run", RUNS)
def test_logits(run):
    expected = torch.tensor(EXPECTED["logits"][run])
    torch.testing.assert_close(logits_of(FIXTURES / run), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("run", RUNS)
def test_model_config(run):
    fields = fields_of(timemix.load(FIXTURES / run).config.model)
    assert {name: fields.get(name) for name in EXPECTED["model"][run]} == EXPECTED["model"][run]


@pytest.mark.parametrize("run", RUNS)
def test_generate(run):
    assert timemix.generate(FIXTURES / run, "ko", tokens=30, seed=5) == [EXPECTED["generated"][run]]


@pytest.mark.parametrize("run", RUNS)
def test_greedy_text(call, run):
    assert greedy(call, run, "--prompt", EXPECTED["prompt"]) == EXPECTED["greedy"][run]


@pytest.mark.parametrize("run", RUNS)
def test_evaluate(call, run):
    assert alike(evaluation(call, run, "--data", "words.txt"), EXPECTED["evaluation"][run])


@pytest.mark.parametrize("run", ["rwkv1", "rwkv1_exp", "rwkv1_free", "mha_pro"])
def test_evaluate_held_out_text(call, run):
    assert alike(evaluation(call, run), EXPECTED["held_out"][run])


@pytest.mark.parametrize("run", STATES)
def test_saved_state(call, run):
    assert greedy(call, run, "--load-state", f"{run}.state") == EXPECTED["continued"][run]


def test_resume(call):
    before = lines_of("rwkv1/metrics.jsonl")
    call("train", "--resume", "rwkv1")
    lines = lines_of("rwkv1/metrics.jsonl")
    assert lines[: len(before)] == before
    assert [line["step"] for line in lines] == [0, 20, 40, 60, 80, 100, 120, 140, 160]
    assert alike(lines[-1], EXPECTED["resumed"])


def test_begin_with_the_weights(call):
    options = ("--train.steps", 4, "--train.valid-every", 4, "--train.batch-size", 2)
    call("train", "--from", "rwkv1_exp", "--out", "more", "--data", "words.txt", "--train.device", "cpu", *options)
    first, last = lines_of("more/metrics.jsonl")
    assert first["valid_loss"] == pytest.approx(EXPECTED["held_out"]["rwkv1_exp"]["nats_per_token"], abs=1e-4)
    assert last["step"] == 4


def test_convert(call):
    call("convert", "rwkv1", "--constant-state", 2, "--taps", 1, "--out", "converted", "--device", "cpu")
    old, new = (json.loads(Path(run, "convert.json").read_text()) for run in ("rwkv1_exp", "converted"))
    assert new["original"] == pytest.approx(old["original"], abs=1e-4)
    # Rounding determines where the fit ends.
    assert new["before"] == pytest.approx(old["before"], abs=1e-2)


def test_inspect(call):
    assert json.loads(call("inspect", "rwkv1", "--data", "words.txt", "--device", "cpu", "--json"))


def test_plot(call):
    call("plot", "rwkv1", "mha_pro", "--out", "both.png")
    assert Path("both.png").stat().st_size > 1000


def test_prepared_folder(call):
    options = ("--train.steps", 2, "--model.channels", 8, "--model.ctx-len", 8, "--train.device", "cpu")
    call("train", "--data", "prepared-subword", "--out", "run", *options)
    assert timemix.load("run").tokenizer.vocab_size == 280
    assert timemix.load("run").tokenizer.encode("tuso baso ko\n").tolist() == [259, 257, 273, 262, 198]


def test_experiment_file():
    from timemix.experiments.spec import read_experiment

    experiment = read_experiment(FIXTURES / "experiment.toml")
    found = {
        f"{variant.name} {number}": fields_of(experiment.config(variant, point, 1))
        for variant in experiment.variants
        for number, point in enumerate(experiment.tuning_points())
    }
    assert {job: {n: found[job].get(n) for n in fields} for job, fields in EXPECTED["configs"].items()} == (
        EXPECTED["configs"]
    )


def test_finished_comparison(call):
    before = files_under("comparison")
    assert alike(table_of(call(*COMPARE, "comparison")), EXPECTED["table"])
    assert files_under("comparison") == before


def test_finished_comparison_with_the_text_elsewhere(call, tmp_path):
    (tmp_path / "other").mkdir()
    moved = (tmp_path / "words.txt").rename(tmp_path / "other" / "moved.txt")
    before = files_under("comparison")
    assert alike(table_of(call(*COMPARE, "comparison", "--data", moved)), EXPECTED["table"])
    assert files_under("comparison") == before


def test_unfinished_comparison(call):
    before = files_under("comparison-half")
    assert alike(table_of(call(*COMPARE, "comparison-half")), EXPECTED["table"])
    after = files_under("comparison-half")
    for path in before:
        if "no-alpha/seed-1" not in path.as_posix():
            assert after[path] == before[path]
    resumed = Path("comparison-half/variants/no-alpha/seed-1/metrics.jsonl")
    # The lines before the stop still exist: the run was resumed, not restarted.
    assert after[resumed].startswith(before[resumed])
    assert lines_of(resumed)[-1]["step"] == 80


def test_unfinished_comparison_reuses_a_run_of_the_finished_one(call):
    Path("all").mkdir()
    Path("comparison").rename("all/comparison")
    assert alike(table_of(call(*COMPARE, "comparison-half", "--reuse", "all")), EXPECTED["table"])
    for seed in (1, 2):
        result = json.loads(Path(f"comparison-half/variants/no-alpha/seed-{seed}/result.json").read_text())
        assert Path(result["taken_from"]) == Path(f"all/comparison/variants/no-alpha/seed-{seed}")
