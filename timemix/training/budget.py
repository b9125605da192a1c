"""The number of steps of a run whose length is set in seconds or in tokens."""

import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from timemix.config.run import MOST_STEPS, RunConfig, TrainConfig, read_count
from timemix.data.corpus import Corpus
from timemix.errors import InvalidValue
from timemix.evaluation.loss import loss_per_token
from timemix.runtime.distributed import World
from timemix.training.trainer import Trainer

Say = Callable[[str], object]

VALIDATED = 32_769
"""Tokens of the held-out text at most that are timed."""
SHARE = 0.05
"""Of the seconds of a run, at most those spent on timing its steps."""
LONGEST = 5.0
"""Seconds of timed steps, after which their mean is known well enough."""


@dataclass(frozen=True)
class Pace:
    """Seconds that the parts of a run take: a step, a validation on the whole held-out text, a checkpoint, a sample."""

    step: float
    validation: float
    checkpoint: float
    sample: float = 0.0

    def seconds_per_step(self, train: TrainConfig) -> float:
        """Of a step with its share of validations, each of which may be followed by a checkpoint, and of the rest."""
        validation = (self.validation + self.checkpoint) / train.valid_every
        sample = self.sample / train.sample_every if train.sample_every else 0.0
        return self.step + validation + self.checkpoint / train.save_every + sample

    def steps_within(self, seconds: float, train: TrainConfig) -> int:
        """Steps that fit into `seconds`, beside the validations before and after all of them; at least 1."""
        left = seconds - 2 * self.validation - self.checkpoint
        return min(max(1, int(left / self.seconds_per_step(train))), MOST_STEPS)


def with_steps(config: RunConfig, corpus: Corpus, out: Path, world: World, say: Say) -> RunConfig:
    """Return the config with its seconds or tokens replaced by the steps that they allow.

    All processes call, and get the same number. For seconds, a model of the same config takes some steps, and is
    dropped; the weights and random numbers of the run do not depend on it.

    Args:
        config: Of the run, resolved for the corpus.
        corpus: Its tokens.
        out: Folder of the run, for a checkpoint that is timed and removed.
        world: The processes of the run.
        say: Called with a sentence about the result, in process 0.

    Raises:
        InvalidValue: The steps are more than a run may have.
        NotFinite: The loss of a timed step is not finite.
    """
    train = config.train
    if train.tokens is not None:
        steps = steps_of_tokens(config)
        each = train.batch_size * config.window
        sentence = f"{read_count(train.tokens):,} tokens at {each:,} a step: {steps:,} steps"
    elif train.seconds is not None:
        steps, sentence = _steps_of_seconds(config, train.seconds, corpus, out, world)
    else:
        return config
    if world.first:
        say(sentence)
    return replace(config, train=replace(train, steps=steps, seconds=None, tokens=None))


def steps_of_tokens(config: RunConfig) -> int:
    """Steps that take in `train.tokens`, the last one perhaps more than is left of them."""
    assert config.train.tokens is not None
    each = config.train.batch_size * config.window
    steps = -(-read_count(config.train.tokens) // each)
    if steps > MOST_STEPS:
        raise InvalidValue(
            f"train.tokens is {str(config.train.tokens)!r}: {steps:,} steps of {each:,} tokens; a run has at most"
            f" {MOST_STEPS:,}"
        )
    return steps


def _steps_of_seconds(config: RunConfig, seconds: float, corpus: Corpus, out: Path, world: World) -> tuple[int, str]:
    began = time.perf_counter()
    scratch = out / ".scratch"
    steps, compiled = 1, None
    try:
        while True:
            sized = replace(config, train=replace(config.train, steps=steps, seconds=None))
            trainer = Trainer(sized, scratch, corpus, world=world)
            # Whether a run is compiled depends on its length: one that is long enough is timed again, compiled.
            if compiled is not None and (compiled or not trainer.compiled):
                break
            compiled = trainer.compiled
            pace = _pace(trainer, min(SHARE * seconds, LONGEST))
            left = seconds - (time.perf_counter() - began)
            # The clocks of several processes differ; that of the first counts.
            (whole,) = world.sum(pace.steps_within(left, config.train) if world.first else 0)
            steps = int(whole)
    finally:
        if world.first:
            shutil.rmtree(scratch, ignore_errors=True)
    each = f"{pace.seconds_per_step(config.train):.3g}"
    return steps, f"{seconds:g} s at {each} s a step, validation and checkpoints included: {steps:,} steps"


def _pace(trainer: Trainer, seconds: float) -> Pace:
    """Time the parts of a run; its steps for so many seconds, and at least three."""
    # The first step allocates and compiles.
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
    # The checkpoint first: it creates the folder of the sample.
    checkpoint = _seconds(trainer.save)
    sample = _seconds(trainer.sample) if trainer.config.train.sample_every else 0.0
    return Pace(step, validation, checkpoint, sample)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
