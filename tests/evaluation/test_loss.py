"""Evaluation: every token counts once; units; unknown characters."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import timemix
from tests.helpers.models import VARIANTS, build
from tests.helpers.runs import TEXT, small_config, small_trainer, write_text_file
from timemix.data.config import DataConfig
from timemix.data.prepare import hold_out_end, prepare
from timemix.errors import DamagedFile, InvalidValue, MissingFile, NotFinite
from timemix.evaluation.loss import loss_by_position, loss_per_token, windows
from timemix.evaluation.texts import bits_per_byte, evaluate_held_out, evaluate_text
from timemix.models.registry import list_architectures
from timemix.training.start import new_run


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


@pytest.mark.parametrize("arch", list_architectures(bounded=False))
def test_a_carried_state_gives_every_token_the_whole_text_before_it(arch):
    model = build(VARIANTS[arch])
    text = np.random.default_rng(0).integers(0, 11, 43).astype(np.uint8)
    logits, _ = model(torch.from_numpy(text[:-1].astype(np.int64))[None])
    expected = F.cross_entropy(logits[0], torch.from_numpy(text[1:].astype(np.int64))).item()
    carried = loss_per_token(model, text, carry_state=True)
    assert carried == pytest.approx(expected, rel=1e-9)
    assert abs(carried - loss_per_token(model, text)) > 1e-4


@pytest.mark.parametrize(
    ("arch", "stride", "sentence"),
    [
        (
            "llama",
            None,
            "carry_state is True, but the context of llama is bounded by ctx_len; leave it out, or use a run",
        ),
        ("rwkv7", 4, "stride=4 excludes carry_state=True; leave one of them out"),
    ],
)
def test_a_state_that_cannot_be_carried_is_refused(arch, stride, sentence):
    with pytest.raises(InvalidValue, match=sentence):
        loss_per_token(build(VARIANTS[arch]), np.zeros(20, np.uint8), stride=stride, carry_state=True)


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


@pytest.mark.parametrize("stride", [0, -1, 13, 1.5, True])
def test_a_stride_out_of_range_is_refused(stride):
    with pytest.raises(InvalidValue, match="it must be a whole number from 1 to ctx_len"):
        loss_per_token(build(VARIANTS["rwkv1"]), np.zeros(30, np.uint8), stride=stride)


def test_the_held_out_text_gives_the_validation_loss_of_training(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.run()
    result = evaluate_held_out(trainer.model, trainer.corpus)
    assert result.nats_per_token == pytest.approx(trainer.validation.loss)
    last = json.loads((trainer.out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["valid_bits_per_byte"] == pytest.approx(result.bits_per_byte)
    assert result.tokens == len(trainer.corpus.valid)


def test_a_text_of_no_counted_bytes_has_no_bits_per_byte(tmp_path):
    corpus = prepare(tmp_path / "out", small_config(write_text_file(tmp_path)).data)
    valid = dataclasses.replace(corpus.info.valid, bytes=0)
    uncounted = dataclasses.replace(corpus, info=dataclasses.replace(corpus.info, valid=valid))
    assert bits_per_byte(1.0, uncounted) is None


def test_a_loss_that_is_not_finite_is_refused(loaded):
    model = build(VARIANTS["rwkv7"], vocab_size=loaded.tokenizer.vocab_size).float()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with pytest.raises(NotFinite, match="the loss is nan: the weights are damaged, or training diverged; use another"):
        evaluate_text(model, loaded.tokenizer, TEXT[:500])


def test_too_short_a_text(loaded):
    with pytest.raises(InvalidValue, match="a loss needs at least 2 tokens, but the text has 1"):
        evaluate_text(loaded.model, loaded.tokenizer, "t")


# Text, tokenizer, and the characters and bytes after the first token, counted by hand.
BY_HAND = {
    "characters, <unk>": ("abΩba漢ab", "character", "unk", 7, 10),
    "characters, bytes": ("abΩba漢ab", "character", "byte", 7, 10),
    "bytes": ("Ωab", "byte", "error", 2, 3),
    "words": ("Go  on, go. On\n", "word", "error", 13, 13),
    "words, <unk>": ("go Ωmega, on", "word", "unk", 10, 11),
    "<unk> first": ("Ωab", "character", "unk", 2, 2),
    "unknown word first": ("Ωmega go", "word", "unk", 3, 3),
    "half a character first": ("漢a", "byte", "error", 1, 3),
}


@pytest.mark.parametrize(("text", "kind", "unknown", "characters", "bytes_"), BY_HAND.values(), ids=BY_HAND.keys())
def test_units_divide_by_the_text_after_the_first_token(tmp_path, text, kind, unknown, characters, bytes_):
    (tmp_path / "train.txt").write_text("go on, go. on\nab" if kind == "word" else "abba", encoding="utf-8")
    (tmp_path / "valid.txt").write_text(text, encoding="utf-8")
    config = DataConfig(str(tmp_path / "train.txt"), str(tmp_path / "valid.txt"), tokenizer=kind, unknown=unknown)
    corpus = prepare(tmp_path / "out", config)
    model = build(VARIANTS["rwkv1"], vocab_size=corpus.tokenizer.vocab_size)
    held_out = evaluate_held_out(model, corpus)
    bits = held_out.nats_per_token * (len(corpus.valid) - 1) / math.log(2)
    assert held_out.bits_per_character == pytest.approx(bits / characters)
    assert held_out.bits_per_byte == pytest.approx(bits / bytes_)
    assert bits_per_byte(held_out.nats_per_token, corpus) == held_out.bits_per_byte
    assert (held_out.characters, held_out.bytes) == (len(text), len(text.encode()))
    assert evaluate_text(model, corpus.tokenizer, text) == held_out


def test_what_the_vocabulary_lacks_is_in_no_denominator(tmp_path):
    (tmp_path / "text.txt").write_text("go on, go. on\n", encoding="utf-8")
    corpus = prepare(tmp_path / "out", DataConfig(str(tmp_path / "text.txt"), tokenizer="word", valid_fraction=0))
    model = build(VARIANTS["rwkv1"], vocab_size=corpus.tokenizer.vocab_size)
    result = evaluate_text(model, corpus.tokenizer, "Go  Ωmega on, go.\n")
    assert (result.tokens, result.characters, result.bytes, result.unknown) == (6, 18, 19, 1)
    assert (result.predicted_characters, result.predicted_bytes) == (18 - 5 - 2, 19 - 6 - 2)
    bits = result.nats_per_token * 5 / math.log(2)
    assert (result.bits_per_character, result.bits_per_byte) == pytest.approx((bits / 11, bits / 11))


MIXED = "Go on, Ω go. An Ωmega\n" * 40


@pytest.mark.parametrize(
    ("kind", "unknown"), [("character", "unk"), ("word", "unk"), ("character", "byte"), ("byte", "error")]
)
def test_parts_of_a_text_have_the_size_of_their_text(tmp_path, kind, unknown):
    """Parts of uniform text have sizes in proportion to their tokens; one token per character gives exact sizes."""
    for name, text in (("train.txt", MIXED.replace("Ω", "o")), ("valid.txt", MIXED)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    config = DataConfig(str(tmp_path / "train.txt"), str(tmp_path / "valid.txt"), tokenizer=kind, unknown=unknown)
    whole = prepare(tmp_path / "whole", config).info.valid
    thin = prepare(tmp_path / "thin", dataclasses.replace(config, valid_tokens=whole.tokens // 2)).info.valid
    assert thin.characters == pytest.approx(whole.characters / 2, rel=0.03)
    assert thin.bytes == pytest.approx(whole.bytes / 2, rel=0.03)
    if (kind, unknown) == ("character", "unk"):
        assert thin.characters == thin.tokens
    if kind == "byte":
        assert thin.bytes == thin.tokens
    held = hold_out_end(prepare(tmp_path / "words", config), tmp_path / "end", share=0.5).info
    assert held.train.characters + held.valid.characters == pytest.approx(len(MIXED), abs=1)


def test_held_out_text_that_changed_is_refused(tmp_path):
    text = write_text_file(tmp_path)
    prepare(tmp_path / "tokens", DataConfig(source=str(text)))
    trainer = new_run(small_config(tmp_path / "tokens", steps=2), tmp_path / "run")
    trainer.run()
    assert timemix.evaluate(tmp_path / "run").tokens == len(trainer.corpus.valid)
    shutil.rmtree(tmp_path / "tokens")
    with pytest.raises(MissingFile, match=r"the tokens of .*run are missing: .*tokens is a prepared folder"):
        timemix.evaluate(tmp_path / "run")
    text.write_text(TEXT.replace("cat", "act"))
    prepare(tmp_path / "tokens", DataConfig(source=str(text)))
    with pytest.raises(DamagedFile, match=r"the held-out text of .*run has changed since training"):
        timemix.evaluate(tmp_path / "run")
