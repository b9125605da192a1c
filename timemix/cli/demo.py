"""The command-line verb demo: train a small model on the built-in text, generate samples and plot the loss."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from timemix.cli.options import parse
from timemix.cli.terminal import escaped, lasting_output, own_command
from timemix.cli.training import run_trainer
from timemix.config.presets import preset
from timemix.errors import InvalidValue
from timemix.storage.settings import check_range

if TYPE_CHECKING:
    from timemix.training.progress import TrainingProgress


DEMO_PROMPT = "The "
SECONDS = 100.0
TOP_A = 0.02


@dataclass(frozen=True)
class DemoArguments:
    """Train a small model on the built-in text for about two minutes, with samples and a loss curve.

    Examples:
        timemix demo
        timemix demo --seconds 30 --out runs/short
    """

    out: Path = Path("runs/demo")
    """New folder for the run."""
    seconds: float | None = None
    """Length of the training in seconds, above 0, with validations and checkpoints.
    Default: 100, unless --steps is given."""
    steps: int | None = None
    """Length of the training in optimizer steps, at least 1. Default: the length from --seconds."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_range("--steps", self.steps, 1)
            if self.seconds is not None:
                raise InvalidValue(
                    f"--steps {self.steps} and --seconds {self.seconds:g} exclude one another; give only one"
                )


@lasting_output()
def demo(arguments: list[str]) -> int:
    parsed = parse(DemoArguments, arguments, "demo")
    from timemix.generation.sampler import Sampler
    from timemix.runtime.machine import keep_freed_memory
    from timemix.training.start import new_run

    keep_freed_memory()
    if parsed.steps is None:
        seconds = SECONDS if parsed.seconds is None else parsed.seconds
        train = replace(preset("demo").train, seconds=seconds)
        length = f"{seconds:g} s, validation included"
    else:
        train = replace(preset("demo").train, steps=parsed.steps)
        length = f"{parsed.steps} steps"
    out = parsed.out
    print(f"Training a small RWKV on the Python language reference, for {length}.")
    trainer = new_run(replace(preset("demo"), train=train), out)
    half = max(1, trainer.config.train.steps // 2)

    def sample() -> str:
        (made,) = trainer.sample([DEMO_PROMPT], Sampler(top_a=TOP_A))
        return escaped(made.text)

    def during(progress: "TrainingProgress") -> None:
        if progress.step == half:
            print(f"\nSample in the middle of training:\n\n{sample()}\n")

    print(f"Sample before training:\n\n{sample()}\n")
    status = run_trainer(trainer, during)
    if status == 0:
        print(f"\nSample after training:\n\n{sample()}\n")
        command, run = own_command(), shlex.quote(str(out))
        print(
            f"The run is in {out}; its loss curve is {out / 'loss.png'}. Next:\n\n"
            f"  {command} sample {run} --prompt 'The ' --tokens 500 --top-a {TOP_A}\n"
            f"  {command} eval {run}\n"
            f"  {command} train cpu-small --data YOUR.txt --out runs/mine"
        )
    return status
