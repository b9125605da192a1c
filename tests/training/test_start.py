"""Resumed runs with other settings of training, and the lock of a run that is resumed."""

import json
import os
import signal
from dataclasses import replace

import pytest

import timemix
from tests.helpers.ends import same_end, stop_at
from tests.helpers.runs import small_config, small_trainer, write_text_file
from timemix.config.run import read_toml
from timemix.data.config import DataConfig
from timemix.data.prepare import prepare
from timemix.errors import DamagedFile, Interrupted, InvalidValue, MissingFile, NotFinite
from timemix.runs import folder as run_folder
from timemix.storage.files import remove_folder
from timemix.training import start
from timemix.training.optim import learning_rate
from timemix.training.signals import STOP_SIGNALS
from timemix.training.start import new_run, resume_run


@pytest.mark.parametrize(
    "fields",
    [
        {"valid": "text.txt"},
        {"valid_fraction": 0.5},
        {"valid_tokens": 9},
        {"shuffle": 7},
        {"end_of_text": True},
        {"hold_out": "documents"},
        {"keep_nul": True},
        {"text_key": "text"},
        {"vocab_size": 9},
        {"vocabulary": "tokenizer.json"},
    ],
)
def test_what_a_prepared_folder_holds_out_cannot_change(fields, tmp_path):
    prepare(tmp_path / "tokens", DataConfig(str(write_text_file(tmp_path))))
    config = small_config(tmp_path / "tokens")
    config = replace(config, data=replace(config.data, **fields))
    with pytest.raises(InvalidValue, match=f"data.{next(iter(fields))} has no effect on .*tokens, which is prepared"):
        new_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "own"), [({"tokenizer": "word"}, "byte"), ({"unknown": "unk"}, "byte"), ({"encoding": "ascii"}, "utf-8")]
)
def test_settings_that_contradict_a_prepared_folder_are_refused(fields, own, tmp_path):
    prepare(tmp_path / "tokens", DataConfig(str(write_text_file(tmp_path)), tokenizer="byte"))
    config = small_config(tmp_path / "tokens")
    ((name, asked),) = fields.items()
    with pytest.raises(InvalidValue, match=f"data.{name}='{asked}' differs from that .*: {own}; set data.{name} to"):
        new_run(replace(config, data=replace(config.data, **fields)), tmp_path / "run")
    run = new_run(replace(config, data=replace(config.data, **{name: own})), tmp_path / "run", progress=False)
    assert run.config.data.tokenizer == "byte"
    run.lock.release()


@pytest.mark.parametrize("number", STOP_SIGNALS[1:])
def test_a_signal_before_the_first_step_leaves_no_folder(number, tmp_path, monkeypatch):
    def prepared(*arguments):
        assert (tmp_path / "run").exists()
        os.kill(os.getpid(), number)
        raise AssertionError

    monkeypatch.setattr(start, "_corpus", prepared)
    with pytest.raises(SystemExit) as end:
        small_trainer(tmp_path)
    assert end.value.code == 128 + number
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(number) is signal.SIG_DFL


def rates(run) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


@pytest.mark.parametrize("tune", ["all", "lora"])
def test_a_run_killed_before_its_starting_weights_are_saved_cannot_begin_with_others(tmp_path, monkeypatch, tune):
    small_trainer(tmp_path, "rwkv7", name="base").run()
    config = replace(small_config(tmp_path / "text.txt", "rwkv7", tune=tune), start=str(tmp_path / "base"))

    def die(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("timemix.training.trainer.Trainer.save", die)
        patch.setattr("timemix.training.start.shutil.rmtree", lambda *arguments, **options: None)
        with pytest.raises(KeyboardInterrupt):
            new_run(config, tmp_path / "killed")
    with pytest.raises(MissingFile, match="is not a run folder: it has no config.toml"):
        resume_run(tmp_path / "killed")
    trainer = new_run(config, tmp_path / "begun")
    trainer.lock.release()
    remove_folder(trainer.out / "checkpoints/step-00000000")
    with pytest.raises(MissingFile, match=r"no complete checkpoint with the weights of .*base.*, .* --config "):
        resume_run(trainer.out)


def test_a_complete_run_continues_to_more_steps_by_their_schedule(tmp_path):
    trainer = small_trainer(tmp_path, log_every=1)
    trainer.run()
    before = rates(trainer.out)
    longer = resume_run(trainer.out, train={"steps": 16})
    assert (longer.step, longer.is_complete) == (8, False)
    longer.run()
    after = rates(trainer.out)
    assert run_folder.newest(trainer.out).name == "step-00000016"
    assert {step: after[step] for step in before} == before
    config = longer.config.train
    assert [after[step] for step in range(9, 17)] == [learning_rate(config, step - 1) for step in range(9, 17)]
    assert after[9] > before[8]


def test_a_run_stopped_with_new_settings_resumes_to_the_same_end(tmp_path):
    """Settings that change at step 3 apply to the rest of the run, also after another stop."""
    new = {"steps": 11, "lr": 3e-3, "valid_every": 3, "save_every": 5, "log_every": 3, "schedule": "linear"}
    for name in ("whole", "stopped"):
        with pytest.raises(Interrupted):
            small_trainer(tmp_path, name=name).run(stop_at(3))
    resume_run(tmp_path / "whole", train=new).run()
    with pytest.raises(Interrupted):
        resume_run(tmp_path / "stopped", train=new).run(stop_at(6))
    resume_run(tmp_path / "stopped").run()
    same_end(tmp_path / "whole", tmp_path / "stopped")
    assert (tmp_path / "whole" / "config.toml").read_text() == (tmp_path / "stopped" / "config.toml").read_text()


def test_the_same_settings_again_change_nothing(tmp_path):
    for name in ("plain", "named"):
        with pytest.raises(Interrupted):
            small_trainer(tmp_path, name=name).run(stop_at(3))
    resume_run(tmp_path / "plain").run()
    same = vars(read_toml(tmp_path / "named" / "config.toml").train)
    resume_run(tmp_path / "named", train={name: value for name, value in same.items() if value is not None}).run()
    same_end(tmp_path / "plain", tmp_path / "named")


def test_tokens_of_a_resumed_run_are_those_of_all_its_steps(tmp_path):
    small_trainer(tmp_path).run()
    resumed = resume_run(tmp_path / "run", train={"tokens": "1k"})
    assert resumed.config.train.steps == 16
    assert read_toml(tmp_path / "run" / "config.toml") == resumed.config


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"batch_size": 8},
            r"train.batch_size=8 cannot change when .* the run has 4; start a new run .* train --from .*run",
        ),
        ({"seed": 5}, r"train.seed=5 cannot change"),
        ({"optimizer": "muon"}, r"train.optimizer=muon cannot change"),
        ({"steps": 7}, r"train.steps=7 is less than the 8 steps that .* has finished; give a larger number"),
        ({"seconds": 60.0}, r"train.seconds=60.0 cannot be given to resume .* give train.steps"),
        ({"steps": 20, "tokens": "1M"}, r"train.steps 20 and train.tokens 1M exclude one another"),
        ({"step": 20}, r"unknown field 'train.step'; did you mean 'steps'"),
        ({"lr": "high"}, r"train.lr is 'high'; it must be of type float"),
    ],
)
def test_what_cannot_change_is_refused_and_changes_nothing(tmp_path, settings, sentence):
    run = small_trainer(tmp_path)
    run.run()
    before = {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()}
    with pytest.raises(InvalidValue, match=sentence):
        resume_run(run.out, train=settings)
    assert {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_is_overcome_by_a_smaller_rate(tmp_path):
    settings = {"clip": 0.0, "optimizer": "muon", "save_every": 100, "valid_every": 100}
    with pytest.raises(Interrupted):
        small_trainer(tmp_path, steps=30, **settings).run(stop_at(4))
    diverging = resume_run(tmp_path / "run", train={"lr": 1e6})
    for trainer in (diverging, None):
        with pytest.raises(NotFinite, match=r"step-00000004; try a smaller train.lr"):
            (trainer or resume_run(tmp_path / "run")).run()
    assert diverging.step > 4
    resumed = resume_run(tmp_path / "run", train={"lr": 1e-3})
    resumed.run()
    assert resumed.step == 30


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = small_trainer(tmp_path, valid_every=100, save_every=2)

    def poison(progress):
        if progress.step == 4:
            trainer.model.head.weight.data[0, 0] = float("inf")

    with pytest.raises(NotFinite, match=r"the weight head.weight is not finite at step 4; .*step-00000002; try a"):
        trainer.run(poison)
    assert [c.name for c in run_folder.checkpoints(trainer.out)] == ["step-00000002"]


def test_python_changes_the_settings_of_training_alone(tmp_path):
    small_trainer(tmp_path).run()
    assert timemix.train(None, tmp_path / "run", resume=True, train={"steps": 10}).config.train.steps == 10
    with pytest.raises(InvalidValue, match="config, model and data cannot change .* only settings of train"):
        timemix.train(None, tmp_path / "run", resume=True, data="other.txt")


def holder(run) -> bool:
    return (run / ".lock.json").exists()


def test_a_resume_that_trains_nothing_leaves_no_lock(tmp_path):
    run = small_trainer(tmp_path)
    run.run()
    timemix.train(None, run.out, resume=True)
    assert not holder(run.out)
    with pytest.raises(InvalidValue):
        resume_run(run.out, train={"seed": 9})
    assert not holder(run.out)
    (run_folder.newest(run.out) / "training.json").write_text("{")
    with pytest.raises(DamagedFile):
        resume_run(run.out)
    assert not holder(run.out)
    assert os.path.exists(run.out / "config.toml")
