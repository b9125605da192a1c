"""Loading of a run: while training removes checkpoints, with incomplete checkpoints, and with damaged ones."""

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch

import timemix
from tests.helpers.runs import save_another, small_trainer
from timemix.cli import train
from timemix.errors import DamagedFile, MissingFile
from timemix.runs import folder as run_folder
from timemix.runs import load as loading
from timemix.storage.locks import is_held
from timemix.training.start import resume_run


@pytest.fixture
def run(good, tmp_path):
    return shutil.copytree(good, tmp_path / "run")


# Files of a checkpoint, in the order in which they are read.
READERS = [
    (run_folder, "read_progress"),
    (loading, "read_toml"),
    (loading, "load_tokenizer"),
    (loading, "empty_model"),
]
INSTANT = 0.002
"""Seconds between checkpoints of a training that saves all the time."""


@pytest.mark.parametrize(("module", "name"), READERS, ids=[name for _, name in READERS])
@pytest.mark.parametrize("checkpoint", ["best", "newest"])
def test_a_checkpoint_removed_before_a_file_is_read_gives_its_successor(run, monkeypatch, module, name, checkpoint):
    reader, moves = getattr(module, name), [2]

    def after_the_training_moved_on(*arguments):
        if moves[0]:
            moves[0] -= 1
            save_another(run)
        return reader(*arguments)

    monkeypatch.setattr(module, name, after_the_training_moved_on)
    loaded = timemix.load(run, checkpoint=checkpoint)
    assert loaded.folder.exists()
    if (checkpoint, name) != ("newest", "read_progress"):
        assert loaded.folder.name == run_folder.checkpoint_name(12)


def test_loads_beside_a_training_that_saves_all_the_time(run):
    stop = threading.Event()
    failures: list[Exception] = []

    def save():
        while not stop.wait(INSTANT):
            save_another(run)

    def load():
        try:
            for _ in range(40):
                timemix.load(run)
        except Exception as error:
            failures.append(error)

    training, loads = threading.Thread(target=save), threading.Thread(target=load)
    training.start()
    loads.start()
    loads.join()
    stop.set()
    training.join()
    assert failures == []


def test_the_settings_of_a_fine_tune_are_those_of_the_successor(run, monkeypatch):
    reader, moves = train.read_toml, [1]

    def after_the_training_moved_on(path):
        if moves[0]:
            moves[0] -= 1
            save_another(run)
        return reader(path)

    monkeypatch.setattr(train, "read_toml", after_the_training_moved_on)
    asked = train.train_options(["--from", str(run), "--out", "next"])
    assert asked.model == timemix.load(run).config.model


def test_a_step_or_folder_that_went_is_named(run):
    folder = run_folder.newest(run)
    save_another(run)
    with pytest.raises(MissingFile, match="has no checkpoint 4; it has best, newest, 8"):
        timemix.load(run, checkpoint=4)
    with pytest.raises(MissingFile, match="there is no run folder"):
        timemix.load(folder)


def empty(folder: Path) -> None:
    folder.mkdir()


def dangling(folder: Path) -> None:
    folder.symlink_to("nowhere")


def cut_off(folder: Path) -> None:
    shutil.copytree(run_folder.newest(folder.parent.parent), folder)
    (folder / "tokenizer.json").unlink()


UNFINISHED = {
    "empty": (empty, "config.toml, model.safetensors, tokenizer.json, training.json"),
    "dangling": (dangling, "config.toml, model.safetensors, tokenizer.json, training.json"),
    "cut off": (cut_off, "tokenizer.json"),
}


@pytest.mark.parametrize("kind", UNFINISHED)
def test_an_incomplete_checkpoint_is_skipped(run, caplog, kind):
    whole = run_folder.newest(run)
    folder = whole.with_name("step-00009999")
    make, lacking = UNFINISHED[kind]
    make(folder)
    for checkpoint in ("best", "newest", 4):
        caplog.clear()
        assert timemix.load(run, checkpoint=checkpoint).folder == whole
        assert caplog.messages == [f"{folder} lacks {lacking} and is skipped; restore or remove it"]
    caplog.clear()
    trainer = resume_run(run)
    trainer.lock.release()
    assert trainer.step == 4
    assert len(caplog.messages) == 1
    with pytest.raises(MissingFile, match="has no checkpoint 9999; it has best, newest, 4"):
        timemix.load(run, checkpoint=9999)


def test_a_run_with_only_incomplete_checkpoints_is_refused(run):
    (run_folder.newest(run) / "model.safetensors").unlink()
    with pytest.raises(MissingFile, match="has no complete checkpoint: step-00000004 lacks model.safetensors"):
        timemix.load(run)
    # A run that begins again would remove the metrics, and replace the checkpoint when it reaches its step.
    metrics = (run / "metrics.jsonl").read_text()
    with pytest.raises(MissingFile, match=r"lacks model.safetensors; restore the missing files, or remove .*points"):
        resume_run(run)
    assert (run / "metrics.jsonl").read_text() == metrics
    assert not is_held(run)


def flip(path: Path) -> None:
    """Flip one bit of the last tensor."""
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 0x10
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_a_flipped_bit_is_found(run, name):
    path = run_folder.newest(run) / name
    flip(path)
    with pytest.raises(DamagedFile, match=name + " is damaged: its content differs from its checksum") as error:
        resume_run(run)
    assert "\n" not in str(error.value)
    if name == "model.safetensors":
        with pytest.raises(DamagedFile, match="differs from its checksum"):
            timemix.load(run)


def test_a_changed_character_of_the_tokenizer_is_found(run):
    path = run_folder.newest(run) / "tokenizer.json"
    saved = path.read_text()
    path.write_text(saved.replace('"t"', '"T"'))
    assert path.read_text() != saved
    with pytest.raises(DamagedFile, match=r"tokenizer\.json is damaged"):
        timemix.load(run, checkpoint="newest")


def test_a_flipped_bit_of_a_session_is_found(run, tmp_path):
    loaded = timemix.load(run)
    engine = timemix.Engine(loaded.model, loaded.tokenizer)
    engine.add(timemix.Request([1, 2, 3], tokens=4))
    engine.step()
    path = tmp_path / "state"
    timemix.save_session(engine.session(0), path, loaded.model)
    timemix.load_session(path, loaded.model)
    flip(path)
    with pytest.raises(DamagedFile, match="differs from its checksum"):
        timemix.load_session(path, loaded.model)


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_files_of_a_run_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        trainer = small_trainer(tmp_path, steps=2)
        trainer.run()
    finally:
        os.umask(before)
    # Only training creates the lock file.
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in trainer.out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert len(modes) > 8
    assert set(modes.values()) == {0o666 & ~umask}
    folders = {stat.S_IMODE(p.stat().st_mode) for p in trainer.out.rglob("*") if p.is_dir()}
    assert folders == {0o777 & ~umask}


def test_a_loaded_model_is_printed_in_one_line(run):
    loaded = timemix.load(run)
    count = sum(p.numel() for p in loaded.model.parameters())
    assert repr(loaded) == f"Loaded(rwkv1, {count:,} parameters, from {str(loaded.folder)!r})"


def test_weights_that_were_changed_and_saved_by_another_program_load(run):
    from safetensors.torch import load_file, save_file

    path = run_folder.newest(run) / "model.safetensors"
    weights = load_file(path)
    save_file({name: 2 * x for name, x in weights.items()}, path)
    found = timemix.load(run).model.state_dict()
    assert all(torch.equal(found[name], 2 * x) for name, x in weights.items())
