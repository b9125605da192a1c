"""Runs of some seconds or tokens: the steps are counted before training, and the run depends on them alone."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.runs import small_config, small_trainer, write_text_file
from tests.helpers.tiers import examples
from timemix.config.run import TrainConfig, read_toml
from timemix.errors import InvalidValue
from timemix.runs import folder as run_folder
from timemix.training import budget
from timemix.training.budget import Pace, with_counted_steps
from timemix.training.start import new_run, resume_run

SECONDS = st.floats(0.001, 2)


def clock_of(steps: int, pace: Pace, train: TrainConfig) -> float:
    """Return the seconds of a run, summed step by step, in which every validation is an improvement."""
    seconds = pace.validation
    for step in range(1, steps + 1):
        is_last = step == steps
        validates = step % train.valid_every == 0 or is_last
        saves = validates or step % train.save_every == 0
        samples = train.sample_every and step % train.sample_every == 0
        seconds += pace.step + validates * pace.validation + saves * pace.checkpoint + bool(samples) * pace.sample
    return seconds


@given(
    pace=st.builds(Pace, step=SECONDS, validation=SECONDS, checkpoint=SECONDS, sample=SECONDS),
    seconds=st.floats(1, 300),
    every=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 60)),
)
@examples(500)
def test_the_steps_that_fit_take_about_their_seconds(pace, seconds, every):
    train = TrainConfig(valid_every=every[0], save_every=every[1], sample_every=every[2])
    steps = pace.steps_within(seconds, train)
    # Validations and saves at the last step may exceed their share by one.
    spare = 2 * (pace.validation + pace.checkpoint) + pace.sample
    assert steps == 1 or clock_of(steps, pace, train) <= seconds + spare
    # A step may both validate and save, which the estimate counts twice.
    assert clock_of(steps + 1, pace, train) > (seconds - spare) / 2 or steps == budget.MOST_STEPS


@pytest.fixture
def sentences():
    return []


def test_a_run_by_seconds_is_the_run_of_the_steps_that_it_counts(tmp_path, sentences):
    config = small_config(write_text_file(tmp_path), seconds=1.0, sample_every=50)
    timed = new_run(config, tmp_path / "timed", progress=sentences.append)
    steps = timed.config.train.steps
    assert timed.config.train == replace(config.train, steps=steps, seconds=None)
    assert read_toml(tmp_path / "timed" / "config.toml") == timed.config
    assert sentences[0].startswith("1 s at 0.")
    assert sentences[0].endswith(f" s per step, validation and checkpoints included: {steps:,} steps")
    assert sorted(p.name for p in timed.out.iterdir() if p.name != ".lock") == [".lock.json", "config.toml", "data"]
    plain = small_trainer(tmp_path, name="plain", steps=steps, sample_every=50)
    for _ in range(3):
        assert timed.train_step() == plain.train_step()
    for trainer in (timed, plain):
        trainer.save()
    files = [run_folder.newest(run.out) / "model.safetensors" for run in (timed, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_slower_model_gets_fewer_steps_of_the_same_seconds(tmp_path, monkeypatch):
    config = small_config(write_text_file(tmp_path), seconds=3.0)
    train_step = budget.Trainer.train_step
    now = 0.0

    def at(seconds_a_step):
        def step(trainer):
            nonlocal now
            now += seconds_a_step
            return train_step(trainer)

        monkeypatch.setattr(budget.Trainer, "train_step", step)
        monkeypatch.setattr(budget.time, "perf_counter", lambda: now)
        return new_run(config, tmp_path / f"run-{seconds_a_step}", progress=False).config.train.steps

    # Four steps or more are timed, in seconds that are part of the budget.
    assert at(0.01) == pytest.approx(3.0 / 0.01 - 16, abs=2)
    assert at(0.1) == 30 - 4
    assert at(5.0) == 1


def test_a_run_that_is_long_enough_to_compile_is_timed_compiled(tmp_path, monkeypatch):
    timed = []

    def compiles(asked, flops, *others, **options):
        return flops > 100 * one, "a test"

    def pace(trainer, seconds):
        timed.append(trainer.batch_loss.compiled)
        return Pace(step=0.001 if trainer.batch_loss.compiled else 0.01, validation=0.0, checkpoint=0.0)

    config = small_config(write_text_file(tmp_path), seconds=2000.0)
    monkeypatch.setattr("timemix.training.batch_loss.flops_per_token", lambda model: 1)
    monkeypatch.setattr("timemix.training.batch_loss.choose_compile", compiles)
    monkeypatch.setattr(budget, "_pace", pace)
    one = 3 * config.train.batch_size * config.window
    trainer = new_run(config, tmp_path / "run", progress=False)
    assert timed == [False, True]
    assert trainer.config.train.steps == pytest.approx(2000 / 0.001, rel=0.2)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000, "1k", "0.5M"])
def test_tokens_are_rounded_up_to_whole_steps(tmp_path, tokens, sentences):
    trainer = new_run(
        small_config(write_text_file(tmp_path), tokens=tokens), tmp_path / "run", progress=sentences.append
    )
    asked = {"1k": 1000, "0.5M": 500_000}.get(tokens, tokens)
    steps = math.ceil(asked / 64)
    assert trainer.config.train.steps == steps
    assert trainer.config.train.tokens is None
    assert sentences == [f"{asked:,} tokens at 64 tokens per step: {steps:,} steps"]


@pytest.mark.parametrize("epochs", [1e-9, 1.0, 2.5])
def test_epochs_are_passes_over_the_training_tokens(tmp_path, epochs, sentences):
    source = write_text_file(tmp_path, "ab\n" * 2400)
    trainer = new_run(small_config(source, epochs=epochs), tmp_path / "run", progress=sentences.append)
    tokens = len(trainer.corpus.train)
    steps = math.ceil(Fraction(str(epochs)) * tokens / 64)
    assert trainer.config.train == replace(small_config(source).train, steps=steps)
    assert sentences == [f"{epochs:g} epochs of {tokens:,} tokens at 64 tokens per step: {steps:,} steps"]
    assert read_toml(trainer.out / "config.toml") == trainer.config
    trainer.lock.release()
    assert resume_run(trainer.out, train={"epochs": 2 * epochs}).config.train.steps in (2 * steps - 1, 2 * steps)


def test_a_number_of_epochs_that_is_exact_in_decimals_is_not_rounded_up():
    """As floats, 1.1 times 6,400 is above 7,040."""
    config, _ = with_counted_steps(small_config("text.txt", epochs=1.1), 6400)
    assert config.train.steps == 110
    assert math.ceil(1.1 * 6400 / 64) == 111


def test_more_tokens_than_a_run_may_have_steps_for_are_refused(tmp_path):
    with pytest.raises(
        InvalidValue, match=r"train.tokens is '100T', which takes 1,562,500,000,000 steps of 64 tokens; .* at most"
    ):
        new_run(small_config(write_text_file(tmp_path), tokens="100T"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
