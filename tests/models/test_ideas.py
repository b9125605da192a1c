"""Models without one of the ideas of their architecture (`model.without`)."""

import pytest
import torch

from tests.helpers.models import build, heads_of
from timemix.errors import InvalidValue
from timemix.evaluation.loss import cross_entropy
from timemix.generation.decode import build_step
from timemix.models.language_model import LanguageModel
from timemix.models.registry import find_architecture, model_config
from timemix.models.rwkv4.model import MIXED
from timemix.models.rwkv6.model import MIXED_6

ARCHS = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
CASES = [(arch, idea) for arch in ARCHS for idea in find_architecture(arch).config.ideas]
GONE = {
    "token_shift": ("mix", "first_mix"),
    "learned_shift": ("mix",),
    "denominator": (),
    "token_mixtures": ("mix_maps", "first_mix"),
    "token_decay": ("mixer.decay.down_weight", "mixer.decay.up_weight", "mix.decay", "mix_maps.decay"),
    "gate": ("mixer.gate", "mix.gate", "mix_maps.gate"),
    "head_norm": ("norm_weight", "norm_bias"),
    "bonus": ("bonus",),
    "receptance": ("mixer.receptance", "mix.receptance"),
    "delta_rule": ("mixer.rate", "removal", "replacement", "mix.rate"),
    "value_residual": ("mixer.residual",),
}
"""Parts of the names of the parameters of each idea."""


def settings(arch, **fields):
    sizes = {"vocab_size": 19, "layers": 2, "channels": 32, "ctx_len": 16} | heads_of(arch, 2)
    return model_config(arch, **(sizes | fields))


def random_model(arch, **fields):
    """Return a model in float64 in which no weight is zero."""
    torch.manual_seed(0)
    return build(model_config(arch), torch.float64, 0.1, **settings(arch, **fields).__dict__)


def parameters(model):
    return {name for name, p in model.named_parameters() if p.numel()}


@pytest.mark.parametrize(("arch", "idea"), CASES)
def test_the_parameters_of_an_idea_are_gone_and_all_others_stay(arch, idea):
    whole, less = (LanguageModel(settings(arch, without=without)) for without in ((), (idea,)))
    gone = parameters(whole) - parameters(less)
    assert bool(gone) == bool(GONE[idea])
    assert parameters(less) <= parameters(whole)
    assert all(any(part in name for part in GONE[idea]) for name in gone), gone


@pytest.mark.parametrize(("arch", "idea"), CASES)
def test_a_model_without_an_idea_learns_and_carries_its_state(arch, idea):
    model, tokens = random_model(arch, without=(idea,)), torch.randint(19, (3, 12))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = cross_entropy(model(tokens[:, :-1])[0], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for name, p in model.named_parameters() if p.numel())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected, _ = model(tokens)
        state, found = model.init_state(3), []
        for token in tokens.unbind(1):
            logits, state = model(token[:, None], state)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-9, rtol=0)


def zeroed(arch, **changes):
    """Return a whole model with some of its parameters set to numbers or vectors."""
    model = random_model(arch)
    with torch.no_grad():
        for name, p in model.named_parameters():
            for part, value in changes.items():
                if name.endswith(part.replace("__", ".")):
                    p.copy_(torch.as_tensor(value))
    return model


@pytest.mark.parametrize(
    ("arch", "idea", "changes"),
    [
        ("rwkv4", "bonus", {"mixer__bonus": 0}),
        # As in the RWKV of 2021, the first half of the channels is that of the previous token.
        ("rwkv4", "learned_shift", {f"__mix__{name}": [0.0] * 16 + [1.0] * 16 for name in MIXED}),
        ("rwkv5", "bonus", {"mixer__bonus": 1}),
        ("rwkv5", "token_shift", {f"__mix__{name}": 1 for name in MIXED_6}),
        ("rwkv6", "bonus", {"mixer__bonus": 1}),
        ("rwkv6", "token_decay", {"mixer__decay__down_weight": 0}),
        ("rwkv6", "token_mixtures", {f"mix_maps__{name}__up_weight": 0 for name in MIXED_6}),
        ("rwkv7", "bonus", {"mixer__bonus": 0}),
        ("rwkv7", "token_decay", {"mixer__decay__down_weight": 0}),
        ("rwkv7", "delta_rule", {"mixer__removal": 0, "mixer__replacement": 0}),
    ],
)
def test_equals_the_whole_model_whose_idea_has_no_effect(arch, idea, changes):
    whole, less = zeroed(arch, **changes), random_model(arch, without=(idea,))
    weights = whole.state_dict()
    less.load_state_dict({name: weights[name] if x.numel() else x for name, x in less.state_dict().items()})
    tokens = torch.randint(19, (2, 10))
    with torch.no_grad():
        torch.testing.assert_close(less(tokens)[0], whole(tokens)[0], atol=1e-12, rtol=0)
        assert not torch.allclose(less(tokens)[0], random_model(arch)(tokens)[0], atol=1e-6)


def test_rwkv4_without_its_denominator_is_a_sum():
    """The formula of the numerator, as a sum over all earlier tokens."""
    model, (B, T, C) = random_model("rwkv4", without=("denominator",)), (2, 9, 32)
    mixer = model.blocks[0].mixer
    x = torch.randn(B, T, C, dtype=torch.float64)
    with torch.no_grad():
        found, _ = mixer(dict.fromkeys(MIXED, x), None, None, None)
        k, v, w, r = mixer.key(x), mixer.value(x), -mixer.decay.exp(), mixer.receptance(x).sigmoid()
        y = torch.zeros_like(x)
        for t in range(T):
            for s in range(t):
                y[:, t] += ((t - 1 - s) * w + k[:, s]).exp() * v[:, s]
            y[:, t] += (mixer.bonus + k[:, t]).exp() * v[:, t]
        torch.testing.assert_close(found, mixer.output(r * y), atol=1e-12, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_generation_without_an_idea_runs_the_model(arch):
    step = build_step(build(model_config(arch), torch.float32, 0.1, **settings(arch, without=("bonus",)).__dict__))
    assert not step.compiled
    assert "for whole models, not for a model without bonus" in step.reason


def test_wrong_names():
    with pytest.raises(InvalidValue, match="model.without has the unknown name 'gat'; did you mean 'gate'"):
        settings("rwkv6", without=("gat",))
    with pytest.raises(InvalidValue, match="model.without has the unknown name 'delta_rule'"):
        settings("rwkv6", without=("delta_rule",))
    with pytest.raises(InvalidValue, match="with a repeated name"):
        settings("rwkv7", without=("gate", "gate"))
