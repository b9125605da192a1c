"""Results that could differ on another device: ops, golden values, training, generation.

TIMEMIX_TEST_DEVICE names the device: `cuda` in benchmarks/gpu.py, otherwise the CPU, to keep these tests working.
"""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.helpers.golden import ARCHITECTURES, GOLDEN, TOLERANCE, Golden
from tests.helpers.models import VARIANTS, build
from tests.helpers.operators import assert_same, gradients_of
from tests.helpers.runs import small_config, with_model, write_text_file
from timemix.config.run import TrainConfig
from timemix.evaluation.loss import cross_entropy, loss_per_token
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.generation.session import load_session, save_session
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.ops.rwkv1.api import wkv1
from timemix.ops.rwkv1.state import wkv1_state
from timemix.runs.load import load
from timemix.training.optim import build_optimizers
from timemix.training.start import new_run, resume_run

DEVICE = torch.device(os.environ.get("TIMEMIX_TEST_DEVICE", "cpu"))
pytestmark = pytest.mark.cuda


def wkv1_results(x, backend, state):
    leaves = {name: a.detach().clone().requires_grad_() for name, a in x.items()}
    y, after = wkv1(*leaves.values(), state, backend=backend)
    values = {"y": y}
    if after is not None:
        values |= {"numerators": after.numerators, "denominators": after.denominators}
    found = values | gradients_of(values, leaves)
    return {name: a.detach().cpu().double() for name, a in found.items()}


@pytest.mark.parametrize("from_state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("length", [1, 17, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "dense", "blocked", "spectral"])
def test_wkv1_equals_the_reference_in_float64(backend, dtype, length, from_state):
    if backend == "reference" and length > 17:
        pytest.skip("the loop of the reference takes minutes on a device")
    B, H, N, ctx_len = 2, 2, 8, length + 5
    x = {name: torch.randn(B, length, H, N) for name in ("k", "v")}
    x |= {name: 0.5 + torch.rand(H, ctx_len) for name in ("f", "alpha", "beta")}
    x["k"], x["v"] = x["k"].to(dtype), x["v"].to(dtype)

    def state(to, device):
        if not from_state:
            return None
        begun = wkv1_state(B, H, N, ctx_len, dtype=to, device=device)
        _, after = wkv1(*(a[:, :5].to(device, to) for a in (before["k"], before["v"])), *tables(to, device), begun)
        return after

    def tables(to, device):
        return [x[name].to(device, to) for name in ("f", "alpha", "beta")]

    before = {name: torch.randn(B, 5, H, N) for name in ("k", "v")}
    exact = wkv1_results({n: a.double() for n, a in x.items()}, "reference", state(torch.float64, "cpu"))
    ours = wkv1_results({n: a.to(DEVICE) for n, a in x.items()}, backend, state(torch.float32, DEVICE))
    for name, a in exact.items():
        # The gradient of the first token's key is 0, so its rounding error has no relative size.
        worst = float((ours[name] - a).abs().max() / a.abs().max().clamp(min=1))
        assert worst <= (0.03 if dtype == torch.bfloat16 else 1e-5), (name, worst)


@pytest.mark.parametrize("name", VARIANTS)
def test_models_give_the_values_of_the_cpu(name):
    model = build(VARIANTS[name])
    tokens = torch.randint(11, (3, 12))
    there = build_like(model)

    def results(model, tokens):
        state = model.init_state(len(tokens))
        logits, _ = model(tokens)
        with torch.no_grad():
            first, state = model(tokens[:, :5], state)
            second, _ = model(tokens[:, 5:], state)
        values = {"logits": logits}
        found = {"carried": torch.cat([first, second], 1), **values}
        found |= gradients_of(values, dict(model.named_parameters()))
        return {n: a.detach().cpu() for n, a in found.items()}

    assert_same(results(there, tokens.to(DEVICE)), results(model, tokens), atol=1e-9, rtol=1e-9)


def build_like(model):
    there = LanguageModel(model.config).to(DEVICE, model.embedding.weight.dtype).eval()
    there.load_state_dict(model.state_dict())
    return there


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_golden_values(name, dtype):
    golden = Golden(name, dtype)
    model = golden.model.to(DEVICE)
    inputs, target = (golden.tensors[key].to(DEVICE) for key in ("input", "target"))
    logits, _ = model(inputs)
    loss = cross_entropy(logits, target)
    loss.backward()
    close = {"atol": TOLERANCE[dtype], "rtol": 0.0}
    torch.testing.assert_close(logits.cpu().double(), golden.tensors["logits"].double(), **close)
    for parameter, gradient in golden.group("grad").items():
        found = dict(model.named_parameters())[parameter].grad.cpu()
        torch.testing.assert_close(found.double(), gradient.double(), **close)
    (optimizer,) = build_optimizers(model, TrainConfig(lr=2e-3, weight_decay=0.01))
    losses = []
    for batch in golden.tensors["train.batches"].to(DEVICE):
        loss = cross_entropy(model(batch[:, :-1])[0], batch[:, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    np.testing.assert_allclose(losses, golden.tensors["train.losses"], atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["rwkv1", "rwkv1_exp", "mha_pro", "llama"])
def test_a_resumed_run_ends_with_the_same_bits(arch, precision, tmp_path):
    source = write_text_file(tmp_path)
    config = small_config(source, arch, precision=precision, device=str(DEVICE))
    config = with_model(config, dropout=0.1)
    whole = new_run(config, tmp_path / "whole")
    whole.run()
    stopped = new_run(config, tmp_path / "stopped")
    while stopped.step < 4:
        stopped.train_step()
    stopped.save()
    stopped.lock.release()
    resume_run(tmp_path / "stopped").run()
    runs = [load(tmp_path / name).model.state_dict() for name in ("whole", "stopped")]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_training_follows_the_cpu(tmp_path):
    source = write_text_file(tmp_path)
    curves = []
    for i, device in enumerate(("cpu", str(DEVICE))):
        config = small_config(source, precision="float64", device=device)
        trainer = new_run(config, tmp_path / str(i))
        curves.append([trainer.train_step() for _ in range(8)])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-9)


@pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:The CUDA Graph is empty")
def test_compiled_training_follows_uncompiled(tmp_path):
    if DEVICE.type == "cpu":
        pytest.skip("tests/training/test_compiling.py has it on the CPU")
    source = write_text_file(tmp_path)
    curves = []
    for compiled in ("off", "on"):
        config = small_config(source, precision="float32", device=str(DEVICE), compile=compiled)
        trainer = new_run(config, tmp_path / f"compile-{compiled}")
        curves.append([trainer.train_step() for _ in range(4)])
    np.testing.assert_allclose(curves[0], curves[1], rtol=2e-4)


@pytest.mark.parametrize("arch", ["rwkv1", "rwkv1_exp", "mha_shift", "llama"])
def test_generation_gives_the_tokens_of_the_cpu(arch):
    model = build(model_config(arch), vocab_size=50)
    texts = []
    for each in (model, build_like(model)):
        engine = Engine(each, slots=3)
        ids = [engine.add(Request([i, 3, 4][: i + 1], 20, Sampler(top_a=0.02), seed=5, sample=i)) for i in range(4)]
        found = {i: [] for i in ids}
        while engine.busy:
            for event in engine.step():
                found[event.id].append(event.token)
        texts.append(list(found.values()))
    assert texts[0] == texts[1]


def test_a_session_moves_between_devices(tmp_path):
    model = build(model_config("rwkv1"), dtype=torch.float32)
    there = build_like(model)
    parts = []
    engine = Engine(there)
    engine.add(Request([1, 2, 3], 6, keep_session=True))
    while engine.busy:
        events = engine.step()
        parts += [event.token for event in events]
    save_session(events[-1].session, tmp_path / "session", there)
    engine = Engine(model)
    engine.add(Request([], 6, start=load_session(tmp_path / "session", model)))
    while engine.busy:
        parts += [event.token for event in engine.step()]
    alone = Engine(model)
    alone.add(Request([1, 2, 3], 12))
    expected = []
    while alone.busy:
        expected += [event.token for event in alone.step()]
    assert parts == expected


def test_top_a_removes_what_the_original_removes():
    with safe_open(GOLDEN / "top_a.safetensors", "pt") as file:
        for i, case in enumerate(json.loads(file.metadata()["cases"])):
            sampler = Sampler(case["temperature"], top_a=case["ratio"], top_a_power=case["power"])
            found = sampler.probabilities(file.get_tensor(f"{i}.logits")[None].to(DEVICE))[0]
            torch.testing.assert_close(found, file.get_tensor(f"{i}.probabilities"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_evaluation_gives_the_loss_of_the_cpu(precision):
    model = build(model_config("rwkv1"), dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 11, 400).astype(np.uint16)
    expected = loss_per_token(model, tokens, precision="float32")
    found = loss_per_token(build_like(model), tokens, precision=precision)
    assert found == pytest.approx(expected, rel=1e-5 if precision == "float32" else 0.02)
