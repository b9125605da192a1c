"""RWKV-7: its names, settings and sizes. test_original_code.py has the values of the original code."""

import re
import resource

import pytest
import torch

from tests.helpers.models import numbers_kept
from tests.helpers.original_code import Golden
from timemix.errors import InvalidValue
from timemix.models.language_model import LanguageModel
from timemix.models.layers.l2wrap import l2wrap
from timemix.models.layers.token_shift import previous_token
from timemix.models.registry import model_config
from timemix.models.rwkv7.weights import from_published, our_config, our_name, published_name, to_published
from timemix.models.size import count_parameters, flops_per_token

SIZES = {"vocab_size": 19, "layers": 3, "heads": 2, "channels": 32, "ctx_len": 16}


def test_l2wrap_scales_with_the_gradient_of_the_loss():
    """Gradient accumulation divides each loss by the number of pieces."""
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    (l2wrap(torch.zeros(()), logits, 0.5) / 4).backward()
    largest, at = logits.detach().max(-1, keepdim=True)
    expected = torch.zeros_like(logits).scatter(-1, at, 0.5 / 6 / 4 * largest)
    torch.testing.assert_close(logits.grad, expected)


def test_names_go_both_ways():
    weights = Golden("rwkv7", torch.float32).published("weights")
    assert all(published_name(our_name(name)) == name for name in weights)
    unused = {f"blocks.0.att.v{i}": torch.zeros(1) for i in range(3)}
    assert from_published(weights | unused).keys() == from_published(weights).keys()


@pytest.mark.parametrize("layers", [1, 3])
def test_settings_are_read_from_shapes(layers):
    ranks = {"decay_rank": 24, "rate_rank": 20, "gate_rank": 40} | ({"residual_rank": 16} if layers > 1 else {})
    config = model_config("rwkv7", **(SIZES | {"layers": layers, "ffn_ratio": 3.5} | ranks))
    weights = to_published(dict(LanguageModel(config).named_parameters()))
    assert our_config(weights, ctx_len=16) == config
    del weights["blocks.0.att.r_k" if layers == 1 else "blocks.2.att.v1"]
    with pytest.raises(InvalidValue, match="the weights have no matrix 'blocks"):
        our_config(weights, ctx_len=16)


@pytest.mark.parametrize(
    "name",
    ["blocks.0.att.v0", "blocks.1.att.x_q", "blocks.x.ln1.weight", "embedding.weight", "blocks.1.att.time_decay"],
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(InvalidValue, match=re.escape(f"{name!r} is not a parameter of RWKV-7")):
        our_name(name)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heads": 3}, "model.heads=3 does not divide model.channels=32; nearest divisors: 2, 4"),
        ({"gate_rank": -1}, "model.gate_rank is -1; it must be at least 0"),
        ({"ffn_ratio": 0.0}, "model.ffn_ratio is 0.0; it must be from 1 / model.channels to 1000"),
        ({"group_norm_eps": 0.0}, "model.group_norm_eps is 0.0; it must be above 0"),
        ({"l2wrap": -1.0}, "model.l2wrap is -1.0; it must be at least 0 and finite"),
    ],
)
def test_wrong_values_are_one_clear_sentence(fields, sentence):
    with pytest.raises(InvalidValue, match=re.escape(sentence)):
        model_config("rwkv7", **(SIZES | fields))


@pytest.mark.parametrize(
    ("channels", "ranks"), [(64, (32, 32, 32, 32)), (768, (64, 64, 32, 128)), (2048, (128, 128, 64, 224))]
)
def test_default_ranks(channels, ranks):
    assert tuple(model_config("rwkv7", channels=channels, heads=channels // 64).ranks.values()) == ranks


def test_ranks_are_free():
    config = model_config("rwkv7", decay_rank=3, rate_rank=4, residual_rank=5, gate_rank=6, **SIZES)
    block = LanguageModel(config).blocks[1].mixer
    maps = {"decay": 3, "rate": 4, "residual": 5, "gate": 6}
    assert {name: getattr(block, name).up_weight.shape for name in maps} == {n: (r, 32) for n, r in maps.items()}


def test_size_of_the_published_model_of_191_million_parameters():
    config = model_config("rwkv7", vocab_size=65536, layers=12, channels=768, heads=12, ctx_len=4096)
    C, low_rank = 768, 2 * 768 * (64 + 64 + 128)
    matrices = 4 * C * C + 8 * C * C + low_rank
    residuals = 11 * 2 * C * 32
    assert flops_per_token(config) == (
        2 * (12 * matrices + residuals + 65536 * C) + 12 * C * (16 * 64 + 10 * 64 + 2 * 64)
    )
    vectors = 12 * (6 + 1 + 2 + 3 + 2 + 4) * C + 11 * C + 4 * C
    assert count_parameters(config)["total"] == 2 * 65536 * C + 12 * matrices + residuals + vectors


@pytest.mark.slow
@torch.no_grad()
def test_memory_is_constant_over_a_million_tokens():
    model = LanguageModel(model_config("rwkv7", vocab_size=19, layers=1, channels=16, heads=2, ctx_len=16)).eval()
    state, memory = model.init_state(1), []
    for _ in range(200):
        logits, state = model(torch.randint(19, (1, 5000)), state, logits="last")
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert state.position.tolist() == [10**6]
    assert logits.isfinite().all()
    assert memory[-1] - memory[20] < 10_000, "the peak memory grew by more than 10 MB"


def test_previous_token_continues_after_padding():
    x = torch.arange(1.0, 13).view(2, 3, 2)
    whole, none = previous_token(x, None, None)
    assert none is None
    assert torch.equal(whole[:, 1:], x[:, :-1])
    assert not whole[:, 0].any()
    _, state = previous_token(x, torch.zeros(2, 1, 2), torch.tensor([3, 1]))
    previous, _ = previous_token(x, state, None)
    assert torch.equal(previous[:, 0], torch.stack([x[0, 2], x[1, 0]]))


def test_what_training_keeps_is_as_estimated():
    settings = model_config("rwkv7", vocab_size=19, channels=64, heads=2, ctx_len=128, layers=3)
    model = LanguageModel(settings)
    numbers = numbers_kept(model.blocks, torch.randn(4, 128, 64, requires_grad=True))
    estimate = 4 * 128 * settings.layers * model.block.kept(settings, 4).block
    assert numbers == pytest.approx(estimate, rel=0.2)
