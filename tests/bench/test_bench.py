"""Benchmarks: timed paths must first agree with the naive implementation, and reports print the measured figures."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.tiers import slow
from timemix.bench import baselines, race
from timemix.bench import op as bench_op
from timemix.bench import sample as bench_sample
from timemix.bench import train as bench_train
from timemix.bench.baselines import library_like, plain_wkv1
from timemix.cli.bench import bench as verb
from timemix.config.run import TrainConfig
from timemix.errors import InvalidValue
from timemix.generation.decode import build_step
from timemix.models.compiled_step import CompiledStep
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import WEIGHTS
from timemix.models.registry import list_architectures, model_config
from timemix.ops.common import fused
from timemix.ops.rwkv1.api import wkv1
from timemix.storage.json_files import to_json

SIZES = {"batch_size": 1, "heads": 2, "channels": 8, "seconds": 0.01, "device": "cpu"}


def test_the_naive_implementation_is_the_reference():
    k, v = torch.randn(2, 1, 7, 2, 3, dtype=torch.float64).unbind()
    f, alpha, beta = torch.randn(3, 2, 9, dtype=torch.float64).unbind()
    plain, _ = plain_wkv1(k, v, f, alpha, beta)
    torch.testing.assert_close(plain, wkv1(k, v, f, alpha, beta, backend="reference")[0])


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float32",)])
def test_the_op_in_each_form_and_its_ratio(dtypes, monkeypatch):
    """bfloat16 if the processor supports it; elsewhere it takes a hundred times as long."""
    monkeypatch.setattr(bench_op, "choose_precision", lambda *_: (dtypes[-1], "so it is"))
    found = bench_op.bench_op(ctx_lens=[33], say=lambda line: None, **SIZES)
    report = to_json(found)
    paths = {row["name"]: row for row in report["results"][0]["paths"]}
    assert list(paths) == [
        "plain float32",
        *(f"{form} {dtype}" for form in ("dense", "blocked", "spectral", "attention") for dtype in dtypes),
    ]
    for row in paths.values():
        assert row["tokens_per_second"] == pytest.approx(33 / row["seconds"])
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["rounds"] >= 3
    assert paths["plain float32"]["ratio"] == {"median": 1, "low": 1, "high": 1}
    words = race.to_markdown(found)
    taken = 1e3 * paths["blocked float32"]["seconds"]
    assert f"| blocked float32 | {taken:.{3 if taken <= 10 else 1}f} |" in words
    assert "GFLOP/s in float32" in words


def test_a_path_that_is_wrong_or_fails_gets_no_figure(monkeypatch):
    def wrong(k, v, *args, backend, **kwargs):
        if backend == "dense":
            raise RuntimeError("cannot\nat all")
        return 1.01 * wkv1(k, v, *args, backend=backend, **kwargs)[0], None

    monkeypatch.setattr(bench_op, "OP", wrong)
    found = bench_op.bench_op(ctx_lens=[33], say=lambda line: None, **SIZES)
    report = to_json(found)
    paths = {row["name"]: row for row in report["results"][0]["paths"]}
    assert paths["blocked float32"]["withheld"].startswith("parity failed: the error is 1.0e-02")
    assert paths["dense float32"]["withheld"] == "fails: cannot"
    assert "seconds" not in paths["dense float32"]
    assert "| blocked float32 | parity failed: the error is" in race.to_markdown(found)


@pytest.mark.parametrize(("name", "calls"), [("slow", 4), ("slow compiled", 5)])
def test_a_path_that_is_slower_than_the_race_is_warmed_up_once(name, calls):
    made, said = [], []

    def call():
        made.append(time.sleep(0.02))

    (path,) = race.race([race.Contender(name, call, 1)], 0.01, torch.device("cpu"), said.append)
    assert (len(made), path.rounds) == (calls, 3)
    assert said[-2:] == ["round 1 of 3 is done", "round 2 of 3 is done"]


def test_a_training_step_beside_others():
    model = model_config("rwkv1", vocab_size=11, layers=1, heads=2, channels=8, ctx_len=9)
    found = bench_train.bench_train(
        model, TrainConfig(batch_size=2, compile="off"), seconds=0.01, say=lambda line: None
    )
    report = to_json(found)
    paths = {row["name"]: row for row in report["results"][0]["paths"]}
    ours = next(row for name, row in paths.items() if name.startswith("rwkv1"))
    assert ours["tokens_per_second"] == pytest.approx(18 / ours["seconds"])
    assert paths["plain float32"]["parameters"] == ours["parameters"] != paths_named(paths, "mha_rotary")["parameters"]
    # Weights of the products: 4 in the time-mix, 3 of 24 and 1 in the channel-mix, the head; embedding as in 6 N D.
    weights = 4 * 64 + 3 * 8 * 24 + 64 + 2 * 11 * 8 + 2 * 2 * 9
    peak = report["machine"]["float32_peak"]
    assert paths["plain float32"]["share_of_peak"] == pytest.approx(
        6 * weights * paths["plain float32"]["tokens_per_second"] / peak
    )


@pytest.mark.skipif(not fused.available(), reason="there is no C compiler")
def test_a_step_with_and_without_c(monkeypatch):
    calls, raced = [], []
    gates = fused.gates
    monkeypatch.setattr(fused, "gates", lambda *args: calls.append(1) or gates(*args))
    monkeypatch.setattr(bench_train, "race", lambda contenders, *_: raced.extend(contenders) or [])
    model = model_config("rwkv1", vocab_size=11, layers=1, heads=2, channels=8, ctx_len=9)
    train = TrainConfig(batch_size=2, precision="float32", compile="off")
    bench_train.bench_train(model, train, seconds=0, say=lambda line: None)
    in_c = {}
    for contender in raced:
        calls.clear()
        if contender.name != bench_train.PLAIN:
            contender.call()
            in_c[contender.name] = len(calls)
    others = {"mha_rotary float32": 0, "transformers Llama float32": 0}
    assert in_c == {"rwkv1 float32": 1, "rwkv1 float32 by torch's operators": 0} | others


def paths_named(paths, beginning):
    return next(row for name, row in paths.items() if name.startswith(beginning))


def test_logits_that_differ_withhold_the_figure(monkeypatch):
    monkeypatch.setattr(baselines, "plain_wkv1", lambda k, v, *args: (v, None))
    model = model_config("rwkv1", vocab_size=11, layers=1, heads=2, channels=8, ctx_len=9)
    found = bench_train.bench_train(
        model, TrainConfig(batch_size=2, compile="off"), seconds=0.01, say=lambda line: None
    )
    report = to_json(found)
    rows = [row for row in report["results"][0]["paths"] if row["name"].startswith("rwkv1")]
    assert rows
    assert all(row["withheld"].startswith("parity failed: the logit error is") for row in rows)


def test_the_verb_writes_its_report(tmp_path, capsys):
    options = ["--ctx-lens", "5", "--channels", "8", "--heads", "2", "--seconds", "0.01", "--out", str(tmp_path / "b")]
    assert verb(["op", *options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "b" / "bench.json").read_text()) == printed
    assert "wkv1 alone" in (tmp_path / "b" / "bench.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["what"], "unknown verb 'bench what'; known: op, train, sample"),
        (["simple"], "unknown verb 'bench simple'; did you mean 'sample'?"),
        (["op", "--heads", "3"], "--heads 3 does not divide --channels 512; nearest divisors: 2, 4"),
        (["op", "--ctx-lens", "0"], "--ctx-lens is [0]; it must be one or more numbers, each at least 1"),
        (["op", "--seconds", "0"], "--seconds is 0.0"),
        (["train", "--model.arch", "mha_pro"], "choose model.arch rwkv1"),
        (["train", "huge"], "unknown preset 'huge'"),
    ],
)
def test_wrong_uses_end_in_one_sentence(arguments, words):
    with pytest.raises(InvalidValue) as error:
        verb(arguments)
    assert words in str(error.value)


WRITER = {"vocab_size": 11, "layers": 2, "heads": 2, "channels": 8, "ctx_len": 48}


@pytest.mark.parametrize("arch", ["rwkv1", slow("rwkv1_exp"), "llama", "mha_pro"])
def test_generation_beside_others(arch, tmp_path):
    found = bench_sample.bench_sample(model_config(arch, **WRITER), batches=[1, 3], seconds=0.01, say=lambda line: None)
    report = to_json(found)
    alone, batches, positions, first = report["results"]
    compiled = arch != "mha_pro"
    names = [row["name"] for row in alone["paths"]]
    assert names[:2] == ["recomputing the context float32", "the model's forward float32"]
    assert [n for n in names if n.startswith("step")] == ([f"step {w}" for w in WEIGHTS] if compiled else [])
    for row in alone["paths"]:
        assert row["tokens_per_second"] == pytest.approx(1 / row["seconds"])
        assert ("share_of_floor" in row) == row["name"].startswith("step")
    assert len(batches["paths"]) == (2 * len(WEIGHTS) if compiled else 2)
    for row in batches["paths"]:
        assert row["tokens_per_second"] == pytest.approx(int(row["name"].split()[0]) / row["seconds"])
    assert [row["name"] for row in positions["paths"]] == [f"position {p:,}" for p in bench_sample.POSITIONS]
    assert len({row["state_bytes"] for row in positions["paths"]}) == 1
    assert ("re-reading 24 tokens" in positions["title"]) == (arch != "rwkv1_exp")
    assert [row["name"] for row in first["paths"]][-1] == f"prompt of {192 if arch == 'rwkv1_exp' else 48}"
    words = race.to_markdown(found)
    assert "share of the floor" in words or not compiled
    bench_sample.draw_batches(found, tmp_path / "batches.png")
    assert (tmp_path / "batches.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arch", list_architectures())
def test_the_library_model_has_about_the_parameters_of_the_timed_model(arch, monkeypatch):
    class TheirModel(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    library = SimpleNamespace(LlamaConfig=SimpleNamespace, LlamaForCausalLM=TheirModel)
    monkeypatch.setitem(sys.modules, "transformers", library)
    model = model_config(arch, channels=96, ctx_len=32)
    theirs = library_like(model, torch.device("cpu")).config
    blocks = LanguageModel(model).blocks
    # 4 C^2 in attention, 3 C hidden in the feed-forward sublayer; `hidden` is a multiple of 8
    per_layer = 4 * 96**2 + 3 * 96 * theirs.intermediate_size
    assert abs(per_layer - sum(p.numel() for p in blocks.parameters()) / len(blocks)) <= 3 * 96 * 4
    if arch == "llama":
        assert theirs.intermediate_size == model.ffn_hidden


def test_a_step_that_is_wrong_gets_no_figure(monkeypatch):
    right = CompiledStep.__call__

    def wrong(self, *given):
        logits, state = right(self, *given)
        return 1.01 * logits, state

    monkeypatch.setattr(CompiledStep, "__call__", wrong)
    found = bench_sample.bench_sample(model_config("rwkv1", **WRITER), batches=[1], seconds=0.01, say=lambda line: None)
    report = to_json(found)
    paths = {row["name"]: row for row in report["results"][0]["paths"]}
    assert paths["step int8"]["withheld"].startswith("parity failed: the logit error is 1.0e-02")
    assert "tokens_per_second" in paths["the model's forward float32"]


def test_the_bytes_of_the_floor():
    model = LanguageModel(model_config("rwkv1", **WRITER))
    linear = 2 * (4 * 8 * 8 + 3 * 8 * 24 + 8 * 8) + 11 * 8
    total = sum(p.numel() for p in model.parameters())
    assert bench_sample._weight_bytes(model, "float32") == 4 * (total - 11 * 8)
    assert bench_sample._weight_bytes(model, "int8") == linear + 4 * (total - 11 * 8 - linear)
    head = 11 * 8
    assert bench_sample._weight_bytes(model, "int4") == (linear - head) * 18 // 32 + head + 4 * (
        total - 11 * 8 - linear
    )
    # Half of the history, the sums, and two rows for the token-shift.
    assert bench_sample._state_bytes(model, build_step(model), 24) == 2 * 4 * 8 * (24 + 1 + 2)


def test_sizes_that_cannot_be_written_are_refused():
    with pytest.raises(InvalidValue, match=r"--batches is \[0\]; it must be one or more numbers, each at least 1"):
        verb(["sample", "--batches", "0"])
