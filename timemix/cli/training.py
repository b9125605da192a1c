"""Code that `timemix train` and `timemix demo` share: introduction, progress, loss curve, and error messages."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from shlex import quote
from typing import TYPE_CHECKING

from timemix.cli.terminal import own_command
from timemix.config.presets import DEFAULT_PRESET, preset
from timemix.errors import CannotWrite, HookFailed, NotFinite, ProcessLost

if TYPE_CHECKING:
    from timemix.training.hooks import Hook
    from timemix.training.progress import TrainingProgress, Watch
    from timemix.training.trainer import Trainer


def run_trainer(
    trainer: "Trainer",
    during: "Watch | None" = None,
    hooks: "Sequence[Hook]" = (),
    *,
    quiet: bool = False,
    samples_at_end: bool = False,
) -> int:
    """Train with progress on stderr, then draw the loss curve; return the exit status."""
    from timemix.cli.watch import watching
    from timemix.errors import Interrupted
    from timemix.reporting.plots import plot_loss

    speaks = trainer.world.first and not quiet
    if speaks:
        _introduce(trainer)
    try:
        with (
            watching(trainer.step, trainer.config.train.steps, quiet=not speaks) as watch,
            resume_command_added(trainer),
        ):

            def both(progress: "TrainingProgress") -> None:
                watch(progress)
                if during is not None:
                    during(progress)

            trainer.run(both, hooks, samples_at_end=samples_at_end)
    except Interrupted as stop:
        if trainer.world.first:
            print(
                f"timemix: {stop}; resume with: {own_command()} train --resume {quote(str(trainer.out))}",
                file=sys.stderr,
            )
        return 128 + stop.number
    if trainer.world.first:
        plot_loss([trainer.out], trainer.out / "loss.png")
    if speaks:
        _conclude(trainer)
    return 0


@contextmanager
def resume_command_added(trainer: "Trainer") -> "Iterator[None]":
    """Add the command that resumes a run to the message of an error that ends the run."""
    resume = f"{own_command()} train --resume {quote(str(trainer.out))}"
    try:
        yield
    except (CannotWrite, ProcessLost, HookFailed) as error:
        if isinstance(error, HookFailed) and trainer.is_complete:
            raise
        raise type(error)(f"{error}; resume with: {resume}") from error
    except NotFinite as error:
        # A tenth of a rate far above all useful rates would diverge too.
        lr = min(trainer.config.train.lr / 10, preset(DEFAULT_PRESET).train.lr)
        raise NotFinite(f"{error}: {_way_past_divergence(trainer)} --train.lr {lr:.2g}") from error


def _way_past_divergence(trainer: "Trainer") -> str:
    """Return the command that continues after a loss that is not finite; the caller adds a learning rate."""
    from timemix.runs.folder import checkpoint_name, checkpoints

    kept = checkpoints(trainer.out)
    if not kept or kept[-1].name != checkpoint_name(trainer.step):
        return f"{own_command()} train --resume {quote(str(trainer.out))}"
    # The loss right after a checkpoint does not depend on the learning rate: restart one checkpoint earlier.
    start = f"--from {quote(str(kept[-2]))}" if kept[:-1] else f"--config {quote(str(trainer.out / 'config.toml'))}"
    return f"{own_command()} train {start} --out NEXT"


def _conclude(trainer: "Trainer") -> None:
    validation = trainer.validation
    if validation.stopped_early:
        print(stopped_early(trainer), file=sys.stderr)
    if validation.loss is not None:
        bits = "" if validation.bits_per_byte is None else f", {validation.bits_per_byte:.4f} bits per byte,"
        print(
            f"validation loss {validation.loss:.4f} nats per token (best {validation.best:.4f}){bits}"
            f" after {trainer.seconds:.0f} s of training steps",
            file=sys.stderr,
        )


def stopped_early(trainer: "Trainer") -> str:
    """Return the message about a run that early stopping has ended."""
    train = trainer.config.train
    return (
        f"{trainer.out} stopped early at step {trainer.step} of {train.steps}, after"
        f" {trainer.validation.without_gain} validations without a lower loss; continue with:"
        f" {own_command()} train --resume {quote(str(trainer.out))} --train.patience 0"
    )


def _introduce(trainer: "Trainer") -> None:
    config, world = trainer.config, trainer.world
    held_out = f" ({words})" if (words := trainer.corpus.info.held_out) else ""
    resets = not config.data.cross_documents
    forms = trainer.model.block.forms(config.model, trainer.precision, trainer.device, resets)
    processes = "" if world.size == 1 else f", {world.size} processes ({config.train.strategy})"
    print(
        f"{config.model.arch}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters,"
        f" vocabulary {config.model.vocab_size};"
        f" {len(trainer.corpus.train):,} training tokens, {len(trainer.corpus.valid):,} held out{held_out}\n"
        f"{trainer.device} ({trainer.device_reason}), {trainer.precision} ({trainer.precision_reason}){processes}"
        + "".join(f", {op} {form}" for op, form in forms.items())
        + f", {'compiled' if trainer.batch_loss.compiled else 'not compiled'} ({trainer.batch_loss.compile_reason})",
        file=sys.stderr,
    )
