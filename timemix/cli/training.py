"""What train and demo share: introduction, progress, loss curve and samples of a run."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from timemix.cli.options import default_prompt
from timemix.errors import CannotWrite, ProcessLost
from timemix.storage.files import cannot_write

if TYPE_CHECKING:
    from timemix.generation.sampler import Sampler
    from timemix.training.hooks import Hook
    from timemix.training.trainer import Trainer, TrainingProgress, Watch


def run_trainer(trainer: "Trainer", during: "Watch | None" = None, hooks: "Sequence[Hook]" = ()) -> int:
    """Train with progress on stderr, then draw the loss curve; return the exit status."""
    from timemix.cli.watch import watching
    from timemix.errors import Interrupted
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
            print(f"timemix: {stop}; resume with: timemix train --resume {trainer.out}", file=sys.stderr)
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
    """Watch of a process that prints nothing."""


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


def write_sample(
    trainer: "Trainer", prompt: str | None = None, tokens: int = 300, *, sampler: "Sampler | None" = None
) -> str:
    """Append a sample of the model to samples.txt and return it; the prompt is a newline if none is given."""
    from timemix.generation.generate import generate
    from timemix.runs.load import Loaded, load

    tokenizer = trainer.corpus.tokenizer
    if prompt is None:
        prompt = default_prompt(tokenizer)
    # A model that is sharded over processes cannot generate in one of them.
    alone = trainer.world.size == 1
    model = trainer.model if alone else load(trainer.out, checkpoint="newest").model
    loaded = Loaded(model, tokenizer, trainer.config, trainer.out)
    text = prompt + generate(loaded, prompt, tokens=tokens, sampler=sampler)[0]
    path = trainer.out / "samples.txt"
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(f"--- step {trainer.step}\n{text}\n\n")
    except OSError as error:
        raise CannotWrite(cannot_write(path, error)) from error
    return text
