"""Every verb of the command line with a run of rwkv7."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.commands import run_command
from tests.helpers.runs import TEXT
from tests.helpers.tiers import slow
from timemix.cli.main import main
from timemix.config.run import read_toml

SIZES = "--model.layers 2 --model.channels 16 --model.heads 2 --model.ctx-len 16 --train.batch-size 4"
SHORT = [*SIZES.split(), "--train.steps", "6", "--train.valid-every", "3"]

EXPERIMENT = """
title = "small"
preset = "rwkv7-small"
tokens = 512
seeds = [1]
[base.model]
layers = 1
heads = 2
channels = 16
ctx_len = 16
[base.train]
batch_size = 4
valid_every = 100
[[variants]]
name = "seven"
[[variants]]
name = "first"
set.model.arch = "rwkv1"
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rwkv7")
    (folder / "my.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            main(["train", "rwkv7-small", "--data", "my.txt", "--out", "mine", "--tensorboard", *SHORT])
    assert not end.value.code
    return folder


@pytest.fixture
def use(capsys, trained, monkeypatch):
    """Run a command in the folder of the trained run; return stdout and stderr, after a success."""
    monkeypatch.chdir(trained)

    def call(*arguments):
        status, out, err = run_command(capsys, *arguments)
        assert status == 0, err
        return out, err

    return call


def test_the_preset_trains_rwkv7(trained):
    config = read_toml(trained / "mine/config.toml")
    assert (config.model.arch, config.data.order, config.train.eps) == ("rwkv7", "epoch", 1e-18)
    assert list((trained / "mine/tensorboard").iterdir())
    assert (trained / "mine/loss.png").stat().st_size > 3000


@pytest.mark.parametrize(
    "options",
    [
        "--train.precision float64",
        "--train.precision bfloat16 --train.optimizer muon",
        "--train.contexts 3 --train.accumulation 2 --model.dropout 0.2",
        slow("--train.recompute all --train.contexts 2"),
        slow("--train.recompute cheap"),
    ],
)
def test_training_with_other_settings(use, tmp_path, options):
    use("train", "rwkv7-small", "--data", "my.txt", "--out", tmp_path / "r", *SHORT, *options.split())
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["valid_loss"] < lines[0]["valid_loss"]


def test_longer_training_and_another_context(use, tmp_path):
    use("train", "rwkv7-small", "--data", "my.txt", "--out", tmp_path / "r", *SHORT)
    _, err = use("train", "--resume", tmp_path / "r", "--train.steps", 8)
    assert "after step 6" in err
    use("train", "--from", tmp_path / "r", "--out", tmp_path / "longer", "--model.ctx-len", 40, "--train.steps", 2)
    assert read_toml(tmp_path / "longer/config.toml").model.ctx_len == 40
    out, _ = use("eval", tmp_path / "longer", "--json")
    assert json.loads(out)["nats_per_token"] < 4


def test_losses_of_the_run_and_of_a_text(use, trained):
    out, _ = use("eval", "mine", "--json")
    last = json.loads((trained / "mine/metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(out)["nats_per_token"] == pytest.approx(last["valid_loss"], abs=1e-3)
    out, _ = use("eval", "mine", "--carry-state", "--json")
    assert json.loads(out)["nats_per_token"] != pytest.approx(last["valid_loss"], abs=1e-6)
    out, _ = use("eval", "mine", "--data", "my.txt", "--stride", 4)
    assert re.match(r"\d\.\d{4} nats per token", out)


def test_a_session_continues_the_text(use):
    options = ["--prompt", "the ", "--seed", 3, "--temperature", 0.7]
    whole, err = use("sample", "mine", "--tokens", 60, *options)
    first, _ = use("sample", "mine", "--tokens", 25, "--save-state", "a.state", *options)
    rest, _ = use("sample", "mine", "--tokens", 35, "--load-state", "a.state", *options[2:])
    assert first.removesuffix("\n") + rest == whole
    # The context has no end, so no token is processed a second time.
    assert "ctx_len" not in err


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_smaller_weights_generate_and_are_evaluated(use, weights):
    out, _ = use("sample", "mine", "--tokens", 20, "--count", 2, "--weights", weights, "--json")
    assert [len(text) for text in json.loads(out)["texts"]] == [20, 20]
    exact, _ = use("eval", "mine", "--json")
    rounded, _ = use("eval", "mine", "--weights", weights, "--json")
    assert json.loads(rounded)["nats_per_token"] == pytest.approx(json.loads(exact)["nats_per_token"], abs=0.02)


def test_inspect_prints_the_states(use):
    out, _ = use("inspect", "mine", "--tokens", 200, "--out", "pictures")
    assert len(re.findall(r"^ {4}[01] {5}[01](?: +[\d.,]+){7}$", out, re.MULTILINE)) == 2 * 2
    assert re.search(r"^layer 1: '.+' \d+\.\d\d \([\d,]+x\), ", out, re.MULTILINE)
    assert "share" not in out
    assert out.endswith("pictures/projections.png\npictures/states.png\n")
    out, _ = use("inspect", "mine", "--data", "my.txt", "--tokens", 200, "--out", "pictures", "--json")
    assert len(json.loads(out)["states"]["heads"]) == 2 * 2


def test_lists_plots_and_sizes(use, trained):
    out, _ = use("runs", ".")
    assert re.search(r"^mine +complete +rwkv7 ", out, re.MULTILINE)
    use("plot", "mine", "--out", "loss.svg")
    out, _ = use("info", "rwkv7-small")
    assert re.search(r"^arch +rwkv7$", out, re.MULTILINE)


def test_comparison_with_rwkv1_in_an_experiment_file(use, trained):
    Path("experiment.toml").write_text(EXPERIMENT)
    out, _ = use("compare", "experiment.toml", "--data", "my.txt", "--out", "comparison", "--json")
    rows = json.loads(out)["variants"]
    assert [row["name"] for row in rows] == ["seven", "first"]
    run = trained / "comparison/variants"
    archs = [read_toml(run / name / "seed-1/config.toml").model.arch for name in ("seven", "first")]
    assert archs == ["rwkv7", "rwkv1"]


def test_benchmarks(use, capsys):
    sizes = ["--model.layers", 1, "--model.channels", 16, "--model.heads", 2]
    status, _, err = run_command(capsys, "bench", "train", "rwkv7-small", *sizes)
    sentence = "--model.arch='rwkv7' has no naive implementation to compare with; choose --model.arch rwkv1"
    assert (status, err) == (2, f"timemix: {sentence}\n")
