"""RWKV-4 to RWKV-7: values, initial values and a training run of the original training code, and its names."""

import dataclasses
import itertools
import json

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.models import heads_of
from tests.helpers.original_code import ARCHS, GOLDEN, Golden, digest, weights_module
from timemix.config.run import TrainConfig
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.models.rwkv4.initial import EMBEDDING
from timemix.training.optim import build_optimizers, learning_rate

FORMULAS = {"rwkv4": 21, "rwkv5": 24, "rwkv6": 30, "rwkv7": 32}
"""Number of tensors whose initial values follow from a formula."""
STATE_NUMBERS = {"rwkv4": 5, "rwkv5": 2 + 16, "rwkv6": 2 + 16, "rwkv7": 2 + 16}
"""Numbers of a state per layer and channel, with two heads of 16 channels."""


@pytest.fixture(params=list(itertools.product(ARCHS, (torch.float64, torch.float32))), ids=lambda x: f"{x[0]}-{x[1]}")
def golden(request):
    return Golden(*request.param)


def small_config(arch, **fields):
    sizes = {"vocab_size": 19, "layers": 3, "channels": 32, "ctx_len": 16} | heads_of(arch, 2)
    return model_config(arch, **(sizes | fields))


@pytest.mark.parametrize("case", ["", "extreme."])
def test_logits_loss_and_gradients(golden, case):
    model = golden.model(case)
    logits, state = model(golden.input)
    assert state is None
    golden.close(logits[0, ::2], f"{case}logits", "extreme" if case else "logits")
    loss = F.cross_entropy(logits.flatten(0, 1), golden.target.flatten())
    golden.close(loss, f"{case}loss", "logits")
    loss.backward()
    names = golden.meta[f"{case}grad"]
    gradients = golden.converter.to_published({name: p.grad for name, p in model.named_parameters()})
    if not case:
        assert gradients.keys() == set(names)
    found = torch.stack([digest(gradients[name]) for name in names])
    golden.close(found, f"{case}grad", "extreme" if case else "gradients")


@pytest.mark.parametrize("case", ["", "extreme."])
def test_state_and_next_tokens(golden, case):
    model = golden.model(case)
    with torch.no_grad():
        _, state = model(golden.input, model.init_state(3))
    layers, kind = (state.layers[-1:], "extreme state") if case else (state.layers, "state")
    golden.close(torch.stack([layer["wkv"][0, ::2] for layer in layers]).squeeze(), f"{case}state.wkv", kind)
    shifts = [torch.stack([layer[f"{name}_shift"].squeeze(1) for name in ("mixer", "ffn")]) for layer in layers]
    golden.close(torch.stack(shifts).squeeze(), f"{case}state.shift", kind)
    if not case:
        steps = []
        with torch.no_grad():
            for token in golden.tensors["next.tokens"].unbind(1):
                logits, state = model(token[:, None], state)
                steps.append(logits)
        golden.close(torch.cat(steps, 1), "next.logits", "logits")


def test_l2wrap_adds_its_gradient_and_leaves_the_loss(golden):
    model = golden.model()
    logits, _ = model(golden.input)
    logits.retain_grad()
    loss = F.cross_entropy(logits.flatten(0, 1), golden.target.flatten())
    total = model.block.training_loss(model.config, loss, logits)
    assert torch.equal(total, loss)
    total.backward()
    golden.close(logits.grad[0, ::2], "grad_logits_l2wrap", "gradients")


def groups_of(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("run", ["train", "plain"])
def test_training_run(golden, run):
    """12 steps of the optimizer and the schedule, with L2Wrap (`train`) and without L2Wrap (`plain`)."""
    model, recorded = golden.model(), golden.meta["optimizer"]
    steps = recorded["exit_tokens"] // recorded["tokens_per_step"]
    config = TrainConfig(
        steps=steps,
        lr=recorded["lr_init"],
        lr_final=recorded["lr_final"],
        warmup=recorded["warmup_steps"] / steps,
        betas=tuple(recorded["betas"]),
        eps=recorded["eps"],
        weight_decay=recorded["weight_decay"],
    )
    recipe = model.block.recipe(model.config)
    (optimizer,) = build_optimizers(model, config, recipe=recipe)
    losses, norms, rates = [], [], []
    for step, batch in enumerate(golden.tensors["train.batches"].long()):
        rates.append(learning_rate(config, step, recipe.warmup_floor))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1] * group.get("lr_scale", 1.0)
        logits, _ = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        (model.block.training_loss(model.config, loss, logits) if run == "train" else loss).backward()
        losses.append(loss.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recorded["clip"]))
        optimizer.step()
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), golden.tensors["train.lr"])
    golden.close(torch.stack(losses), f"{run}.losses", "losses")
    golden.close(torch.stack(norms), f"{run}.grad_norm", "losses")
    final, _ = model(golden.input)
    golden.close(final[0, -8:], f"{run}.final_logits", "final logits")


@pytest.mark.parametrize("arch", ARCHS)
def test_groups_of_the_optimizer(arch):
    golden = Golden(arch, torch.float32)
    model, recorded = golden.model(), golden.meta["optimizer"]
    (optimizer,) = build_optimizers(model, TrainConfig(weight_decay=0.1), recipe=model.block.recipe(model.config))
    found = groups_of(optimizer, model)
    expected = {
        ours: group for group in recorded["groups"] for name in group["names"] for ours in golden.our_names(name)
    }
    assert found.keys() == expected.keys()
    for name, group in expected.items():
        assert (found[name].get("lr_scale", 1), found[name]["weight_decay"]) == (
            group["lr_scale"],
            group["weight_decay"],
        ), name


def is_orthogonal(weight, gain):
    """Return whether the rows or columns of a matrix, whichever are fewer, are orthonormal times a gain."""
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    return torch.allclose(short @ short.T / gain**2, torch.eye(len(short)), atol=1e-5)


def initial_cases():
    return [(arch, case) for arch in ARCHS for case in json.loads((GOLDEN / f"{arch}-initial.json").read_text())]


@pytest.mark.parametrize(("arch", "case"), initial_cases(), ids=lambda x: x if isinstance(x, str) else x["n_embd"])
def test_initial_values_of_every_kind(arch, case):
    sizes = {"vocab_size": case["vocab_size"], "channels": case["n_embd"], "layers": case["n_layer"]}
    sizes |= heads_of(arch, case["n_embd"] // max(1, case["head_size"]))
    model = LanguageModel(model_config(arch, **sizes))
    weights = weights_module(arch).to_published({name: p.detach() for name, p in model.named_parameters()})
    assert weights.keys() == case["tensors"].keys()
    for name, (kind, *values) in case["tensors"].items():
        weight = weights[name]
        if kind == "constant":
            assert torch.allclose(weight, torch.tensor(values[0]), rtol=1e-6, atol=0), name
        elif kind == "formula":
            found = torch.stack([weight.mean(), weight.std(correction=0), weight.min(), weight.max()])
            torch.testing.assert_close(found, torch.tensor(values), atol=1e-6, rtol=1e-6, msg=lambda m, n=name: n + m)
        elif kind == "uniform":
            # The original code of RWKV-4 takes the learning rate of the run.
            bound = EMBEDDING if arch == "rwkv4" else values[0]
            assert 0.99 * bound < weight.abs().max() <= bound, name
            assert abs(weight.mean()) < 0.05 * bound, name
        else:
            assert is_orthogonal(weight, values[0]), name


@pytest.mark.parametrize("arch", ARCHS)
def test_initial_values_of_the_formulas(arch):
    golden = Golden(arch, torch.float32)
    model, expected = LanguageModel(golden.model().config), golden.published("init")
    unused = {f"blocks.0.att.v{i}" for i in range(3)} if arch == "rwkv7" else set()
    found = golden.converter.to_published({name: p.detach() for name, p in model.named_parameters()})
    assert len(expected.keys() - unused) == FORMULAS[arch]
    for name in expected.keys() - unused:
        torch.testing.assert_close(found[name], expected[name].view_as(found[name]), atol=1e-6, rtol=1e-6)


SMALLEST = [{"layers": 1}, {"heads": 32}, {"heads": 1}, {"channels": 1, "heads": 1}]


@pytest.mark.parametrize(("arch", "fields"), list(itertools.product(ARCHS, SMALLEST)))
def test_initial_values_are_finite_at_the_smallest_sizes(arch, fields):
    """A formula divides by layers - 1, by channels - 1 and by the head size - 1."""
    if not heads_of(arch, 1):
        fields = {name: value for name, value in fields.items() if name != "heads"}
    model = LanguageModel(small_config(arch, **fields))
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(torch.randint(19, (2, 5)))[0].isfinite().all()


@pytest.mark.parametrize("arch", ARCHS)
def test_names_and_layouts_go_both_ways(arch):
    golden = Golden(arch, torch.float32)
    weights = golden.published("weights")
    ours = golden.converter.from_published(weights)
    assert {name: p.shape for name, p in golden.model().named_parameters()} == {n: x.shape for n, x in ours.items()}
    back = golden.converter.to_published(ours)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_state_is_float32_in_a_model_of_bfloat16_and_has_the_same_size_everywhere(arch):
    model = LanguageModel(small_config(arch)).bfloat16()
    state = model.init_state(2)
    size = state.nbytes
    with torch.no_grad():
        _, state = model(torch.randint(19, (2, 50)), state)
    assert {x.dtype for layer in state.layers for x in layer.values()} == {torch.float32}
    assert state.nbytes == size == 2 * (8 + 3 * 4 * 32 * STATE_NUMBERS[arch])


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_a_state_at_position_one_million_continues_like_any_other(arch):
    model = LanguageModel(small_config(arch)).eval()
    tokens = torch.randint(19, (2, 20))
    _, state = model(tokens, model.init_state(2))
    far = dataclasses.replace(state.clone(), position=torch.full((2,), 10**6))
    near_logits, near = model(tokens, state)
    far_logits, far = model(tokens, far)
    assert torch.equal(near_logits, far_logits)
    assert far.position.tolist() == [10**6 + 20] * 2
    assert far.nbytes == near.nbytes == model.init_state(2).nbytes
