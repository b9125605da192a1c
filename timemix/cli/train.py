"""The verb train: train a model, or resume a run."""

import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from timemix.cli.options import default_prompt, parse, preset_of
from timemix.config.run import RunConfig, TrainConfig, read_toml
from timemix.data.config import DataConfig
from timemix.errors import AlreadyExists, CannotWrite, Interrupted, InvalidValue, ProcessLost, TimemixError
from timemix.models.config import ModelConfig
from timemix.storage.files import cannot_write

if TYPE_CHECKING:
    from timemix.runtime.distributed import World
    from timemix.training.hooks import Hook
    from timemix.training.trainer import Trainer, TrainingProgress, Watch


@dataclass(frozen=True)
class Tracking:
    """Where the lines of metrics.jsonl go besides."""

    tensorboard: bool = False
    """Write them for TensorBoard too, to the run folder's tensorboard/."""
    hook: str | None = None
    """A function, as module:function, that gets each of them as a dictionary; for tracking services."""


@dataclass(frozen=True)
class TrainArguments:
    """Train a model. Name a preset first to start from its values: timemix train cpu-small --data FILE --out DIR"""

    out: Path
    """Folder to make for the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Begin with the weights and the tokenizer of this run, or of one of its checkpoints."""
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = field(default_factory=Tracking)


@dataclass(frozen=True)
class ResumeArguments:
    """Go on with a run from its newest checkpoint."""

    resume: Path
    """Run folder."""
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = field(default_factory=Tracking)


def _defaults(arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """What flags change: the config of the run after --from, else of a preset; and the arguments but its name."""
    start = next((a.partition("=")[2] or b for a, b in pairwise([*arguments, ""]) if re.match("--from(=|$)", a)), None)
    if start is None:
        return preset_of(arguments, "cpu-small")
    if not arguments[0].startswith("-"):
        raise InvalidValue(f"--from {start} brings its own settings: leave out the preset {arguments[0]!r}")
    from timemix.runs.folder import find

    config = read_toml(find(start) / "config.toml")
    # The text may be another one; where it lies, and what is held out of it, are not.
    data = DataConfig(source=config.data.source, order=config.data.order)
    return replace(config, data=data, train=replace(config.train, device="auto")), arguments


def train(arguments: list[str]) -> int:
    # Options first: under torchrun, what is wrong with them needs no other process.
    if any(a == "--resume" or a.startswith("--resume=") for a in arguments):
        asked: ResumeArguments | TrainArguments = parse(ResumeArguments, arguments, "train")
    else:
        config, arguments = _defaults(arguments)
        # --data is short for --data.source.
        arguments = [re.sub(r"^--data(?==|$)", "--data.source", a) for a in arguments]
        asked = parse(
            TrainArguments, arguments, "train", TrainArguments(tyro.MISSING, config.model, config.data, config.train)
        )
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
    from timemix.training.hooks import tensorboard
    from timemix.training.start import new_run, resume_run

    if isinstance(asked, ResumeArguments):
        out = asked.resume
        trainer = resume_run(out, world)
        if world.first and trainer.lock.taken_over:
            print(f"{trainer.lock.taken_over} held {out} and ended without letting go", file=sys.stderr)
        if trainer.step >= trainer.config.train.steps:
            if world.first:
                print(f"{out} is complete: {trainer.step} steps")
            return 0
        if world.first:
            print(f"going on with {out} after step {trainer.step}", file=sys.stderr)
    else:
        out = asked.out
        start = None if asked.from_ is None else str(asked.from_)
        try:
            trainer = new_run(RunConfig(asked.model, asked.data, asked.train, start), out, world)
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


def run_trainer(trainer: "Trainer", during: "Watch | None" = None, hooks: "Sequence[Hook]" = ()) -> int:
    """Trains with progress on stderr and draws the loss curve; returns the exit status."""
    from timemix.cli.watch import watching
    from timemix.reporting.plots import plot_loss
    from timemix.runtime.machine import keep_freed_memory

    keep_freed_memory()

    config, world = trainer.config, trainer.world
    if world.first:
        _introduce(trainer)
    try:
        with watching(trainer.step, config.train.steps) if world.first else nullcontext(_ignore) as watch:

            def both(progress: "TrainingProgress") -> None:
                watch(progress)
                if during is not None:
                    during(progress)

            def hook(line: dict[str, Any]) -> None:
                for each in hooks:
                    each(line)

            trainer.run(both, hook)
    except (CannotWrite, ProcessLost) as error:
        raise type(error)(f"{error}; resume with: timemix train --resume {trainer.out}") from error
    except Interrupted as stop:
        if world.first:
            print(f"timemix: {stop}; go on with: timemix train --resume {trainer.out}", file=sys.stderr)
        return 128 + stop.number
    if not world.first:
        return 0
    plot_loss([trainer.out], trainer.out / "loss.png")
    if trainer.valid_loss is not None:
        print(
            f"validation loss {trainer.valid_loss:.4f} nats per token (best {trainer.best_loss:.4f})"
            f" after {trainer.seconds:.0f} s of training",
            file=sys.stderr,
        )
    return 0


def _ignore(progress: "TrainingProgress") -> None:
    """For the processes that do not speak."""


def _introduce(trainer: "Trainer") -> None:
    config, world = trainer.config, trainer.world
    processes = "" if world.size == 1 else f", {world.size} processes ({config.train.strategy})"
    print(
        f"{config.model.arch}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters,"
        f" vocabulary {config.model.vocab_size};"
        f" {len(trainer.corpus.train):,} training tokens, {len(trainer.corpus.valid):,} held out\n"
        f"{trainer.device} ({trainer.device_reason}), {trainer.precision} ({trainer.precision_reason}){processes}"
        + "".join(f", {op} {form}" for op, form in trainer.model.block.forms(config.model, trainer.precision).items())
        + f", {'compiled' if trainer.compiled else 'not compiled'} ({trainer.compile_reason})",
        file=sys.stderr,
    )


def write_sample(trainer: "Trainer", prompt: str | None = None, tokens: int = 300) -> str:
    """Appends what the model writes now to samples.txt and returns it; without a prompt it goes on from a line end."""
    from timemix.generation.generate import generate
    from timemix.generation.sampler import Sampler
    from timemix.runs.load import Loaded, load

    tokenizer = trainer.corpus.tokenizer
    if prompt is None:
        prompt = default_prompt(tokenizer)
    # A model that is cut up over processes can write in none of them alone.
    alone = trainer.world.size == 1
    model = trainer.model if alone else load(trainer.out, checkpoint="newest").model
    model.eval()
    loaded = Loaded(model, tokenizer, trainer.config, trainer.out)
    text = prompt + generate(loaded, prompt, tokens=tokens, sampler=Sampler(top_a=0.02))[0]
    model.train()
    path = trainer.out / "samples.txt"
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(f"--- step {trainer.step}\n{text}\n\n")
    except OSError as error:
        raise CannotWrite(cannot_write(path, error)) from error
    return text
