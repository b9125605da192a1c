"""A loss mask: losses, gradients and validation count only its tokens, for any division of a batch."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.helpers.runs import small_trainer
from tests.helpers.tiers import slow
from timemix.data.batches import Batches, validation_windows
from timemix.data.corpus import evenly_spaced
from timemix.data.shards import IGNORED, Tokens, counted_targets, targets_of
from timemix.evaluation.loss import counted_by_position, cross_entropy, loss_by_position, loss_per_token
from timemix.evaluation.texts import bits_per_byte
from timemix.experiments.convert import losses_by_range
from timemix.training.masked import counted_only
from timemix.training.parallel import new_model
from timemix.training.spikes import write_bad_batch
from timemix.training.trainer import Trainer

GENERATOR = np.random.default_rng(5)
IDS = GENERATOR.integers(0, 7, 300).astype(np.uint8)
COUNTED = (GENERATOR.random(300) < 0.3).astype(np.uint8)
MASKED = Tokens([IDS[:100], IDS[100:]], IDS.dtype, Tokens([COUNTED[:40], COUNTED[40:]], COUNTED.dtype))


def masked(tokens, counted):
    return Tokens([tokens[:]], tokens.dtype, Tokens([counted], counted.dtype))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A trainer without a mask, whose config and tokens the other trainers have too."""
    trainer = small_trainer(tmp_path_factory.mktemp("plain"), "rwkv7", precision="float64")
    trainer.lock.release()
    return trainer


def trainer_of(plain, counted, **train):
    """Return a trainer with a mask of the training text, and the model of its seed."""
    corpus = replace(plain.corpus, train=masked(plain.corpus.train, counted), valid=plain.corpus.valid)
    config = replace(plain.config, train=replace(plain.config.train, **train))
    return Trainer(config, plain.out, corpus)


def third(plain, seed=2):
    return (np.random.default_rng(seed).random(len(plain.corpus.train)) < 0.3).astype(np.uint8)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(trainer, step):
    """Return loss and gradients of a batch by torch's own ignore_index, with the term of L2Wrap by its formula."""
    inputs, targets = map(torch.from_numpy, trainer.batches(step))
    trainer.model.zero_grad()
    logits, _ = trainer.model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    largest = logits.max(-1).values[targets != -100]
    (loss + trainer.config.model.l2wrap / 2 * largest.square().mean()).backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    return loss.item(), found


def test_targets_and_counts_are_those_of_the_mask():
    targets = targets_of(MASKED, slice(30, 150))
    np.testing.assert_array_equal(targets, np.where(COUNTED, IDS.astype(int), IGNORED)[30:150])
    np.testing.assert_array_equal(targets_of(IDS, slice(3, 9)), IDS[3:9])
    assert counted_targets(MASKED) == COUNTED[1:].sum()
    assert counted_targets(IDS) == 299
    assert counted_targets(MASKED.part(slice(20, 120))) == COUNTED[21:120].sum()


def test_batches_and_windows_have_masked_targets():
    batches = Batches(MASKED, batch_size=3, ctx_len=16, seed=1)
    inputs, targets = batches(4)
    whole = Batches(IDS, batch_size=3, ctx_len=16, seed=1)(4)
    np.testing.assert_array_equal(inputs, whole[0])
    assert np.unique(targets == IGNORED).size == 2
    np.testing.assert_array_equal(targets[targets != IGNORED], whole[1][targets != IGNORED])
    assert batches.counted(4) == (targets != IGNORED).sum()
    assert Batches(IDS, batch_size=3, ctx_len=16, seed=1).counted(4) == 48
    windows = np.concatenate([targets.ravel() for _, targets in validation_windows(MASKED, 16, 4)])
    np.testing.assert_array_equal(windows, targets_of(MASKED, slice(1, None)))


def test_a_thinned_text_keeps_its_mask():
    kept = evenly_spaced(MASKED, 50, 5)
    np.testing.assert_array_equal(kept, evenly_spaced(IDS, 50, 5))
    np.testing.assert_array_equal(kept.counted, evenly_spaced(COUNTED, 50, 5))


def test_the_loss_of_counted_positions_is_that_of_torch():
    logits = torch.randn(2, 9, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.from_numpy(targets_of(MASKED, slice(0, 18)).reshape(2, 9))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    (theirs,) = torch.autograd.grad(expected, logits)
    loss = cross_entropy(*counted_only(logits, targets))
    (ours,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert not ours[targets == IGNORED].any()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_has_the_loss_and_gradients_of_the_one_big_batch(plain, accumulation):
    trainer = trainer_of(plain, third(plain), accumulation=accumulation, clip=0.0)
    loss, expected = reference(trainer, 0)
    found, norm = trainer.train_step()
    assert found == pytest.approx(loss, rel=1e-6)
    ours = gradients(trainer.model)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-12)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected.values())), rel=1e-6)


def test_a_mask_of_ones_is_no_mask(plain):
    with_mask = trainer_of(plain, np.ones(len(plain.corpus.train), np.uint8))
    without = Trainer(plain.config, plain.out, plain.corpus)
    assert [with_mask.train_step() for _ in range(3)] == [without.train_step() for _ in range(3)]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_batch_without_counted_targets_has_loss_and_gradients_zero(plain, accumulation):
    trainer = trainer_of(plain, np.zeros(len(plain.corpus.train), np.uint8), accumulation=accumulation)
    assert trainer.train_step() == (0.0, 0.0)
    assert all(not gradient.any() for gradient in gradients(trainer.model).values())


def test_a_batch_without_counted_targets_has_no_loss_in_the_metrics(plain, tmp_path):
    counted = np.zeros(len(plain.corpus.train), np.uint8)
    counted[: len(counted) // 8] = 1
    config = replace(
        plain.config, train=replace(plain.config.train, batch_size=2, log_every=1, valid_every=100, steps=30)
    )
    corpus = replace(plain.corpus, train=masked(plain.corpus.train, counted), valid=plain.corpus.valid)
    trainer = Trainer(config, tmp_path, corpus)
    shown = []
    trainer.run(lambda progress: shown.append(progress.loss))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][1:]
    has_loss = [trainer.batches.counted(step) > 0 for step in range(30)]
    assert 0 < sum(has_loss) < 30
    assert [line.get("loss", 0) > 0 for line in lines] == has_loss
    assert ["loss" in line for line in lines] == has_loss
    # The progress keeps the newest loss.
    assert all(loss > 0 for loss in shown[has_loss.index(True) :])
    assert trainer._spikes.state[2] == sum(has_loss)


def test_pieces_without_counted_targets_are_left_out(plain):
    """The mask counts in one window of a batch alone, so three of four pieces have no target."""
    counted = np.zeros(len(plain.corpus.train), np.uint8)
    places = Batches(np.arange(len(counted)), batch_size=4, ctx_len=plain.config.window, seed=0)
    start = int(places(0)[0][1, 0])
    counted[start + 3 : start + 6] = 1
    trainer = trainer_of(plain, counted, accumulation=4, seed=0, clip=0.0)
    loss, expected = reference(trainer, 0)
    found, _ = trainer.train_step()
    assert found == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients(trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"stride": 5}, slow({"carry_state": True}), slow({"tokens_per_batch": 32})])
def test_the_validation_loss_is_the_mean_over_counted_tokens(plain, options):
    config = replace(plain.config.model, vocab_size=7)
    torch.manual_seed(0)
    model, _ = new_model(config, "replicate", plain.world, plain.device, torch.float64)
    whole = loss_per_token(model, MASKED, precision="float64", **options)
    # Each token is counted once: the masks of all tokens alone add up to the whole loss.
    ones = loss_per_token(model, masked(IDS, np.ones_like(COUNTED)), precision="float64", **options)
    rest = loss_per_token(model, masked(IDS, 1 - COUNTED), precision="float64", **options)
    n = int(COUNTED[1:].sum())
    assert (n * whole + (299 - n) * rest) / 299 == pytest.approx(ones, rel=1e-12)
    assert ones == pytest.approx(loss_per_token(model, IDS, precision="float64", **options), rel=1e-12)
    assert abs(whole - ones) > 1e-6
    assert loss_per_token(model, masked(IDS, np.zeros_like(COUNTED)), precision="float64", **options) == 0


def test_the_loss_by_position_counts_masked_targets(plain):
    config = replace(plain.config.model, vocab_size=7)
    torch.manual_seed(0)
    model, _ = new_model(config, "replicate", plain.world, plain.device, torch.float64)
    found = loss_by_position(model, MASKED, precision="float64")
    rows = [slice(i, i + 17) for i in range(0, 288, 16)]
    logits, _ = model(torch.from_numpy(np.stack([IDS[row][:-1] for row in rows]).astype(np.int64)))
    targets = torch.from_numpy(np.stack([targets_of(MASKED, row)[1:] for row in rows]))
    for place in range(16):
        expected = F.cross_entropy(logits[:, place], targets[:, place], ignore_index=-100)
        assert found[place] == pytest.approx(expected.item(), rel=1e-9)
    first = COUNTED.copy()
    first[17:] = False
    found = loss_by_position(model, masked(IDS, first), precision="float64")
    np.testing.assert_array_equal(np.isnan(found), first[1:17] == 0)
    np.testing.assert_array_equal(counted_by_position(masked(IDS, first), 16), first[1:17])
    np.testing.assert_array_equal(counted_by_position(IDS, 16), np.full(16, 18))


def test_losses_past_the_context_are_means_over_counted_targets(plain):
    config = replace(plain.config.model, vocab_size=7)
    torch.manual_seed(0)
    model, _ = new_model(config, "replicate", plain.world, plain.device, torch.float64)
    logits, _ = model(torch.from_numpy(IDS[:256].astype(np.int64))[None])
    targets = torch.from_numpy(targets_of(MASKED, slice(1, 257)))
    found = losses_by_range(model, MASKED)
    for name, loss in found.items():
        begin, end = (16 * int(number) for number in name.split("-"))
        expected = F.cross_entropy(logits[0, begin:end], targets[begin:end], ignore_index=IGNORED)
        assert loss == pytest.approx(expected.item(), rel=1e-9)
    assert found.keys() == losses_by_range(model, IDS).keys() == {"0-1", "1-4", "4-8", "8-16"}
    first = COUNTED.copy()
    first[17:] = 0
    assert losses_by_range(model, masked(IDS, first)).keys() == {"0-1"}


def test_a_bad_batch_is_written_without_uncounted_last_targets(plain, tmp_path):
    batch = Batches(MASKED, batch_size=8, ctx_len=16, seed=1)(0)
    assert (batch[1][:, -1] == IGNORED).any()
    write_bad_batch(tmp_path / "bad.json", 1, "why", batch, plain.corpus.tokenizer)
    assert "why" in (tmp_path / "bad.json").read_text()
    assert bits_per_byte(1.0, plain.corpus) > 0
