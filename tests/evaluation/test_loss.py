"""Evaluation: every token once, units, unknown characters."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import timemix
from tests.helpers.models import VARIANTS, build
from tests.helpers.runs import TEXT, small_trainer
from timemix.errors import InvalidValue
from timemix.evaluation.loss import evaluate_held_out, evaluate_text, loss_by_position, loss_per_token, windows


@given(
    st.integers(2, 200),
    st.integers(1, 20),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 25)),
)
def test_every_target_is_scored_once_with_enough_context(tokens, ctx_len, batch_size, stride):
    text = np.arange(tokens, dtype=np.uint8)
    scored = []
    for inputs, targets, count in windows(text, ctx_len, batch_size, stride):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] <= ctx_len
        np.testing.assert_array_equal(inputs + 1, targets)
        scored += targets[:, -count:].flatten().tolist()
        if stride is not None and targets[0, 0] > 1:
            assert inputs.shape[1] - count >= min(ctx_len - stride, inputs.shape[1] - 1)
    assert sorted(scored) == list(range(1, tokens))


def test_loss_by_position_splits_the_loss_of_whole_windows():
    model = build(VARIANTS["rwkv1"])
    text = np.random.default_rng(0).integers(0, 11, 5 * 12 + 1).astype(np.uint8)
    by_position = loss_by_position(model, text)
    assert by_position.shape == (12,)
    assert by_position.mean() == pytest.approx(loss_per_token(model, text), rel=1e-6)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(text[:-1].astype(np.int64)).view(5, 12))
    targets = torch.from_numpy(text[1:].astype(np.int64)).view(5, 12)
    assert by_position[3] == pytest.approx(float(F.cross_entropy(logits[:, 3], targets[:, 3])), rel=1e-6)
    with pytest.raises(InvalidValue, match="needs 13"):
        loss_by_position(model, text[:12])


def test_loss_is_the_mean_over_windows_side_by_side():
    model = build(VARIANTS["rwkv1"])
    text = np.random.default_rng(0).integers(0, 11, 31).astype(np.uint8)
    total = 0.0
    for start in range(0, 30, 12):
        piece = torch.from_numpy(text[start : start + 13].astype(np.int64))
        logits, _ = model(piece[None, :-1])
        total += F.cross_entropy(logits[0], piece[1:], reduction="sum").item()
    assert loss_per_token(model, text) == pytest.approx(total / 30)
    assert loss_per_token(model, text, tokens_per_batch=12) == pytest.approx(total / 30)


def test_stride_one_sees_the_whole_window_before_every_token():
    model = build(VARIANTS["mha_rotary"])
    text = np.random.default_rng(0).integers(0, 11, 20).astype(np.uint8)
    total = 0.0
    for t in range(1, 20):
        piece = torch.from_numpy(text[max(0, t - 12) : t].astype(np.int64))
        logits, _ = model(piece[None], logits="last")
        total += F.cross_entropy(logits, torch.tensor([int(text[t])])).item()
    assert loss_per_token(model, text, stride=1) == pytest.approx(total / 19)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    trainer = small_trainer(tmp_path_factory.mktemp("run"))
    trainer.run()
    return timemix.load(trainer.out)


def test_units(loaded):
    result = evaluate_text(loaded.model, loaded.tokenizer, TEXT[:500])
    assert result.bits_per_character == pytest.approx(result.nats_per_token / math.log(2))
    assert result.bits_per_byte == pytest.approx(result.bits_per_character)
    assert (result.tokens, result.characters, result.bytes, result.unknown) == (500, 500, 500, 0)


def test_unknown_characters_are_left_out_and_counted(loaded):
    known = evaluate_text(loaded.model, loaded.tokenizer, TEXT[:300])
    result = evaluate_text(loaded.model, loaded.tokenizer, TEXT[:150] + "Ω漢Ω" + TEXT[150:300])
    assert result.unknown == 3
    assert result.nats_per_token == pytest.approx(known.nats_per_token)
    assert result.bits_per_byte == pytest.approx(known.bits_per_byte)
    assert (result.tokens, result.characters, result.bytes) == (300, 303, 307)


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_below_one_is_refused(stride):
    with pytest.raises(InvalidValue, match="it must be at least 1 token"):
        loss_per_token(build(VARIANTS["rwkv1"]), np.zeros(20, np.uint8), stride=stride)


def test_the_held_out_text_gives_the_validation_loss_of_training(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.run()
    result = evaluate_held_out(trainer.model, trainer.corpus)
    assert result.nats_per_token == pytest.approx(trainer.valid_loss)
    assert result.tokens == len(trainer.corpus.valid)


def test_too_short_a_text(loaded):
    with pytest.raises(InvalidValue, match="the text has 1 tokens; at least 2 are needed"):
        evaluate_text(loaded.model, loaded.tokenizer, "t")
