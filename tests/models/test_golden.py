"""The original 2021 code's logits, gradients and training trajectory (tests/golden/README.md)."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.golden import ARCHITECTURES, TOLERANCE, Golden
from timemix.config.run import TrainConfig
from timemix.errors import InvalidValue
from timemix.generation.decode import build_step
from timemix.models.registry import find_architecture, load_part
from timemix.models.rwkv1.weights import our_name, published_name, to_published
from timemix.training.optim import build_optimizers


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def golden(request, dtype):
    return Golden(request.param, dtype)


def close(ours, theirs, dtype, relative=0.0):
    torch.testing.assert_close(ours.double(), theirs.double(), atol=TOLERANCE[dtype], rtol=relative)


def test_names_and_layouts_go_both_ways(golden):
    assert load_part(find_architecture(golden.model.config.arch).weights).our_name is our_name
    weights = golden.published("weights")
    assert all(published_name(our_name(name)) == name for name in weights)
    back = to_published(golden.group("weights"))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["blocks.0.attn.gate.weight", "ln_f", "blocks.x.ln1.weight", "embedding.weight", ""])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(InvalidValue, match="is not a parameter of the original 2021 code"):
        our_name(name)


def test_a_free_w_has_no_published_form():
    with pytest.raises(InvalidValue, match="free W"):
        to_published({"blocks.0.mixer.f": torch.zeros(1, 4, 4)})


def test_logits_loss_and_gradients(golden, dtype):
    inputs, target = golden.tensors["input"], golden.tensors["target"]
    logits, state = golden.model(inputs)
    assert state is None
    close(logits, golden.tensors["logits"], dtype)
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    close(loss, golden.tensors["loss"].squeeze(), dtype)
    loss.backward()
    gradients = golden.group("grad")
    parameters = dict(golden.model.named_parameters())
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        close(parameters[name].grad, gradient, dtype)


def test_a_window_shorter_than_the_context(golden, dtype):
    length = int(golden.tensors["short_length"])
    logits, _ = golden.model(golden.tensors["input"][:, :length])
    close(logits, golden.tensors["logits_short"], dtype)


def test_carried_state_gives_the_same_logits(golden, dtype):
    inputs = golden.tensors["input"]
    state, parts = golden.model.init_state(len(inputs)), []
    with torch.no_grad():
        for piece in inputs.split([1, 7, 1, 15], dim=1):
            logits, state = golden.model(piece, state)
            parts.append(logits)
    close(torch.cat(parts, 1), golden.tensors["logits"], dtype)


@pytest.mark.parametrize("name", ["RWKV", "MHA_rotary", "MHA_shift"])
def test_compiled_step_gives_the_same_logits(name):
    golden = Golden(name, torch.float32)
    inputs, (B, T) = golden.tensors["input"], golden.tensors["input"].shape
    step, state = build_step(golden.model, backend="compiled"), golden.model.init_state(B)
    found, _ = step(inputs.flatten(), state, torch.arange(B), torch.full((B,), T), torch.arange(B * T))
    close(found.view(B, T, -1), golden.tensors["logits"], torch.float32)


def test_training_trajectory(golden, dtype):
    """Run 20 steps of the real optimizer; return the loss before each step and the logits after the last."""
    model = golden.model
    (optimizer,) = build_optimizers(model, TrainConfig(lr=2e-3, weight_decay=0.01))
    losses = []
    for batch in golden.tensors["train.batches"]:
        logits, _ = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    close(torch.stack(losses), golden.tensors["train.losses"], dtype)
    final, _ = model(golden.tensors["input"])
    # Adam divides by the size of the gradient, so rounding errors of tiny gradients grow over the 20 steps.
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(final.double(), golden.tensors["train.final_logits"], atol=tolerance, rtol=0)


def test_weight_decay_falls_on_the_same_parameters(golden):
    (optimizer,) = build_optimizers(golden.model, TrainConfig(weight_decay=0.01))
    decayed, rest, embedding = optimizer.param_groups
    names = {id(p): n for n, p in golden.model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == golden.decayed
    assert {names[id(p)] for p in embedding["params"]} == {"embedding.weight"}
    assert len(decayed["params"]) + len(rest["params"]) + 1 == len(names)
    assert rest["weight_decay"] == embedding["weight_decay"] == 0
