"""Training on documents: each is read alone, and a carried state resumes bit-identical."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.helpers.ends import same_end, stop_at
from tests.helpers.pairwise import pairwise
from tests.helpers.runs import TEXT, small_config, with_model, write_text_file
from tests.helpers.tiers import slow
from timemix.config.run import RunConfig, read_toml
from timemix.data.batches import Batches
from timemix.errors import DamagedFile, Interrupted, InvalidValue
from timemix.evaluation.texts import evaluate
from timemix.models.registry import ARCHITECTURES
from timemix.runs.folder import checkpoints
from timemix.runtime.distributed import World
from timemix.storage.tensors import read_tensors, write_tensors
from timemix.training.carried import check_documents
from timemix.training.start import new_run, resume_run


def write_documents(folder: Path) -> Path:
    """Write each sentence as a record."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT.splitlines(keepends=True)))
    return path


def with_data(config: RunConfig, **fields) -> RunConfig:
    return replace(config, data=replace(config.data, **fields))


def loss_of_documents(model, inputs, targets, end):
    """Return the mean loss of rows, each document of which the model reads alone."""
    losses = []
    for row, wanted in zip(inputs, targets, strict=True):
        borders = (row == end).nonzero().flatten().tolist()
        for part, own in zip(row.tensor_split(borders), wanted.tensor_split(borders), strict=True):
            if len(part):
                logits, _ = model(part[None])
                losses.append(F.cross_entropy(logits[0], own, reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("arch", ["rwkv7", "llama", "rwkv1"])
def test_training_and_validation_read_each_document_alone(tmp_path, arch):
    config = with_data(small_config(write_documents(tmp_path), arch, steps=2), cross_documents=False, order="epoch")
    trainer = new_run(config, tmp_path / "run")
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        end = trainer.corpus.tokenizer.end_of_text
        rows = [torch.from_numpy(x) for x in trainer.batches(0)]
        assert (rows[0] == end).any()
        torch.testing.assert_close(
            F.cross_entropy(trainer.batch_loss.logits(rows[0]).flatten(0, 1), rows[1].flatten()),
            loss_of_documents(trainer.model, *rows, end),
            atol=1e-5,
            rtol=0,
        )
        tokens = torch.from_numpy(trainer.corpus.valid[:].astype(np.int64))
        windows = [tokens[i : i + 17] for i in range(0, len(tokens) - 1, 16)]
        parts = [(loss_of_documents(trainer.model, w[None, :-1], w[None, 1:], end), len(w) - 1) for w in windows]
        expected = sum(float(loss) * n for loss, n in parts) / (len(tokens) - 1)
        assert trainer.validate() == pytest.approx(expected, abs=1e-5)
    trainer.run()
    assert read_toml(tmp_path / "run/config.toml").data.cross_documents is False


def test_a_vocabulary_without_an_end_of_text_token_is_refused(tmp_path):
    config = with_data(small_config(write_text_file(tmp_path), "rwkv7"), cross_documents=False)
    with pytest.raises(InvalidValue, match=r"data\.cross_documents is False, but the vocabulary has no end-of-text"):
        new_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lanes_give_each_token_once_in_order():
    tokens = np.arange(4 * 7 * 5 + 3)
    batches = Batches(tokens, batch_size=4, ctx_len=5, seed=1, order="carried")
    steps = [batches(step) for step in range(7)]
    lanes = np.concatenate([inputs for inputs, _ in steps], 1)
    assert (lanes == np.arange(4)[:, None] * 35 + np.arange(35)).all()
    assert all((targets == inputs + 1).all() for inputs, targets in steps)
    assert [batches.earlier(step) for step in range(9)] == [0, 5, 10, 15, 20, 25, 30, 0, 5]
    for old, new in zip(batches(0), batches(7), strict=True):
        assert (old == new).all()
    assert [Batches(tokens, batch_size=4, ctx_len=5, seed=1).earlier(step) for step in range(3)] == [0, 0, 0]


def test_a_text_shorter_than_a_window_a_row_is_refused():
    Batches(np.arange(41), batch_size=4, ctx_len=10, seed=1, order="carried")
    with pytest.raises(InvalidValue, match="has 40 tokens, but data.order 'carried' needs 41 for 4 rows of ctx_len=10"):
        Batches(np.arange(40), batch_size=4, ctx_len=10, seed=1, order="carried")


@pytest.mark.parametrize(
    ("arch", "accumulation"), [slow("rwkv1_exp", 2), slow("rwkv4", 1), slow("rwkv6", 2), ("rwkv7", 1)]
)
def test_each_step_continues_the_state_of_the_step_before(tmp_path, arch, accumulation):
    settings = {"steps": 50, "lr": 0.0, "lr_final": 0.0, "batch_size": 16, "accumulation": accumulation}
    trainer = new_run(
        with_data(small_config(write_text_file(tmp_path), arch, **settings), order="carried"), tmp_path / "run"
    )
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    found = [trainer.train_step()[0] for _ in range(14)]
    starts = [step for step in range(14) if trainer.batches.earlier(step) == 0]
    assert starts[0] == 0
    assert len(starts) > 1
    state = None
    with torch.no_grad():
        for step, loss in enumerate(found):
            inputs, targets = (torch.from_numpy(x) for x in trainer.batches(step))
            state = trainer.model.init_state(16) if step in starts else state
            logits, state = trainer.model(inputs, state)
            expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            assert loss == pytest.approx(float(expected), abs=1e-5)


def check_resume(folder, arch, cross, stops=(3, 5), **settings):
    """Stop a run at some steps, and compare its end with that of an undisturbed run."""
    config = small_config(write_documents(folder), arch, steps=9, save_every=100, **settings)
    config = with_data(with_model(config, dropout=0.2), order="carried", cross_documents=cross)
    new_run(config, folder / "whole").run()
    trainer = new_run(config, folder / "stopped")
    for step in stops:
        with pytest.raises(Interrupted):
            trainer.run(stop_at(step))
        trainer = resume_run(folder / "stopped")
    trainer.run()
    same_end(folder / "whole", folder / "stopped")


def test_a_stopped_run_resumes_with_its_state(tmp_path):
    check_resume(tmp_path, "rwkv7", False, stops=[4], precision="float32", accumulation=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "accumulation", "recompute", "arch", "cross"),
    pairwise(
        ["float32", "bfloat16", "float64"],
        [1, 2],
        ["none", "cheap", "all"],
        ["rwkv4", "rwkv6", "rwkv7"],
        [True, False],
    ),
)
def test_stopped_runs_of_all_kinds_resume(tmp_path, precision, accumulation, recompute, arch, cross):
    check_resume(tmp_path, arch, cross, precision=precision, accumulation=accumulation, recompute=recompute)


@pytest.mark.slow
def test_a_stopped_run_with_sums_of_exponentials_resumes(tmp_path):
    check_resume(tmp_path, "rwkv1_exp", True)


def test_a_checkpoint_without_the_state_is_damaged(tmp_path):
    config = with_data(small_config(write_text_file(tmp_path), "rwkv7", steps=4), order="carried")
    with pytest.raises(Interrupted):
        new_run(config, tmp_path / "run").run(stop_at(3))
    path = checkpoints(tmp_path / "run")[-1] / "training.safetensors"
    tensors = read_tensors(path)
    assert tensors["carried.1.wkv"].shape == (4, 4, 4, 4)
    write_tensors(path, {name: x for name, x in tensors.items() if name != "carried.1.wkv"}, {})
    with pytest.raises(DamagedFile, match=r"carried\.1\.wkv is missing or has another shape"):
        resume_run(tmp_path / "run")


@pytest.mark.parametrize("arch", [name for name, each in ARCHITECTURES.items() if each.bounded])
def test_a_bounded_context_excludes_a_carried_state(tmp_path, arch):
    with pytest.raises(InvalidValue, match=f"data.order is 'carried', but {arch} has no state to carry past ctx_len"):
        with_data(small_config(tmp_path, arch), order="carried")


def test_several_processes_exclude_a_carried_state(tmp_path):
    config = with_data(small_config(tmp_path, "rwkv7"), order="carried")
    with pytest.raises(InvalidValue, match="data.order is 'carried', which supports one process, not 2"):
        check_documents(config, World(0, 2, 0, 2))


@pytest.mark.slow
def test_a_compiled_step_carries_the_same_state(tmp_path):
    config = small_config(write_documents(tmp_path), "rwkv7", steps=6)
    config = with_data(with_model(config, layers=1), order="carried", cross_documents=False)
    for name, asked in (("on", "on"), ("off", "off")):
        new_run(replace(config, train=replace(config.train, compile=asked)), tmp_path / name).run()
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("on", "off")]
    for one, other in zip(*lines, strict=True):
        for field in ("loss", "valid_loss"):
            assert one.get(field) == pytest.approx(other.get(field), abs=1e-4)


def test_a_learned_state_excludes_a_carried_state(tmp_path):
    config = small_config(write_documents(tmp_path), "rwkv7", steps=1)
    new_run(config, tmp_path / "run").run()
    config = replace(config, start=str(tmp_path / "run"), train=replace(config.train, tune="state"))
    with pytest.raises(InvalidValue, match=r"data\.order is 'carried', but train\.tune is 'state'"):
        new_run(with_data(config, order="carried"), tmp_path / "next")


def test_sums_of_exponentials_exclude_a_carried_state_of_separate_documents(tmp_path):
    config = with_data(small_config(tmp_path / "missing.txt", "rwkv1_exp"), order="carried", cross_documents=False)
    with pytest.raises(InvalidValue, match="which rwkv1_exp does not support together; leave one of them out"):
        new_run(config, tmp_path / "run")


def test_documents_of_many_lengths_exclude_a_sharded_model(tmp_path):
    config = with_data(small_config(tmp_path, "rwkv1", strategy="shard"), cross_documents=False)
    check_documents(config, World())
    with pytest.raises(InvalidValue, match="which rwkv1 does not support with train.strategy 'shard'; set"):
        check_documents(config, World(0, 2, 0, 2))


def test_documents_of_many_lengths_are_not_compiled(tmp_path):
    config = with_data(small_config(write_documents(tmp_path), "rwkv1", compile="on"), cross_documents=False)
    with pytest.raises(InvalidValue, match="train.compile is 'on', but the lengths of the documents vary"):
        new_run(config, tmp_path / "run")


@pytest.mark.slow
def test_each_document_begins_with_the_learned_state(tmp_path):
    config = small_config(write_documents(tmp_path), "rwkv7", steps=8)
    new_run(config, tmp_path / "run").run()
    train = replace(config.train, tune="state", lr=0.3)
    config = with_data(replace(config, start=str(tmp_path / "run"), train=train), cross_documents=False)
    trainer = new_run(config, tmp_path / "next")
    trainer.run()
    found = evaluate(tmp_path / "next", by_document=True)
    assert found.nats_per_token == pytest.approx(trainer.validation.best, abs=1e-6)
    assert found.documents == trainer.corpus.info.valid.documents


@pytest.mark.slow
def test_lora_trains_on_a_carried_state_of_separate_documents(tmp_path):
    config = small_config(write_documents(tmp_path), "rwkv7", steps=1)
    new_run(config, tmp_path / "run").run()
    train = replace(config.train, tune="lora", steps=6)
    config = replace(config, start=str(tmp_path / "run"), train=train)
    config = with_data(config, order="carried", cross_documents=False)
    new_run(config, tmp_path / "next").run()
    lines = [json.loads(line) for line in (tmp_path / "next/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["valid_loss"] < lines[0]["valid_loss"]
