"""Number of steps of a run whose length is given in seconds, tokens or epochs."""

import functools
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from timemix.config.run import MOST_STEPS, RunConfig, TrainConfig, read_count
from timemix.data.corpus import Corpus
from timemix.errors import InvalidValue
from timemix.evaluation.loss import loss_per_token
from timemix.runtime.distributed import World
from timemix.training.trainer import Trainer

Say = Callable[[str], object]

VALIDATED = 32_769
"""Largest number of held-out tokens in the timed validation."""
SHARE = 0.05
"""Largest share of a run's seconds for the timing of steps."""
LONGEST = 5.0
"""Largest number of seconds for the timing of steps. This time is enough for an accurate mean."""


@dataclass(frozen=True)
class Pace:
    """Duration of each part of a run, in seconds. A validation uses the whole held-out text."""

    step: float
    validation: float
    checkpoint: float
    sample: float = 0.0

    def seconds_per_step(self, train: TrainConfig) -> float:
        """Return the mean seconds of a step, including its share of validations, checkpoints and samples.

        Each validation is counted together with a checkpoint, because a checkpoint may follow the validation.
        """
        validation = (self.validation + self.checkpoint) / train.valid_every
        sample = self.sample / train.sample_every if train.sample_every else 0.0
        return self.step + validation + self.checkpoint / train.save_every + sample

    def steps_within(self, seconds: float, train: TrainConfig) -> int:
        """Return the number of steps that fit into `seconds`, at least 1.

        The time of two validations (before the first and after the last step) and one checkpoint is subtracted first.
        """
        left = seconds - 2 * self.validation - self.checkpoint
        return min(max(1, int(left / self.seconds_per_step(train))), MOST_STEPS)


def with_steps(config: RunConfig, corpus: Corpus, out: Path, world: World, say: Say) -> RunConfig:
    """Return the config with a number of steps in place of its seconds, tokens or epochs.

    All processes must call this function, and all processes get the same number of steps. If `train.seconds` is given,
    a second model of the same config trains a few timed steps and is discarded. The second model changes neither the
    weights nor the random numbers of the run.

    Args:
        config: Config of the run, with the fields that the corpus determines.
        corpus: Tokens of the run.
        out: Run folder, in which a timed checkpoint is saved and then removed.
        world: The processes of the run.
        say: Function that process 0 calls with a message about the result.

    Raises:
        InvalidValue: The run would need more than `MOST_STEPS` steps for the tokens or epochs.
        NotFinite: The loss of a timed step is not finite.
    """
    train = config.train
    if train.seconds is not None:
        steps, sentence = _steps_of_seconds(config, train.seconds, corpus, out, world)
        counted = replace(config, train=replace(train, steps=steps, seconds=None))
    else:
        counted, sentence = with_counted_steps(config, len(corpus.train))
    if world.first and sentence:
        say(sentence)
    return counted


def with_counted_steps(config: RunConfig, training_tokens: int) -> tuple[RunConfig, str]:
    """Return the config with a number of steps in place of its tokens or epochs, rounded up, and a message.

    The message is empty if the config has neither tokens nor epochs.

    Args:
        config: Config of the run.
        training_tokens: Number of tokens of the training text.

    Raises:
        InvalidValue: The number of steps exceeds `MOST_STEPS`.
    """
    train = config.train
    each = train.batch_size * config.window
    if train.tokens is not None:
        name, value = "tokens", str(train.tokens)
        tokens = Fraction(read_count(train.tokens))
        words = f"{int(tokens):,} tokens"
    elif train.epochs is not None:
        name, value = "epochs", f"{train.epochs:g}"
        # The decimal digits of the setting are exact: as a float, 1.1 epochs would be slightly more.
        tokens = Fraction(repr(train.epochs)) * training_tokens
        words = f"{value} epochs of {training_tokens:,} tokens"
    else:
        return config, ""
    steps = math.ceil(tokens / each)
    if steps > MOST_STEPS:
        raise InvalidValue(
            f"train.{name} is {value!r}, which takes {steps:,} steps of {each:,} tokens; a run has at most"
            f" {MOST_STEPS:,} steps"
        )
    sentence = f"{words} at {each:,} tokens per step: {steps:,} steps"
    return replace(config, train=replace(train, steps=steps, tokens=None, epochs=None)), sentence


def _steps_of_seconds(config: RunConfig, seconds: float, corpus: Corpus, out: Path, world: World) -> tuple[int, str]:
    began = time.perf_counter()
    scratch = out / ".scratch"
    steps, compiled = 1, None
    try:
        while True:
            sized = replace(config, train=replace(config.train, steps=steps, seconds=None))
            trainer = Trainer(sized, scratch, corpus, world=world)
            # Only long runs are compiled. If the run is long enough, a second pass times compiled steps.
            if compiled is not None and (compiled or not trainer.batch_loss.compiled):
                break
            compiled = trainer.batch_loss.compiled
            pace = _pace(trainer, min(SHARE * seconds, LONGEST))
            left = seconds - (time.perf_counter() - began)
            # The clocks of several processes differ, so process 0 decides.
            (whole,) = world.sum(pace.steps_within(left, config.train) if world.first else 0)
            steps = int(whole)
    finally:
        if world.first:
            shutil.rmtree(scratch, ignore_errors=True)
    each = f"{pace.seconds_per_step(config.train):.3g}"
    return steps, f"{seconds:g} s at {each} s per step, validation and checkpoints included: {steps:,} steps"


def _pace(trainer: Trainer, seconds: float) -> Pace:
    """Time at least three steps, for `seconds` seconds, and then each other part of a run once."""
    # The first step is not timed, because it also allocates memory and compiles.
    trainer.train_step()
    began = time.perf_counter()
    is_going = 1.0
    while is_going:
        trainer.train_step()
        short = time.perf_counter() - began < seconds or trainer.step < 4
        (is_going,) = trainer.world.sum(float(short and trainer.world.first))
    step = (time.perf_counter() - began) / (trainer.step - 1)
    valid = trainer.corpus.valid
    piece = valid[:VALIDATED]
    validation = 0.0
    if len(valid) > 1:
        validate = functools.partial(loss_per_token, trainer.model, piece, precision=trainer.precision)
        validation = _seconds(lambda: validate(world=trainer.world)) * (len(valid) - 1) / (len(piece) - 1)
    # Save the checkpoint first, because saving creates the folder of the sample.
    checkpoint = _seconds(trainer.save)
    sample = _seconds(trainer.sample) if trainer.config.train.sample_every else 0.0
    return Pace(step, validation, checkpoint, sample)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
