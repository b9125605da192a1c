"""RWKV-5.2 and RWKV-6: values, initial values and a training run of the original training code, names, settings."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from timemix.config.run import TrainConfig
from timemix.errors import InvalidValue
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.models.rwkv6.weights import from_published, our_config, to_published
from timemix.training.optim import build_optimizers, learning_rate

GOLDEN = Path(__file__).parents[1] / "golden"
# In the extreme case, the state holds numbers of about 40.
TOLERANCE = {
    torch.float64: dict.fromkeys(
        ("logits", "gradients", "state", "losses", "final logits", "extreme", "extreme state"), 1e-9
    ),
    torch.float32: {
        "logits": 1e-5,
        "gradients": 1e-6,
        "state": 5e-5,
        "losses": 1e-5,
        "final logits": 5e-5,
        "extreme": 2e-5,
        "extreme state": 1e-4,
    },
}
ARCHS = ("rwkv5", "rwkv6")
SIZES = {"vocab_size": 19, "layers": 3, "heads": 2, "channels": 32, "ctx_len": 16}


class Golden:
    """Values of the original code (tests/golden/README.md), and a model with its weights in a given dtype."""

    def __init__(self, arch: str, dtype: torch.dtype) -> None:
        self.arch = arch
        with safe_open(GOLDEN / f"{arch}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.meta = {key: json.loads(value) for key, value in file.metadata().items()}
        self.dtype = dtype
        weights = self.published("weights")
        self.our_name = dict(zip(weights, from_published(weights), strict=True))
        self.input, self.target = self.tensors["input"].long(), self.tensors["target"].long()

    def published(self, prefix: str) -> dict[str, torch.Tensor]:
        start = f"{prefix}."
        return {name.removeprefix(start): x for name, x in self.tensors.items() if name.startswith(start)}

    def model(self, case: str = "") -> LanguageModel:
        """Return the model, whose weights are replaced by the extreme weights for the case "extreme."."""
        weights = self.published("weights") | (self.published("extreme.weights") if case else {})
        config = model_config(
            self.arch,
            vocab_size=self.meta["vocab_size"],
            layers=self.meta["n_layer"],
            heads=self.meta["n_head"],
            channels=self.meta["n_embd"],
            ffn_ratio=self.meta["dim_ffn"] / self.meta["n_embd"],
            group_norm_eps=self.meta["group_norm_eps"],
            ctx_len=self.meta["ctx_len"],
        )
        model = LanguageModel(config).to(self.dtype)
        model.load_state_dict(from_published(weights))
        return model

    def close(self, found: torch.Tensor, expected: str, kind: str) -> None:
        tolerance = TOLERANCE[self.dtype][kind]
        torch.testing.assert_close(found.double(), self.tensors[expected].squeeze(), atol=tolerance, rtol=0)


@pytest.fixture(params=itertools.product(ARCHS, TOLERANCE), ids=lambda pair: "-".join(map(str, pair)))
def golden(request):
    return Golden(*request.param)


def digest(x):
    """Return 22 entries of a tensor at equal distances, the sum and the norm, as the golden file stores gradients."""
    flat = x.double().flatten()
    return torch.stack([*flat[torch.linspace(0, len(flat) - 1, 22).long()], flat.sum(), flat.norm()])


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
    if not case:
        assert {golden.our_name[name] for name in names} == dict(model.named_parameters()).keys()
    found = torch.stack([digest(model.get_parameter(golden.our_name[name]).grad) for name in names])
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
    expected = {golden.our_name[name]: group for group in recorded["groups"] for name in group["names"]}
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
    model = LanguageModel(model_config(arch, heads=case["n_embd"] // case["head_size"], **sizes))
    weights = to_published({name: p.detach() for name, p in model.named_parameters()})
    assert weights.keys() == case["tensors"].keys()
    for name, (kind, *values) in case["tensors"].items():
        weight = weights[name]
        if kind == "constant":
            assert torch.allclose(weight, torch.tensor(values[0]), rtol=1e-6, atol=0), name
        elif kind == "formula":
            found = torch.stack([weight.mean(), weight.std(correction=0), weight.min(), weight.max()])
            torch.testing.assert_close(found, torch.tensor(values), atol=1e-6, rtol=1e-6, msg=lambda m, n=name: n + m)
        elif kind == "uniform":
            assert 0.99 * values[0] < weight.abs().max() <= values[0], name
            assert abs(weight.mean()) < 0.05 * values[0], name
        else:
            assert is_orthogonal(weight, values[0]), name


@pytest.mark.parametrize("arch", ARCHS)
def test_initial_values_of_the_formulas(arch):
    golden = Golden(arch, torch.float32)
    model, expected = LanguageModel(golden.model().config), golden.published("init")
    found = to_published({name: p.detach() for name, p in model.named_parameters()})
    assert len(expected) >= 24
    for name in expected:
        torch.testing.assert_close(found[name], expected[name].view_as(found[name]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("fields", [{"layers": 1}, {"heads": 32}, {"heads": 1}, {"channels": 1, "heads": 1}])
def test_initial_values_are_finite_at_the_smallest_sizes(arch, fields):
    """A formula divides by layers - 1 and by channels - 1."""
    model = LanguageModel(model_config(arch, **(SIZES | fields)))
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(torch.randint(19, (2, 5)))[0].isfinite().all()


@pytest.mark.parametrize("arch", ARCHS)
def test_names_and_layouts_go_both_ways(arch):
    golden = Golden(arch, torch.float32)
    weights = golden.published("weights")
    ours = from_published(weights)
    assert {name: p.shape for name, p in golden.model().named_parameters()} == {n: x.shape for n, x in ours.items()}
    back = to_published(ours)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("layers", [1, 3])
def test_settings_are_read_from_shapes(arch, layers):
    ranks = {"decay_rank": 24, "mixture_rank": 20} if arch == "rwkv6" else {}
    config = model_config(arch, **(SIZES | {"layers": layers, "ffn_ratio": 3.5} | ranks))
    weights = to_published(dict(LanguageModel(config).named_parameters()))
    assert our_config(weights, ctx_len=16) == config
    del weights[f"blocks.{layers - 1}.att.time_faaaa"]
    with pytest.raises(InvalidValue, match="the weights have no matrix 'blocks"):
        our_config(weights, ctx_len=16)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heads": 3}, "model.heads=3 does not divide model.channels=32; nearest divisors: 2, 4"),
        ({"ffn_ratio": 0.01}, "model.ffn_ratio is 0.01; it must be 0, or from 1 / model.channels to 1000"),
        ({"group_norm_eps": 0.0}, "model.group_norm_eps is 0.0; it must be above 0"),
        ({"l2wrap": -1.0}, "model.l2wrap is -1.0; it must be at least 0 and finite"),
    ],
)
def test_wrong_values_are_one_clear_sentence(arch, fields, sentence):
    with pytest.raises(InvalidValue, match=re.escape(sentence)):
        model_config(arch, **(SIZES | fields))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_state_is_float32_in_a_model_of_bfloat16_and_has_the_same_size_everywhere(arch):
    model = LanguageModel(model_config(arch, **SIZES)).bfloat16()
    state = model.init_state(2)
    size = state.nbytes
    with torch.no_grad():
        _, state = model(torch.randint(19, (2, 50)), state)
    assert {x.dtype for layer in state.layers for x in layer.values()} == {torch.float32}
    assert state.nbytes == size == 2 * (8 + 3 * 4 * (2 * 32 + 32 * 16))


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_a_state_at_position_one_million_continues_like_any_other(arch):
    model = LanguageModel(model_config(arch, **SIZES)).eval()
    tokens = torch.randint(19, (2, 20))
    _, state = model(tokens, model.init_state(2))
    far = dataclasses.replace(state.clone(), position=torch.full((2,), 10**6))
    near_logits, near = model(tokens, state)
    far_logits, far = model(tokens, far)
    assert torch.equal(near_logits, far_logits)
    assert far.position.tolist() == [10**6 + 20] * 2
    assert far.nbytes == near.nbytes == model.init_state(2).nbytes
