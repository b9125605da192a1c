"""The verb train: train a model, or resume a run."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from timemix.cli.options import Choice, DataOptions, PresetName, first_parse, parse
from timemix.config.from_file import config_from_file
from timemix.config.presets import DEFAULT_PRESET
from timemix.config.run import RunConfig, TrainConfig, read_toml
from timemix.data.config import DataConfig
from timemix.errors import AlreadyExists, DamagedFile, InvalidValue, TimemixError
from timemix.models.config import ModelConfig

if TYPE_CHECKING:
    from timemix.runtime.distributed import World
    from timemix.training.hooks import Hook


@dataclass(frozen=True)
class Tracking:
    """Further destinations of the lines of metrics.jsonl."""

    tensorboard: bool = False
    """TensorBoard events in the run folder's tensorboard/."""
    hook: str | None = None
    """Function, as module:function, called with each line as a dictionary; for tracking services."""


@dataclass(frozen=True)
class TrainArguments:
    """Train a model, fine-tune one, or resume a run.

    - timemix train [PRESET] --data FILE --out RUN: from a preset; --data is short for --data.source
    - timemix train [PRESET] --config FILE --out RUN: from a file of settings, which win over those of the preset
    - timemix train --from RUN --data FILE --out NEXT: from the weights, tokenizer and settings of a run
    - timemix train --resume RUN: a run from its newest checkpoint

    All other options win over preset, file and run.
    """

    out: Path
    """New folder for the run."""
    preset: PresetName = None
    config: Path | None = None
    """File of settings: config.toml of a run folder, or your own with only some fields. The preset gives the others.
    With --model.arch, fields that both architectures have are kept."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Run folder, or one of its checkpoints, whose weights, tokenizer and settings training starts from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = field(default_factory=Tracking)


@dataclass(frozen=True)
class ResumeArguments:
    """Resume a run from its newest checkpoint, with its own settings."""

    resume: Path
    """Run folder."""
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = field(default_factory=Tracking)


def _check_choice(choice: Choice) -> None:
    """Raises InvalidValue for options that exclude one another."""
    named = {"--config": choice.config, "--from": choice.from_, "--resume": choice.resume}
    given = [f"{flag} {path}" for flag, path in named.items() if path is not None]
    if len(given) > 1:
        raise InvalidValue(f"{' and '.join(given)} exclude one another: each brings the settings of the run; name one")
    if choice.preset is not None and given and choice.config is None:
        raise InvalidValue(f"{given[0]} brings its own settings: leave out the preset {choice.preset!r}")


def _defaults(choice: Choice) -> RunConfig:
    """Return the settings that the other options change."""
    if choice.config is not None:
        config = config_from_file(choice.config, choice.preset or DEFAULT_PRESET, choice.arch)
        if config.start is not None and not Path(config.start).exists():
            raise DamagedFile(f"{choice.config}: start is {config.start!r}, which does not exist; remove that line")
        return config
    if choice.from_ is None:
        return choice.preset_config()
    from timemix.runs.folder import read_checkpoint

    config = read_checkpoint(choice.from_, "best", lambda folder: read_toml(folder / "config.toml"))
    # The text may be another one; where it lies, and what is held out of it, are not.
    data = DataConfig(source=config.data.source, order=config.data.order)
    return replace(config, data=data, train=replace(config.train, device="auto"), start=None)


def train_options(arguments: list[str]) -> ResumeArguments | TrainArguments:
    """Options of the verb, each from the flag, else from the file, run or preset that the first parse finds."""
    choice = first_parse(arguments)
    _check_choice(choice)
    if choice.resume is not None:
        return parse(ResumeArguments, arguments, "train")
    config = _defaults(choice)
    default = TrainArguments(
        out=tyro.MISSING,
        from_=None if config.start is None else Path(config.start),
        model=config.model,
        data=DataOptions.of(config.data),
        train=config.train,
    )
    return parse(TrainArguments, arguments, "train", default, choice)


def train(arguments: list[str]) -> int:
    # Options first: under torchrun, what is wrong with them needs no other process.
    asked = train_options(arguments)
    from timemix.runtime.distributed import Elsewhere, joined
    from timemix.training.hooks import load_hook

    hook = None if asked.tracking.hook is None else load_hook(asked.tracking.hook)
    with joined() as world:
        try:
            return _train(asked, hook, world)
        except Elsewhere:
            return 2
        except TimemixError:
            # What is wrong in one process is most often wrong in all.
            if world.says_first():
                raise
            return 2


def _train(asked: "ResumeArguments | TrainArguments", hook: "Hook | None", world: "World") -> int:
    from timemix.cli.training import run_trainer, write_sample
    from timemix.training.hooks import tensorboard
    from timemix.training.start import new_run, resume_run

    if isinstance(asked, ResumeArguments):
        out = asked.resume
        trainer = resume_run(out, world)
        if world.first and trainer.lock.taken_over:
            print(f"{trainer.lock.taken_over} locked {out} and ended without unlocking it", file=sys.stderr)
        if trainer.step >= trainer.config.train.steps:
            if world.first:
                print(f"{out} is complete: {trainer.step} steps")
            return 0
        if world.first:
            print(f"resuming {out} after step {trainer.step}", file=sys.stderr)
    else:
        out = asked.out
        start = None if asked.from_ is None else str(asked.from_)
        try:
            trainer = new_run(RunConfig(asked.model, asked.data.config(), asked.train, start), out, world)
        except AlreadyExists as error:
            raise AlreadyExists(
                f"{out} exists already; choose another --out, or resume it with --resume {out}"
            ) from error
    hooks = [hook] if hook is not None else []
    if asked.tracking.tensorboard and world.first:
        hooks.append(tensorboard(out / "tensorboard", trainer.step))
    status = run_trainer(trainer, hooks=hooks)
    if status == 0 and world.first:
        write_sample(trainer)
        print(f"the run is in {out}: loss.png, samples.txt, metrics.jsonl, checkpoints", file=sys.stderr)
    return status
