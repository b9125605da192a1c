"""Training: the loss falls, the run folder is complete, and stopping and resuming loses nothing."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import timemix
from tests.helpers.runs import TEXT, small_config, small_trainer, write_text_file
from timemix.config.run import read_toml
from timemix.data.config import DataConfig
from timemix.data.corpus import open_corpus
from timemix.data.prepare import prepare
from timemix.errors import (
    AlreadyExists,
    DamagedFile,
    FileError,
    Interrupted,
    InvalidValue,
    MissingFile,
    NotFinite,
    Unavailable,
)
from timemix.models.registry import ARCHITECTURES
from timemix.runs import folder as run_folder
from timemix.runs.metrics import read_metrics
from timemix.training.samples import cut_samples
from timemix.training.start import new_run, resume_run


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_learns_and_fills_the_run_folder(tmp_path, arch):
    trainer = small_trainer(tmp_path, arch, steps=60, valid_every=20, save_every=30)
    seen = []
    newest = trainer.run(seen.append)
    run = trainer.out

    lines = metrics(run)
    assert lines[0]["step"] == 0
    assert abs(lines[0]["valid_loss"] - math.log(trainer.config.model.vocab_size)) < 0.3
    assert lines[-1]["valid_loss"] < 0.6 * lines[0]["valid_loss"]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 20, 40, 60]
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "tokens", "seconds"} <= lines[1].keys()
    assert lines[-1]["tokens"] == 60 * 4 * 16
    assert [p.step for p in seen] == list(range(1, 61))

    assert newest.name == "step-00000060"
    assert {p.name for p in newest.iterdir()} == {
        "model.safetensors",
        "config.toml",
        "tokenizer.json",
        "training.safetensors",
        "training.json",
    }
    assert read_toml(run / "config.toml") == trainer.config
    loaded = timemix.load(run, checkpoint="newest")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])


def test_lines_after_the_checkpoint_are_cut_on_resume(tmp_path):
    trainer = small_trainer(tmp_path, steps=7, save_every=4, log_every=1, valid_every=100)

    def crash(progress):
        if progress.step == 6:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        trainer.run(crash)
    run = trainer.out
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert run_folder.newest(run).name == "step-00000004"
    resume_run(run).run()
    assert [line["step"] for line in metrics(run)] == list(range(8))


def test_the_first_ctrl_c_saves_and_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer = small_trainer(tmp_path)
    with pytest.raises(Interrupted) as interrupted:
        trainer.run(lambda p: os.kill(os.getpid(), signal.SIGINT) if p.step == 3 else None)
    assert interrupted.value.number == signal.SIGINT
    assert run_folder.newest(trainer.out).name == "step-00000003"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, what):
    trainer = small_trainer(tmp_path)

    def poison(progress):
        if progress.step == 6:
            if what == "loss":
                trainer.model.head.weight.data.fill_(math.nan)
            else:
                trainer.model.head.weight.register_hook(lambda g: g * math.inf)

    with pytest.raises(NotFinite, match=rf"the {what} is not finite at step 7; .*step-00000004; try a smaller"):
        trainer.run(poison)
    assert run_folder.newest(trainer.out).name == "step-00000004"
    timemix.load(trainer.out)


def test_newest_and_best_are_kept(tmp_path):
    trainer = small_trainer(tmp_path, steps=40, valid_every=5, save_every=5, lr=0.5, lr_final=0.5, clip=0)
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.1])
    trainer.validation.measure = lambda: next(losses)
    trainer.run()
    assert [c.name for c in run_folder.checkpoints(trainer.out)] == ["step-00000005", "step-00000040"]
    assert run_folder.best(trainer.out).name == "step-00000005"
    assert timemix.load(trainer.out).folder.name == "step-00000005"
    assert timemix.load(trainer.out, checkpoint="40").folder.name == "step-00000040"
    with pytest.raises(MissingFile, match="it has best, newest, 5, 40"):
        timemix.load(trainer.out, checkpoint="7")


def test_best_counts_only_losses_of_its_own_weights(tmp_path):
    trainer = small_trainer(tmp_path, steps=12, valid_every=100, save_every=4)
    with pytest.raises(RuntimeError):
        trainer.run(lambda p: (_ for _ in ()).throw(RuntimeError("power cut")) if p.step == 10 else None)
    assert run_folder.best(trainer.out).name == "step-00000008"


def test_a_run_that_was_killed_after_a_sample_has_each_sample_once(tmp_path):
    settings = {"steps": 12, "save_every": 4, "sample_every": 3, "sample_prompts": ("the cat", "dog\n")}
    whole, killed = (
        small_trainer(tmp_path, name="whole", **settings),
        small_trainer(tmp_path, name="killed", **settings),
    )
    whole.run()
    with pytest.raises(RuntimeError):
        killed.run(lambda p: (_ for _ in ()).throw(RuntimeError("power cut")) if p.step == 7 else None)
    assert (killed.out / "samples.txt").read_text().count("--- step 6, ") == 2
    resume_run(killed.out).run()
    texts = [(run.out / "samples.txt").read_bytes() for run in (whole, killed)]
    assert texts[0] == texts[1]


def test_only_headings_of_later_steps_end_the_samples_that_a_resumed_run_keeps(tmp_path):
    kept = b"--- step 8\n--- step nine\n--- step 9 or 10\n--- step 7\r\n\xff --- step 9\n\n"
    path = tmp_path / "samples.txt"
    for end, expected in (
        (b"--- step 9\nlost\n\n--- step 8\n", kept),
        (b'--- step 10, prompt "a\\n"\n', kept),
        (b"", kept),
    ):
        path.write_bytes(kept + end)
        cut_samples(tmp_path, 8)
        assert path.read_bytes() == expected


def test_the_loss_before_training_is_not_the_best_after_a_resume(tmp_path):
    trainer = small_trainer(tmp_path, steps=12, valid_every=100, save_every=4)
    with pytest.raises(RuntimeError):
        trainer.run(lambda p: (_ for _ in ()).throw(RuntimeError("power cut")) if p.step == 10 else None)
    assert trainer.validation.loss is not None
    assert resume_run(trainer.out).validation.best == math.inf


def test_resuming_on_other_data_is_refused(tmp_path):
    prepare(tmp_path / "tokens", DataConfig(source=str(write_text_file(tmp_path))))
    new_run(small_config(tmp_path / "tokens"), tmp_path / "run").run()
    shutil.rmtree(tmp_path / "tokens")
    prepare(tmp_path / "tokens", DataConfig(source=str(write_text_file(tmp_path, TEXT.replace("cat", "act")))))
    with pytest.raises(DamagedFile, match="the data differ from those that .*run was trained on"):
        resume_run(tmp_path / "run")


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    trainer = small_trainer(tmp_path)
    with pytest.raises(RuntimeError):
        trainer.run(lambda p: (_ for _ in ()).throw(RuntimeError("power cut")) if p.step == 3 else None)
    resumed = resume_run(trainer.out)
    assert resumed.step == 0
    resumed.run()
    assert [line["step"] for line in metrics(trainer.out)] == [0, 2, 4, 6, 8]


def test_weights_that_an_update_spoils_are_not_saved(tmp_path):
    trainer = small_trainer(tmp_path)

    def poison(progress):
        if progress.step == 7:
            (optimizer,) = trainer.optimizers
            optimizer_step = optimizer.step

            def step():
                optimizer_step()
                trainer.model.head.weight.data.fill_(math.nan)

            optimizer.step = step

    with pytest.raises(NotFinite, match="the validation loss is not finite at step 8; the last good checkpoint is"):
        trainer.run(poison)
    assert run_folder.newest(trainer.out).name == "step-00000004"


def test_the_speed_shown_after_a_long_run_is_that_of_now(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.seconds = 1e6
    seen = []
    trainer.run(seen.append)
    assert seen[0].tokens_per_second > 1


def test_a_prepared_folder_determines_fields_of_the_config(tmp_path):
    prepare(tmp_path / "tokens", DataConfig(source=str(write_text_file(tmp_path)), tokenizer="byte"))
    new_run(small_config(tmp_path / "tokens"), tmp_path / "run")
    data = read_toml(tmp_path / "run" / "config.toml").data
    assert (data.tokenizer, data.unknown, Path(data.source).is_absolute()) == ("byte", "byte", True)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    a = small_trainer(tmp_path, name="a", precision="float64")
    b = small_trainer(tmp_path, name="b", precision="float64", accumulation=4)
    assert a.train_step() == pytest.approx(b.train_step(), rel=1e-12)
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(x, y)


def test_same_seed_same_run_other_seed_another(tmp_path):
    losses = [
        small_trainer(tmp_path, name=name, seed=seed).train_step() for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_prepared_folder_is_used_where_it_lies(tmp_path):
    prepare(tmp_path / "tokens", DataConfig(source=str(write_text_file(tmp_path))))
    trainer = new_run(small_config(tmp_path / "tokens"), tmp_path / "run")
    trainer.run()
    assert not (tmp_path / "run" / "data").exists()
    assert resume_run(tmp_path / "run").step == 8
    assert len(trainer.corpus.train) == len(open_corpus(tmp_path / "tokens").train)


def test_no_held_out_text_means_no_validation(tmp_path):
    config = small_config(write_text_file(tmp_path))
    config = type(config)(config.model, type(config.data)(source=config.data.source, valid_fraction=0.0), config.train)
    trainer = new_run(config, tmp_path / "run")
    trainer.run()
    assert trainer.validation.loss is None
    timemix.load(tmp_path / "run")


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(AlreadyExists, match="exists already; choose another folder, or resume the run"):
        small_trainer(tmp_path)


def test_a_batch_too_large_for_memory_is_refused_beforehand(tmp_path):
    with pytest.raises(Unavailable, match=r"needs about .* GiB of memory, but .* are free; lower train.batch_size"):
        small_trainer(tmp_path, batch_size=10_000_000)
    assert not (tmp_path / "run").exists()


def test_a_text_too_short_for_one_window_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(InvalidValue, match="token"):
        new_run(small_config(write_text_file(tmp_path, "ab c")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    trainer = small_trainer(tmp_path_factory.mktemp("good"))
    trainer.run()
    return trainer.out


class TestDamagedCheckpoints:
    @pytest.fixture
    def run(self, good, tmp_path):
        return shutil.copytree(good, tmp_path / "run")

    def test_no_run(self, run):
        with pytest.raises(MissingFile, match=r"there is no run folder .*nun; the runs in .* are run"):
            timemix.load(run.with_name("nun"))

    def test_no_checkpoint(self, run, tmp_path):
        shutil.rmtree(run / "checkpoints")
        with pytest.raises(MissingFile, match="has no checkpoint yet"):
            timemix.load(run)
        with pytest.raises(MissingFile, match="is not a run folder: it has no config.toml"):
            timemix.load(tmp_path)

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.toml", "training.json"])
    @pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "noise"])
    def test_damaged_files_are_named(self, run, name, damage):
        path = run_folder.newest(run) / name
        content = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            # A TOML file is cut in the middle of a line: cut at a line end, it would be valid.
            half = content.index(b" =", len(content) // 2) if name.endswith(".toml") else len(content) // 2
            path.write_bytes({"truncate": content[:half], "empty": b"", "noise": b"\xff\x00" * 50}[damage])
        with pytest.raises(FileError, match=name.replace(".", r"\.")) as error:
            timemix.load(run)
        assert "\n" not in str(error.value)

    def test_damaged_training_state_is_named(self, run):
        path = run_folder.newest(run) / "training.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DamagedFile, match="training.safetensors is damaged"):
            resume_run(run)

    def test_weights_of_another_architecture(self, run, tmp_path):
        other = small_trainer(tmp_path, "mha_rotary", name="other")
        other.run()
        (run_folder.newest(run) / "model.safetensors").write_bytes(
            (run_folder.newest(other.out) / "model.safetensors").read_bytes()
        )
        with pytest.raises(DamagedFile, match="does not have the architecture of its config.toml"):
            timemix.load(run)

    def test_another_tokenizer(self, run, tmp_path):
        other = new_run(small_config(write_text_file(tmp_path, "xyz" * 100)), tmp_path / "other")
        other.save()
        (run_folder.newest(run) / "tokenizer.json").write_bytes(
            (run_folder.newest(other.out) / "tokenizer.json").read_bytes()
        )
        with pytest.raises(DamagedFile, match="is not the tokenizer of this model"):
            timemix.load(run)

    def test_weights_of_another_size(self, run):
        path = run_folder.newest(run) / "config.toml"
        path.write_text(path.read_text().replace("channels = 16", "channels = 32"))
        with pytest.raises(DamagedFile, match="does not fit its config.toml"):
            timemix.load(run)


class Losses:
    """Replace the validation losses by a list."""

    def __init__(self, *losses: float) -> None:
        self.losses = losses

    def of(self, trainer):
        trainer.validation.measure = lambda: self.losses[trainer.step // 2]
        return trainer


PATIENT = {"steps": 20, "valid_every": 2, "save_every": 7, "log_every": 3}
FALL_AND_RISE = Losses(9.0, 3.0, 2.0, 2.5, 1.9, 2.1, 2.0, 2.2, 1.8, 1.7, 1.6)


def test_training_stops_early_and_keeps_the_best(tmp_path):
    trainer = FALL_AND_RISE.of(small_trainer(tmp_path, patience=3, **PATIENT))
    assert trainer.run().name == "step-00000014"
    assert (trainer.is_complete, trainer.validation.stopped_early, trainer.validation.without_gain) == (True, True, 3)
    assert run_folder.best(trainer.out).name == "step-00000008"
    resumed = resume_run(trainer.out)
    assert resumed.validation.stopped_early
    resumed.lock.release()


def test_early_stopping_counts_on_after_a_resume_and_can_be_lifted(tmp_path):
    """A run that a signal stopped in between ends early at the same step; without patience, it runs to its end."""
    whole = FALL_AND_RISE.of(small_trainer(tmp_path, name="whole", **PATIENT))
    whole.run()
    trainer = FALL_AND_RISE.of(small_trainer(tmp_path, patience=3, **PATIENT))
    with pytest.raises(Interrupted):
        trainer.run(lambda p: os.kill(os.getpid(), signal.SIGTERM) if p.step == 11 else None)
    FALL_AND_RISE.of(resume_run(trainer.out)).run()
    assert run_folder.newest(trainer.out).name == "step-00000014"
    FALL_AND_RISE.of(resume_run(trainer.out, train={"patience": 0})).run()
    for a, b in zip(run_folder.checkpoints(whole.out), run_folder.checkpoints(trainer.out), strict=True):
        assert a.name == b.name
        for name in ("model.safetensors", "training.safetensors"):
            assert (a / name).read_bytes() == (b / name).read_bytes()


def test_the_losses_before_an_early_stop_are_in_the_metrics(tmp_path):
    trainer = small_trainer(tmp_path, steps=40, valid_every=3, log_every=10, patience=4, lr=0.0, lr_final=0.0)
    trainer.run()
    lines = [line for line in read_metrics(trainer.out) if "loss" in line]
    assert trainer.validation.stopped_early
    assert [line["step"] for line in lines] == [10, trainer.step]


def test_patience_needs_a_held_out_text(tmp_path):
    config = small_config(write_text_file(tmp_path), patience=2)
    config = type(config)(config.model, type(config.data)(source=config.data.source, valid_fraction=0.0), config.train)
    with pytest.raises(InvalidValue, match=r"train.patience=2 needs held-out text, .* set data.valid_fraction"):
        new_run(config, tmp_path / "run")


def test_samples_are_drawn_while_it_trains_and_change_nothing(tmp_path):
    plain, sampled = small_trainer(tmp_path, name="plain"), small_trainer(tmp_path, name="sampled", sample_every=3)
    plain.run()
    seen = []
    sampled.run(lambda progress: seen.append((progress.step, progress.samples)))
    drawn = [(step, sample.text) for step, samples in seen for sample in samples]
    assert [step for step, _ in drawn] == [3, 6]
    assert (sampled.out / "samples.txt").read_text() == "".join(f"--- step {step}\n{text}\n\n" for step, text in drawn)
    weights = [run_folder.newest(run.out) / "model.safetensors" for run in (plain, sampled)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_saves_as_the_end_of_a_job_does(tmp_path, number):
    trainer = small_trainer(tmp_path)
    with pytest.raises(Interrupted) as interrupted:
        # A shell sends SIGHUP to its jobs a second time.
        trainer.run(lambda p: [os.kill(os.getpid(), number) for _ in range(1 + (number == signal.SIGHUP))])
    assert interrupted.value.number == number
    assert run_folder.newest(trainer.out).name == "step-00000001"


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = small_trainer(tmp_path)
        trainer.run(lambda p: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run_folder.newest(trainer.out).name == "step-00000008"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_step_waits_for_its_device_once(tmp_path, arch, monkeypatch):
    trainer = small_trainer(tmp_path, arch, accumulation=2)
    trainer.train_step()
    reads = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "numpy", "cpu"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, read=read: reads.append(name) or read(*a))
    trainer.train_step()
    assert reads == ["tolist"]
