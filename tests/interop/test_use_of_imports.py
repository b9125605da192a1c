"""Use of imported weights: mapped from the file for generation, in float32 for training, and in rwkv7-hf."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch

import timemix
from tests.helpers.commands import run_command
from tests.helpers.published import TEXT, expected, imported, published_weights
from timemix.cli.train import train_options
from timemix.config.run import RunConfig, TrainConfig
from timemix.errors import InvalidValue
from timemix.generation.decode import build_step
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.generation.session import load_session, save_session
from timemix.interop.export import export_run
from timemix.interop.importing import import_run
from timemix.models.language_model import build_model
from timemix.models.rwkv7.weights import to_published
from timemix.runs.load import load
from timemix.runs.metrics import read_metrics
from timemix.tokenizers.make import train_tokenizer
from timemix.training.start import new_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of published weights in bfloat16."""
    return imported(tmp_path_factory.mktemp("imported"))


def test_mapped_weights_have_the_types_of_the_file(run):
    model = load(run, mapped=True).model
    assert model.is_mapped
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    assert not load(run).model.is_mapped


def test_a_mapped_model_generates_the_same_tokens(run):
    """Generation in float32 is exact, because float32 holds every number of bfloat16."""
    mapped, copied = load(run, mapped=True), load(run)
    for backend in ("auto", "model"):
        steps = [build_step(each.model, backend=backend) for each in (mapped, copied)]
        tokens, rows = expected()["input"][0], torch.zeros(1, dtype=torch.int64)
        counts = torch.tensor([len(tokens)])
        a, b = (step(tokens, copied.model.init_state(1), rows, counts)[0] for step in steps)
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert timemix.generate(mapped, "the ", tokens=30) == timemix.generate(copied, "the ", tokens=30)
    assert mapped.model.is_mapped


@pytest.mark.parametrize("part", ["emb", "head", "ln_out", "att.w0", "ffn.key", ""])
@pytest.mark.parametrize("backend", ["auto", "model"])
def test_weights_in_float64_among_others(tmp_path, part, backend):
    original = {name: x.double() if part in name else x for name, x in published_weights().items()}
    torch.save(original, tmp_path / "a.pth")
    model = load(imported(tmp_path, tmp_path / "a.pth"), mapped=True).model
    tokens, rows = expected()["input"][0], torch.zeros(1, dtype=torch.int64)
    step = build_step(model, backend=backend)
    logits, _ = step(tokens, model.init_state(1), rows, torch.tensor([len(tokens)]))
    assert step.compiled == (backend == "auto")
    torch.testing.assert_close(logits[0].double(), expected()["logits"][0, -1], atol=1e-5, rtol=0)


def test_a_session_of_a_mapped_model_belongs_to_the_model_in_float32(run, tmp_path):
    mapped, copied = load(run, mapped=True), load(run)
    engine = Engine(mapped.model, mapped.tokenizer)
    number = engine.add(Request([1, 2, 3], 5, Sampler()))
    engine.step()
    save_session(engine.session(number), tmp_path / "session.safetensors", mapped.model)
    assert load_session(tmp_path / "session.safetensors", copied.model).tokens[:3] == (1, 2, 3)


def fine_tuning(run, folder, **train) -> RunConfig:
    text = folder / "my.txt"
    text.write_text(TEXT)
    config = load(run).config
    settings = {"steps": 30, "lr": 1e-3, "precision": "float32", "log_every": 1, "valid_every": 30}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=str(text)),
        train=dataclasses.replace(config.train, **(settings | train)),
        start=str(run),
    )


def test_fine_tuning_trains_float32_copies_of_the_weights(run, tmp_path):
    trainer = new_run(fine_tuning(run, tmp_path), tmp_path / "next")
    before = load(run, mapped=True).model.state_dict()
    assert all(torch.equal(x, before[name].float()) for name, x in trainer.model.state_dict().items())
    assert {x.dtype for x in trainer.model.parameters()} == {torch.float32}
    trainer.run()
    losses = [row["valid_loss"] for row in read_metrics(tmp_path / "next") if "valid_loss" in row]
    assert losses[-1] < losses[0] - 1
    assert {x.dtype for x in load(tmp_path / "next", mapped=True).model.parameters()} == {torch.float32}


def test_a_fine_tuned_model_is_exported(run, tmp_path):
    """The unused tensors of the import belong to other weights, so they are not exported."""
    new_run(fine_tuning(run, tmp_path, steps=1), tmp_path / "next").run()
    export_run(tmp_path / "next", "pth", tmp_path / "out")
    weights = torch.load(tmp_path / "out/model.pth", weights_only=True)
    assert {x.dtype for x in weights.values()} == {torch.float32}
    assert "blocks.0.att.v0" not in weights
    again = imported(tmp_path, tmp_path / "out/model.pth")
    ours, theirs = (load(each).model.state_dict() for each in (tmp_path / "next", again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_fine_tuning_needs_a_text(run, tmp_path):
    config = dataclasses.replace(fine_tuning(run, tmp_path), data=load(run).config.data)
    with pytest.raises(InvalidValue, match="data.source is missing, because imported weights have no text"):
        new_run(config, tmp_path / "next")
    assert not (tmp_path / "next").exists()


def test_the_train_command_needs_no_number_of_steps(run):
    """The run of an import has 0 steps."""
    assert load(run).config.train.steps == 0
    assert train_options(["--from", str(run), "--data", "my.txt", "--out", "next"]).train.steps == TrainConfig.steps


def test_the_train_command(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT)
    options = ("--train.steps", 2, "--train.batch-size", 1)
    status, _, err = run_command(capsys, "train", "--from", run, "--data", "my.txt", "--out", "next", *options)
    assert status == 0
    assert re.search(r"are in bfloat16; training updates copies in float32, and needs about 0.\d GiB of memory", err)
    assert err.index("GiB of memory") < err.index("step ")
    status, _, err = run_command(capsys, "train", "--from", run, "--out", "other")
    assert status == 2
    assert err.startswith("timemix: --data.source is missing, because imported weights have no text; name a text")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_of_rwkv7_hf(run, tmp_path, dtype):
    library = pytest.importorskip("rwkv7_hf.modeling_rwkv7", reason="needs the extra rwkv7-hf")
    export_run(run, "hf", tmp_path / "hf", form="native")
    model = library.RWKV7ForCausalLM.from_pretrained(tmp_path / "hf", dtype=getattr(torch, dtype)).float().eval()
    with torch.no_grad():
        logits = model(expected()["input"]).logits
    torch.testing.assert_close(logits.double(), expected()["logits"], atol=1e-5, rtol=0)


MEASURE = """
import re, sys
from timemix.generation.generate import generate
from timemix.runs.load import load

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024

generate(load(sys.argv[1], mapped=True), "the ", tokens=2, weights="bfloat16")
before = peak()
generate(load(sys.argv[2], mapped=True), "the ", tokens=2, weights="bfloat16")
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_of_generation(run, tmp_path):
    """Generation takes at most 1.15 x the weights in the type in which they are used, here 122 MB.

    16 MiB more are for what does not grow with the weights: buffers, freed blocks, the last huge page of each region.
    """
    sizes = {"vocab_size": 32768, "layers": 8, "channels": 512, "heads": 8}
    model = build_model("rwkv7", **sizes).bfloat16()
    torch.save(to_published(model.state_dict()), tmp_path / "large.pth")
    letters = "".join(map(chr, range(32, 32768 + 32)))
    train_tokenizer("character", letters).save(tmp_path / "large.json")
    import_run(tmp_path / "large.pth", tmp_path / "large", tmp_path / "large.json")
    arguments = [sys.executable, "-c", MEASURE, str(run), str(tmp_path / "large")]
    found = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert int(found) < 1.15 * 2 * sum(x.numel() for x in model.parameters()) + 2**24
