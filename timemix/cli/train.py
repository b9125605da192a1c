"""The command-line verb train: train a model, or resume a run."""

import argparse
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

from timemix.cli.options import Choice, DataOptions, PresetName, first_parse, parse
from timemix.cli.terminal import lasting_output, own_command
from timemix.config.from_file import config_from_file
from timemix.config.presets import DEFAULT_PRESET, PRESETS
from timemix.config.run import BUDGETS, RunConfig, TrainConfig, check_budget, read_toml
from timemix.errors import AlreadyExists, DamagedFile, InvalidValue, TimemixError, Unavailable
from timemix.models.config import ModelConfig

if TYPE_CHECKING:
    from timemix.runtime.distributed import World
    from timemix.training.hooks import Hook
    from timemix.training.trainer import Trainer


@dataclass(frozen=True)
class Reporting:
    """Reports during the training."""

    quiet: bool = False
    """Only warnings and errors on stderr; no progress."""

    tensorboard: bool = False
    """Events for TensorBoard in the folder tensorboard/ of the run folder."""
    hook: str | None = None
    """Hook as module:function, called with each line of metrics.jsonl as a dictionary. Default: no function."""
    track: Literal["wandb", "trackio", "mlflow", "csv"] | None = None
    """Service that records metrics, settings and samples, or `csv` for the file metrics.csv of the run folder.
    Default: no service."""
    track_project: str | None = None
    """Project of --track; in MLflow, the experiment. Default: timemix; with --resume, the project so far."""


@dataclass(frozen=True)
class TrainArguments:
    """Train a model on a text, fine-tune a trained model (--from), or resume a run (--resume).

    Settings come from the preset, from the file of --config, or from the run of --from. Options override these
    settings. One of --train.steps, --train.seconds, --train.tokens and --train.epochs sets the length
    of the run.

    Examples:
        timemix train cpu-small --data my.txt --out runs/mine
        timemix train --resume runs/mine
        timemix train --from runs/mine --data other.txt --out runs/next --train.steps 200
        timemix train --config runs/mine/config.toml --out runs/again --train.seed 2
    """

    most_used: ClassVar = (
        "data.source",
        "out",
        "resume",
        "from",
        "model.arch",
        "model.layers",
        "model.ctx-len",
        "train.steps",
        "train.seconds",
        "train.lr",
    )

    out: Path
    """New folder for the run; --resume needs no --out."""
    preset: PresetName = None
    config: Path | None = None
    """TOML file of settings, such as config.toml of a run folder; fields may be absent. Default: only the preset."""
    resume: Path | None = None
    """Run folder to resume from its newest checkpoint (see timemix train --resume RUN --help). Default: a new run."""
    from_: Path | None = None
    """Run folder, or checkpoint, that gives the initial weights, tokenizer and settings. Default: random weights."""
    from_state: Path | None = None
    """Session file (timemix sample --save-state, timemix export --to state) whose state --train.tune state starts from.
    Default: a state of zeros, or the learned state of --from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    reporting: tyro.conf.OmitArgPrefixes[Reporting] = field(default_factory=Reporting)


@dataclass(frozen=True)
class ResumeArguments:
    """Resume a run from its newest checkpoint, with the settings of the run; training options override these settings.

    The learning rate follows the schedule of the new settings: at step S, the rate is the rate at step S of a new run
    with these settings. The model, the text, --train.batch-size, --train.contexts, --train.seed and --train.optimizer
    cannot change. A new run from the weights of this run can change these settings, except those of the model: timemix
    train --from RUN --out NEXT. Of the model, such a run can change only --model.dropout and --model.ctx-len.
    --train.seconds sets the length of new runs only.

    Examples:
        timemix train --resume runs/mine
        timemix train --resume runs/mine --train.steps 4000
        timemix train --resume runs/mine --train.lr 1e-3
    """

    most_used: ClassVar = ("resume", "train.steps", "train.lr")

    resume: Path
    """Run folder to resume."""
    train: TrainConfig = field(default_factory=TrainConfig)
    reporting: tyro.conf.OmitArgPrefixes[Reporting] = field(default_factory=Reporting)


_RESIZED = ("--model.dropout", "--model.ctx-len", "--model.ctx_len")
"""Settings of the model that can change in a run that starts from trained weights."""


def _check_choice(choice: Choice) -> None:
    """Raise InvalidValue for options that exclude one another."""
    named = {"--config": choice.config, "--from": choice.from_, "--resume": choice.resume}
    given = [f"{flag} {path}" for flag, path in named.items() if path is not None]
    if len(given) > 1:
        raise InvalidValue(
            f"{' and '.join(given)} exclude one another: each gives the settings of the run; give only one"
        )
    if choice.preset is not None and choice.preset not in PRESETS and Path(choice.preset).exists():
        raise InvalidValue(f"unknown preset {choice.preset!r}; {_way_to_train(choice.preset)}")
    if choice.preset is not None and given and choice.config is None:
        raise InvalidValue(f"{given[0]} has its own settings; leave out the preset {choice.preset!r}")


def _way_to_train(path: str) -> str:
    """Return the advice about a path in place of a preset."""
    shown = shlex.quote(path)
    if (Path(path) / "config.toml").exists():
        return f"to resume this run: timemix train --resume {shown}"
    if Path(path).suffix == ".toml":
        return f"to train with the settings of this file: timemix train --config {shown} --out RUN"
    return f"to train on this text: timemix train --data {shown} --out RUN"


def _defaults(choice: Choice, has_text: bool) -> RunConfig:
    """Return the settings that the options of the command override.

    Args:
        choice: The options of the first parse.
        has_text: Whether the command names a text.
    """
    if choice.config is not None:
        config = config_from_file(choice.config, choice.preset or DEFAULT_PRESET, choice.arch)
        if config.start is not None and not Path(config.start).exists():
            raise DamagedFile(f"{choice.config}: start is {config.start!r}, which does not exist; change or remove it")
        return config
    if choice.from_ is None:
        return choice.preset_config()
    from timemix.runs.folder import read_checkpoint

    config, checkpoint = read_checkpoint(
        choice.from_, "best", lambda folder: (read_toml(folder / "config.toml"), folder)
    )
    data = config.data
    if data.source == "-":
        # Standard input cannot be read again, but its prepared tokens can be read again.
        data = data.with_source(str(checkpoint.parents[1] / "data"))
    elif has_text:
        # Settings on how to read and to divide the old text do not apply to another text.
        data = data.with_source(data.source)
    # A run of imported weights has neither a text nor steps.
    steps = config.train.steps if config.data.source else TrainConfig.steps
    train = replace(config.train, device="auto", steps=steps)
    return replace(config, data=data, train=train, start=None, start_state=None)


def _check_resumable(arguments: list[str], run: Path) -> None:
    """Raise InvalidValue for an option that only a new run accepts."""
    from_weights = f"start a new run from its weights with: timemix train --from {shlex.quote(str(run))} --out NEXT"
    for flag in (word.partition("=")[0] for word in arguments):
        if flag == "--out":
            raise InvalidValue(f"--resume {run} trains in the folder {run}; leave --out out, or {from_weights}")
        if flag == "--from-state":
            raise InvalidValue(f"--from-state gives the first state of a new run, and {run} has begun; leave it out")
        if flag == "--data" or flag.startswith("--data.") or flag in _RESIZED:
            raise InvalidValue(f"{flag} cannot change in the resumed run {run}; {from_weights} {flag} VALUE")
        if flag.startswith("--model."):
            raise InvalidValue(
                f"{flag} cannot change in the trained model of {run}; train a new model from random weights with:"
                f" timemix train --config {shlex.quote(str(run / 'config.toml'))} --out NEXT {flag} VALUE"
            )


def _with_budget(train: TrainConfig, arguments: list[str]) -> TrainConfig:
    """Return the settings, without a length of the run if an option sets the length.

    Raises:
        InvalidValue: Two options set the length of the run.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in BUDGETS:
        options.add_argument(f"--train.{name}", dest=name, nargs="?")
    given = vars(options.parse_known_args(arguments)[0])
    check_budget(given)
    return replace(train, seconds=None, tokens=None, epochs=None) if any(given.values()) else train


def train_options(arguments: list[str]) -> ResumeArguments | TrainArguments:
    """Return the options of `timemix train`, with default values from the file, run or preset of the first parse."""
    choice = first_parse(arguments)
    _check_choice(choice)
    if choice.resume is not None:
        _check_resumable(arguments, choice.resume)
        settings = _with_budget(_config_of(choice.resume).train, arguments)
        resumed = parse(ResumeArguments, arguments, "train", ResumeArguments(choice.resume, settings))
        return replace(resumed, train=_without_rise(resumed.train, arguments))
    has_text = any(word.partition("=")[0] in ("--data", "--data.source") for word in arguments)
    config = _defaults(choice, has_text)
    default = TrainArguments(
        out=tyro.MISSING,
        from_=None if config.start is None else Path(config.start),
        from_state=None if config.start_state is None else Path(config.start_state),
        model=config.model,
        data=DataOptions.of(config.data),
        train=_with_budget(config.train, arguments),
    )
    parsed = parse(TrainArguments, arguments, "train", default, choice)
    _check_lora(arguments, parsed.train)
    if choice.from_ is not None:
        _check_vocabulary(arguments)
    return replace(parsed, train=_without_rise(parsed.train, arguments))


def _without_rise(train: TrainConfig, arguments: list[str]) -> TrainConfig:
    """Return settings whose last learning rate is not above the `--train.lr` of the command, unless it names both."""
    given = {word.partition("=")[0].replace("_", "-") for word in arguments}
    if "--train.lr" in given and "--train.lr-final" not in given:
        return replace(train, lr_final=min(train.lr_final, train.lr))
    return train


def _check_lora(arguments: list[str], train: TrainConfig) -> None:
    """Raise InvalidValue for an option of LoRA in a run without LoRA. Such a run would train all weights."""
    for flag in (word.partition("=")[0].replace("_", "-") for word in arguments):
        if flag.startswith("--train.lora-") and train.tune != "lora":
            raise InvalidValue(
                f"{flag} needs --train.tune lora, but --train.tune is {train.tune}; set --train.tune to lora"
            )


def _check_vocabulary(arguments: list[str]) -> None:
    """Raise InvalidValue for options of a new vocabulary in a run that starts from a trained model."""
    for flag in (word.partition("=")[0].replace("_", "-") for word in arguments):
        if flag in ("--data.vocabulary", "--data.vocab-size"):
            raise InvalidValue(
                f"{flag} has no effect with --from, whose model has its own vocabulary; leave {flag} out"
            )


def _config_of(run: Path) -> RunConfig:
    """Return the config of a run. Raise FileError if the folder is no run folder."""
    from timemix.runs.folder import check_run

    check_run(run)
    return read_toml(run / "config.toml")


def train(arguments: list[str]) -> int:
    # Check options first: under torchrun, each process finds an error in its options without the other processes.
    asked = train_options(arguments)
    from timemix.runs.folder import last_good
    from timemix.runtime.distributed import Elsewhere, joined
    from timemix.training.hooks import load_hook
    from timemix.training.parallel import losses_reported
    from timemix.training.trackers import check_tracker

    check_tracker(asked.reporting.track, asked.reporting.track_project)
    hook = None if asked.reporting.hook is None else load_hook(asked.reporting.hook)
    with lasting_output(), joined() as world:
        try:
            # Processes can also be lost before the training and after it.
            run = asked.resume if isinstance(asked, ResumeArguments) else asked.out
            with losses_reported(world, lambda: last_good(run)):
                return _train(asked, hook, world)
        except Elsewhere:
            return 2
        except TimemixError:
            # An error in one process is usually an error in all processes, so only one process reports the error.
            if world.says_first():
                raise
            return 2


def _train(asked: "ResumeArguments | TrainArguments", hook: "Hook | None", world: "World") -> int:
    from timemix.cli.training import run_trainer
    from timemix.runtime.machine import keep_freed_memory

    keep_freed_memory()
    trainer = _resumed(asked, world) if isinstance(asked, ResumeArguments) else _begun(asked, world)
    try:
        if trainer.is_complete:
            return 0
        trackers = world.first_does(lambda: _trackers(asked.reporting, trainer)) or []
        hooks = trackers if hook is None else [hook, *trackers]
        status = run_trainer(trainer, hooks=hooks, quiet=asked.reporting.quiet, samples_at_end=True)
    finally:
        trainer.lock.release()
    if status == 0 and world.first and not asked.reporting.quiet:
        print(f"the run is in {trainer.out}: loss.png, samples.txt, metrics.jsonl, checkpoints", file=sys.stderr)
    return status


def _trackers(reporting: Reporting, trainer: "Trainer") -> "list[Hook]":
    from timemix.training.hooks import TensorBoard
    from timemix.training.trackers import start_tracker

    started: list[Hook] = []
    if reporting.tensorboard:
        started.append(TensorBoard(trainer.out / "tensorboard", trainer.step))
    if reporting.track is not None:
        try:
            started.append(start_tracker(reporting.track, trainer.out, trainer.config, reporting.track_project))
        except Unavailable as error:
            resume = f"{own_command()} train --resume {shlex.quote(str(trainer.out))} --track {reporting.track}"
            for flag, value in (("--track-project", reporting.track_project), ("--hook", reporting.hook)):
                resume += "" if value is None else f" {flag} {shlex.quote(value)}"
            resume += " --tensorboard" if reporting.tensorboard else ""
            raise Unavailable(f"{error}; the run is ready to train: {resume}") from error
    return started


def _begun(asked: TrainArguments, world: "World") -> "Trainer":
    from timemix.training.start import new_run

    out = asked.out
    start = None if asked.from_ is None else str(asked.from_)
    state = None if asked.from_state is None else str(asked.from_state.resolve())
    config = RunConfig(asked.model, asked.data.config(), asked.train, start, state)
    try:
        return new_run(config, out, world, progress=not asked.reporting.quiet)
    except AlreadyExists as error:
        way = (
            f", or resume the run with: timemix train --resume {shlex.quote(str(out))}"
            if (out / "config.toml").exists()
            else ""
        )
        raise AlreadyExists(f"--out {out} exists already; choose another folder{way}") from error


def _resumed(asked: ResumeArguments, world: "World") -> "Trainer":
    """Return the trainer of a run to resume, and print the changed settings or a notice of completion."""
    from timemix.cli.training import stopped_early
    from timemix.training.start import resume_run

    out = asked.resume
    before, after = vars(read_toml(out / "config.toml").train), vars(asked.train)
    changes = {name: after[name] for name in after if after[name] != before[name]}
    trainer = resume_run(out, world, changes)
    if not world.first:
        return trainer
    if trainer.lock.taken_over:
        print(f"timemix: {trainer.lock.taken_over} locked {out} and ended without unlocking it", file=sys.stderr)
    if trainer.validation.stopped_early:
        print(stopped_early(trainer))
    elif trainer.is_complete:
        print(
            f"{out} is complete: {trainer.step} steps; train it longer with:"
            f" timemix train --resume {shlex.quote(str(out))} --train.steps {2 * trainer.step or TrainConfig.steps}"
        )
    elif not asked.reporting.quiet:
        print(f"resuming {out} after step {trainer.step}{_changes(trainer, before, changes)}", file=sys.stderr)
    return trainer


def _changes(trainer: "Trainer", before: dict[str, Any], changes: dict[str, Any]) -> str:
    """Return the end of a message: the changed settings, and the resulting learning rate at the next step."""
    if not changes:
        return ""
    from timemix.training.optim import learning_rate

    now = vars(trainer.config.train)
    names = dict.fromkeys("steps" if name in BUDGETS else name for name in changes)
    words = ", ".join(f"--train.{name.replace('_', '-')} {now[name]} (before: {before[name]})" for name in names)
    rate = learning_rate(trainer.config.train, trainer.step, trainer.recipe.warmup_floor)
    return f", with {words}; learning rate at step {trainer.step + 1}: {rate:.3g}, by the schedule of the new settings"
