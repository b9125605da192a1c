"""The verb plot: loss curves of runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from timemix.cli.options import parse
from timemix.errors import InvalidValue


@dataclass(frozen=True)
class PlotArguments:
    """Draw the loss curves of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path | None = None
    """PNG or SVG file. Default: loss.png in the first run."""
    x: Literal["tokens", "steps", "seconds"] = "tokens"
    """Horizontal axis."""
    smoothing: float = 0.03
    """Width of the Gaussian over the training loss, as a share of its points; 0: no smoothing."""
    title: str | None = None
    """Title of the picture."""


def plot(arguments: list[str]) -> int:
    parsed = parse(PlotArguments, arguments, "plot")
    from timemix.reporting.plots import plot_loss

    if not parsed.runs:
        raise InvalidValue("name at least one run folder: timemix plot runs/NAME")
    out = parsed.out or parsed.runs[0] / "loss.png"
    plot_loss(list(parsed.runs), out, x=parsed.x, smoothing=parsed.smoothing, title=parsed.title)
    print(out)
    return 0
