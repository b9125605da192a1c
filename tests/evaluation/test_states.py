"""Measurements of matrix states: agreement with the states of the model, and models whose states are known."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.models import VARIANTS, build
from tests.helpers.runs import TEXT, small_trainer
from timemix.errors import NotFinite
from timemix.evaluation import states
from timemix.evaluation.inspect import draw, inspect_run
from timemix.evaluation.states import effective_rank, half_life, measure_states
from timemix.models.rwkv7.model import LEAST_LOG_DECAY
from timemix.runs.load import load
from timemix.storage.json_files import to_json
from timemix.tokenizers.make import train_tokenizer

MATRICES = ("rwkv5", "rwkv6", "rwkv7")
TOKENIZER = train_tokenizer("character", ["abcdefghijk"])
TOKENS = np.random.Generator(np.random.Philox(key=1)).integers(0, 11, 37)


def small(arch="rwkv7", **fields):
    torch.manual_seed(4)
    return build(VARIANTS[arch], **fields)


def states_of_the_model(model, tokens):
    """Return the state after every token from one call of the model a token: (T + 1, layers, heads, N, N)."""
    state, found = model.init_state(1), []
    found.append([layer["wkv"].clone() for layer in state.layers])
    with torch.no_grad():
        for token in tokens:
            _, state = model(torch.tensor([[token]]), state)
            found.append([layer["wkv"].clone() for layer in state.layers])
    return torch.stack([torch.cat(layers) for layers in found]).numpy()


@pytest.mark.parametrize("piece", [128, 5])
@pytest.mark.parametrize("arch", MATRICES)
def test_norms_ranks_and_changes_are_those_of_the_models_states(monkeypatch, arch, piece):
    monkeypatch.setattr(states, "PIECE", piece)
    model = small(arch)
    report = measure_states(model, TOKENIZER, TOKENS)
    S = states_of_the_model(model, TOKENS)
    assert report.positions == list(range(37))
    assert [(row.layer, row.head) for row in report.heads] == [(i, h) for i in range(3) for h in range(4)]
    for row in report.heads:
        own = S[1:, row.layer, row.head]
        np.testing.assert_allclose(row.norm, np.sqrt((own**2).sum((1, 2))), rtol=1e-9)
        share = np.linalg.eigvalsh(own @ own.transpose(0, 2, 1)).clip(1e-300)
        share /= share.sum(1, keepdims=True)
        np.testing.assert_allclose(row.effective_rank, np.exp(-(share * np.log(share)).sum(1)), rtol=1e-7)

    changes = np.sqrt(((S[1:] - S[:-1]) ** 2).sum((3, 4))).sum(2)
    for layer in range(3):
        means = {token: changes[token == TOKENS, layer].mean() for token in set(TOKENS.tolist())}
        order = sorted(means, key=means.get, reverse=True)[: states.MOST_CHANGING]
        rows = [row for row in report.changes if row.layer == layer]
        assert [row.token for row in rows] == order
        assert [row.count for row in rows] == [int((token == TOKENS).sum()) for token in order]
        assert [row.text for row in rows] == ["abcdefghijk"[token] for token in order]
        np.testing.assert_allclose([row.change for row in rows], [means[token] for token in order], rtol=1e-9)


def test_decays_and_rates_are_those_of_the_formulas():
    """In layer 0, all inputs of the decay and the rate follow from the embedding."""
    model = small()
    block, mixer = model.blocks[0], model.blocks[0].mixer
    with torch.no_grad():
        x = block.mixer_norm(model.input_norm(model.embedding(torch.from_numpy(TOKENS))))
        before = torch.nn.functional.pad(x[:-1], (0, 0, 1, 0))
        decay_input, rate_input = (torch.lerp(x, before, mixer.mix[name]) for name in ("decay", "rate"))
        decay = torch.tanh(decay_input @ mixer.decay.down_weight) @ mixer.decay.up_weight + mixer.decay.bias
        log_decay = -math.exp(-0.5) * torch.sigmoid(decay)
        rate = torch.sigmoid(rate_input @ mixer.rate.down_weight @ mixer.rate.up_weight + mixer.rate.bias)
    rows = [row for row in measure_states(model, TOKENIZER, TOKENS).heads if row.layer == 0]
    for row in rows:
        channels = slice(4 * row.head, 4 * row.head + 4)
        own = (math.log(2) / -log_decay[:, channels]).numpy()
        np.testing.assert_allclose(row.half_life, np.quantile(own, [0.1, 0.5, 0.9]), rtol=1e-9)
        assert row.rate == pytest.approx(float(rate[:, channels].mean()), rel=1e-9)
        assert row.rate_deviation == pytest.approx(float(rate[:, channels].std(correction=0)), rel=1e-9)


@torch.no_grad()
def test_a_constant_decay_and_rate_have_their_half_life_and_no_spread():
    model = small()
    for layer, block in enumerate(model.blocks):
        log_decay = -math.log(2) / 10 ** (layer + 1)
        block.mixer.decay.up_weight.zero_()
        block.mixer.decay.bias.fill_(math.log(log_decay / LEAST_LOG_DECAY / (1 - log_decay / LEAST_LOG_DECAY)))
        block.mixer.rate.up_weight.zero_()
        block.mixer.rate.bias.fill_(math.log(0.2 / 0.8))
    for row in measure_states(model, TOKENIZER, TOKENS).heads:
        np.testing.assert_allclose(row.half_life, [10 ** (row.layer + 1)] * 3, rtol=1e-9)
        assert (row.rate, row.rate_deviation) == (pytest.approx(0.2), pytest.approx(0, abs=1e-12))


@pytest.mark.parametrize("arch", ["rwkv5", "rwkv6"])
@torch.no_grad()
def test_a_state_without_a_delta_rule_has_no_rate(arch):
    """A decay of exp(-exp(d)) leaves half of the state after ln 2 / exp(d) tokens."""
    model = small(arch)
    for layer, block in enumerate(model.blocks):
        decay = block.mixer.decay
        if arch == "rwkv6":
            decay.up_weight.zero_()
            decay = decay.bias
        decay.fill_(math.log(math.log(2) / 10 ** (layer + 1)))
    for row in measure_states(model, TOKENIZER, TOKENS).heads:
        np.testing.assert_allclose(row.half_life, [10 ** (row.layer + 1)] * 3, rtol=1e-9)
        assert (row.rate, row.rate_deviation) == (None, None)


@torch.no_grad()
def test_values_along_one_direction_give_states_of_rank_one():
    model = small(layers=1)
    value = model.blocks[0].mixer.value.weight
    value.copy_(torch.outer(torch.randn(16), torch.randn(16)))
    for row in measure_states(model, TOKENIZER, TOKENS).heads:
        np.testing.assert_allclose(row.effective_rank, 1, atol=1e-9)
        assert min(row.norm) > 0


@torch.no_grad()
def test_values_of_zero_leave_the_state_at_zero():
    model = small(layers=1)
    model.blocks[0].mixer.value.weight.zero_()
    report = measure_states(model, TOKENIZER, TOKENS)
    assert all(not any(row.norm) and not any(row.effective_rank) for row in report.heads)
    assert {row.change for row in report.changes} == {0.0}


def test_the_first_token_writes_a_matrix_of_rank_one():
    assert all(row.effective_rank[0] == pytest.approx(1) for row in measure_states(small(), TOKENIZER, TOKENS).heads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused(value):
    model = small()
    with torch.no_grad():
        model.embedding.weight.fill_(value)
    with pytest.raises(NotFinite, match="a state is not finite: the weights are damaged"):
        measure_states(model, TOKENIZER, TOKENS)


def test_a_long_text_is_measured_at_evenly_spaced_tokens(monkeypatch):
    monkeypatch.setattr(states, "POSITIONS", 5)
    model = small()
    report = measure_states(model, TOKENIZER, TOKENS)
    S = states_of_the_model(model, TOKENS)
    assert report.positions == [0, 9, 18, 27, 36]
    for row in report.heads:
        assert row.norm == pytest.approx([np.linalg.norm(S[t + 1, row.layer, row.head]) for t in report.positions])
    # Every token counts for the changes.
    assert sum(row.count for row in report.changes if row.layer == 0) > 5


@pytest.mark.parametrize(
    ("singular", "rank"),
    [([3, 3, 3, 3], 4), ([2, 0, 2, 0], 2), ([5, 0, 0], 1), ([0, 0], 0), ([1e-200, 1e-200], 2), ([1e200, 1e200], 2)],
)
def test_effective_rank_of_known_matrices(singular, rank):
    assert float(effective_rank(torch.tensor(singular, dtype=torch.float64))) == pytest.approx(rank)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_effective_rank_ignores_scale_and_is_between_one_and_the_size(singular, scale):
    s = torch.tensor(singular, dtype=torch.float64)
    rank = float(effective_rank(s))
    assert 1 - 1e-9 <= rank <= len(singular) + 1e-9
    assert float(effective_rank(scale * s)) == pytest.approx(rank)


def test_half_life_of_a_decay_of_one_is_finite():
    found = half_life(torch.tensor([-math.log(2) / 7, 0.0]))
    assert float(found[0]) == pytest.approx(7)
    assert 1e30 < float(found[1]) < math.inf


@pytest.mark.parametrize("name", [name for name, config in VARIANTS.items() if config.arch not in MATRICES])
def test_other_architectures_have_no_matrix_states(name):
    assert measure_states(build(VARIANTS[name]), TOKENIZER, TOKENS[:4]) is None


def test_measuring_changes_nothing_of_the_model():
    model = small().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    first = measure_states(model, TOKENIZER, TOKENS)
    assert measure_states(model, TOKENIZER, TOKENS) == first
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert not any(block.recurrence()._forward_hooks for block in model.blocks)


def test_inspection_has_the_states_and_their_picture(tmp_path):
    trainer = small_trainer(tmp_path, "rwkv7")
    trainer.run()
    loaded = load(tmp_path / "run")
    report = inspect_run(loaded, loaded.tokenizer.encode(TEXT)[:100])
    values = to_json(report)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert len(values["states"]["heads"]) == 2 * 4
    assert report.not_shown.keys() == {"tables", "token-shift"}
    assert [p.name for p in draw(report, loaded.config.model, tmp_path / "i")] == ["projections.png", "states.png"]
    assert (tmp_path / "i/states.png").stat().st_size > 3000
    # The receptance of rwkv7 does not go through a sigmoid.
    receptance = next(row for row in report.projections if row.projection == "receptance")
    assert receptance.quantiles[0] < 0
