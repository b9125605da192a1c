"""The verb demo: train on the built-in text, sample, plot."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from timemix.cli.options import parse
from timemix.cli.training import run_trainer, write_sample
from timemix.config.presets import preset

if TYPE_CHECKING:
    from timemix.training.trainer import TrainingProgress


DEMO_PROMPT = "The "
TOP_A = 0.02


@dataclass(frozen=True)
class DemoArguments:
    """Train a small model on the built-in text for two to six minutes, with samples and a loss curve."""

    out: Path = Path("runs/demo")
    """New folder for the run."""
    steps: int | None = None
    """Optimizer steps. Default: those of the preset."""


def demo(arguments: list[str]) -> int:
    parsed = parse(DemoArguments, arguments, "demo")
    from timemix.generation.sampler import Sampler
    from timemix.training.start import new_run

    sampler = Sampler(top_a=TOP_A)
    config = preset("demo")
    if parsed.steps is not None:
        config = replace(config, train=replace(config.train, steps=parsed.steps))
    out = parsed.out
    print("Training a small RWKV on the Python language reference, two to six minutes on two cores.")
    trainer = new_run(config, out)
    half = max(1, trainer.config.train.steps // 2)

    def during(progress: "TrainingProgress") -> None:
        if progress.step == half:
            print(f"\nHalf way, it writes:\n\n{write_sample(trainer, DEMO_PROMPT, sampler=sampler)}\n")

    print(f"Before training it writes:\n\n{write_sample(trainer, DEMO_PROMPT, sampler=sampler)}\n")
    status = run_trainer(trainer, during)
    if status == 0:
        print(f"\nNow it writes:\n\n{write_sample(trainer, DEMO_PROMPT, sampler=sampler)}\n")
        print(
            f"The run is in {out}; its loss curve is {out / 'loss.png'}. Next:\n\n"
            f"  timemix sample {out} --prompt 'The ' --tokens 500 --top-a {TOP_A}\n"
            f"  timemix eval {out}\n"
            f"  timemix train cpu-small --data YOUR.txt --out runs/mine"
        )
    return status
