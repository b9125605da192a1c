"""An architecture registered from outside the package: every method of its block is called, and everything works."""

import json
import os
import signal
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timemix
from tests.helpers.runs import small_trainer
from timemix.config.run import TrainConfig
from timemix.errors import Interrupted
from timemix.evaluation.inspect import inspect_run
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.block import Block, Kept, Recipe
from timemix.models.layers.initial import set_weights
from timemix.models.layers.linear import Linear
from timemix.models.registry import ARCHITECTURES, Architecture, model_config
from timemix.models.size import flops_per_token
from timemix.training.memory import training_memory
from timemix.training.optim import learning_rate
from timemix.training.start import new_run, resume_run


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    arch: str = "toy"
    heads: int = 1
    decay: float = 0.5
    """Share of the running mean that a token leaves."""


class ToyBlock(Block):
    """A running mean over time; every later layer adds the output of the first layer."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.config, self.layer = config, layer
        self.mixer_norm = nn.LayerNorm(config.channels)
        self.mixer = nn.ModuleDict({"value": Linear(config.channels, config.channels)})
        self.curve = nn.Parameter(torch.zeros(config.ctx_len))

    def init_state(self, batch_size):
        return {"mean": self.curve.new_zeros(batch_size, self.config.channels)}

    def forward(self, x, state=None, carry=None, position=None, lengths=None):
        value = self.mixer["value"](self.mixer_norm(x))
        # The value of the first layer is passed on to later layers, within a token.
        carry = value if carry is None else carry
        mean = value.new_zeros(value[:, 0].shape) if state is None else state["mean"]
        rows, counts = [], lengths
        for t in range(x.shape[1]):
            new = torch.lerp(value[:, t], mean, self.config.decay)
            mean = new if counts is None else torch.where((t < counts)[:, None], new, mean)
            rows.append(new)
        target = torch.arange(x.shape[1]) + (0 if position is None else position[:, None])
        scale = 1 + self.curve[target.clamp(max=self.config.ctx_len - 1)][..., None]
        y = (torch.stack(rows, 1) + carry) * scale
        return x + torch.tanh(y), None if state is None else {"mean": mean}, carry

    @classmethod
    def input_norm(cls, config):
        return nn.LayerNorm(config.channels)

    @classmethod
    def final_norm(cls, config):
        return nn.RMSNorm(config.channels, eps=1e-5)

    @classmethod
    def set_initial_values(cls, model):
        set_weights(model, lambda _, module: nn.init.normal_(module.weight, std=0.05))

    @classmethod
    def training_loss(cls, config, loss, logits):
        return loss + 1e-3 * logits.float().square().mean()

    @classmethod
    def recipe(cls, config):
        return Recipe(lr_scale=((".curve", 2.0),), decay_all_matrices=True, warmup_floor=0.25)

    @classmethod
    def mixing_flops(cls, config):
        return config.layers * 3 * config.channels

    @classmethod
    def kept(cls, config, rows):
        return Kept(8 * config.channels, 2 * config.channels, 17)

    @classmethod
    def resized(cls, weights, config, ctx_len):
        curves = {name: x for name, x in weights.items() if name.endswith(".curve")}
        return weights | {name: F.pad(x, (0, ctx_len - len(x))) for name, x in curves.items()}

    @classmethod
    def forms(cls, config, precision, device, resets=False):
        return {"mean": "loop (the only one)"}

    @property
    def shifted(self):
        return 2

    def tables(self):
        return {"gamma": 1 + self.curve}

    def projections(self):
        return {("mixer", "value"): self.mixer["value"]}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    toy = Architecture("toy", ToyConfig, f"{__name__}:ToyBlock", 2026, "purple", "a running mean")
    monkeypatch.setitem(ARCHITECTURES, "toy", toy)


def trainer(tmp_path, name="run", **train):
    settings = {"weight_decay": 0.1, "warmup": 0.25, "seed": 3, "precision": "float32", "compile": "off"}
    return small_trainer(tmp_path, "toy", name, **(settings | train))


def toy(**fields):
    torch.manual_seed(2)
    return LanguageModel(model_config("toy", vocab_size=9, ctx_len=12, layers=3, channels=8, **fields)).double()


def test_the_parts_around_the_blocks_are_its_own():
    model = toy()
    assert isinstance(model.input_norm, nn.LayerNorm)
    assert isinstance(model.norm, nn.RMSNorm)
    assert abs(model.head.weight.std() - 0.05) < 0.01
    assert not model.head.weight.isnan().any()


def test_the_carry_crosses_layers_with_and_without_a_state():
    model, tokens = toy(), torch.randint(9, (2, 12))
    carries: list[Tensor | None] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: carries.append(inputs[2]))
    with torch.no_grad():
        whole, _ = model(tokens)
        assert carries[0] is None
        assert carries[1] is carries[2] is not None
        lengths = torch.tensor([7, 4])
        first, state = model(tokens[:, :8], model.init_state(2), lengths=lengths)
        step, _ = model(torch.stack([row[n] for row, n in zip(tokens, [7, 4], strict=True)])[:, None], state)
    for row, n in enumerate([7, 4]):
        torch.testing.assert_close(first[row, :n], whole[row, :n])
        torch.testing.assert_close(step[row, 0], whole[row, n])


@pytest.mark.parametrize("recompute", ["cheap", "all"])
def test_recomputing_keeps_the_carry(recompute):
    tokens, gradients = torch.randint(9, (2, 12)), []
    for how in ("none", recompute):
        model = toy()
        model.recompute = how
        model(tokens)[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def stop_at(step):
    def watch(progress):
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
def test_it_trains_and_resumes_to_the_same_bytes(tmp_path, recompute):
    run = trainer(tmp_path, recompute=recompute)
    newest = run.run()
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["valid_loss"] < lines[0]["valid_loss"]
    config = replace(run.config, data=replace(run.config.data, source=str(tmp_path / "text.txt")))
    with pytest.raises(Interrupted):
        new_run(config, tmp_path / "stopped").run(stop_at(3))
    resumed = resume_run(tmp_path / "stopped")
    assert resumed.step == 3
    again = resumed.run()
    for name in ("model.safetensors", "training.safetensors"):
        assert (again / name).read_bytes() == (newest / name).read_bytes()


def test_the_recipe_reaches_the_optimizer(tmp_path):
    run = trainer(tmp_path)
    (optimizer,) = run.optimizers
    names = {id(p): name for name, p in run.model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(names)
    for name, group in found.items():
        matrix = name in ("embedding.weight", "head.weight") or name.endswith("value.weight")
        assert group["weight_decay"] == (0.1 if matrix else 0)
        assert group.get("lr_scale", 1) == (2 if name.endswith("curve") else 1)
    run.train_step()
    train = run.config.train
    first = train.lr * 0.25
    assert learning_rate(train, 0, 0.25) == pytest.approx(first)
    assert found["blocks.0.curve"]["lr"] == pytest.approx(2 * first)
    assert found["head.weight"]["lr"] == pytest.approx(first)


def test_the_training_loss_has_its_own_term(tmp_path):
    run = trainer(tmp_path)
    inputs, targets = (torch.from_numpy(x) for x in run.batches(0))
    logits, _ = run.model(inputs)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(run.batch_loss(inputs, targets), plain + 1e-3 * logits.square().mean())


def test_it_is_sampled_evaluated_inspected_and_extended(tmp_path):
    run = trainer(tmp_path)
    run.run()
    loaded = timemix.load(run.out)
    whole = timemix.generate(loaded, "the ", tokens=8, seed=1)[0]
    engine = Engine(loaded.model)
    engine.add(Request(loaded.tokenizer.encode("the ").tolist(), tokens=8, seed=1))
    assert loaded.tokenizer.decode([e.token for _ in range(8) for e in engine.step()]) == whole
    report = inspect_run(loaded, loaded.tokenizer.encode("the cat sat on mat"))
    assert [row.projection for row in report.projections] == ["value"] * 2
    assert report.projections[0].shifted is not None
    assert list(report.tables[0]) == ["gamma"]
    model = replace(run.config.model, ctx_len=20)
    data = replace(run.config.data, source=str(tmp_path / "text.txt"))
    longer = new_run(replace(run.config, model=model, data=data, start=str(run.out)), tmp_path / "longer")
    assert longer.model.blocks[0].curve.shape == (20,)
    assert torch.equal(longer.model.blocks[0].curve[:16], loaded.model.blocks[0].curve)


def test_its_sizes_are_counted_by_its_own_numbers():
    config = model_config("toy", vocab_size=9, ctx_len=12, layers=3, channels=8)
    assert flops_per_token(config) == 2 * (3 * 64 + 9 * 8) + 3 * 3 * 8
    settings = TrainConfig(batch_size=2)
    more = [training_memory(config, replace(settings, recompute=how), "float32") for how in ("none", "cheap", "all")]
    assert more[0] > more[1] > more[2]
