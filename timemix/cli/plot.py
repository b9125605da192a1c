"""The command-line verb plot: draw the loss curves of runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from timemix.cli.options import parse
from timemix.errors import InvalidValue


@dataclass(frozen=True)
class PlotArguments:
    """Draw the loss curves of runs.

    Examples:
        timemix plot runs/mine
        timemix plot runs/mine runs/next --out loss.png --x seconds
        timemix plot runs/mine --follow
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Run folders, one or more."""
    out: Path | None = None
    """PNG or SVG file. Default: loss.png in the first run."""
    x: Literal["tokens", "steps", "seconds"] = "tokens"
    """Horizontal axis."""
    smoothing: float = 0.03
    """Width of the Gaussian that smooths the training loss, as a share of its points, from 0 to 1 (0: no smoothing)."""
    follow: bool = False
    """Draw the picture again whenever new losses arrive, until the training of all runs has ended. Ctrl-C ends it."""
    title: str | None = None
    """Title of the picture. Default: no title."""


def plot(arguments: list[str]) -> int:
    parsed = parse(PlotArguments, arguments, "plot")
    from timemix.reporting.plots import plot_loss

    if not parsed.runs:
        raise InvalidValue("missing RUN (run folders, one or more); see timemix plot --help")
    out = parsed.out or parsed.runs[0] / "loss.png"

    def draw() -> None:
        plot_loss(list(parsed.runs), out, x=parsed.x, smoothing=parsed.smoothing, title=parsed.title)

    if parsed.follow:
        from timemix.cli.follow import follow

        follow(parsed.runs, out, draw)
    else:
        draw()
    print(out)
    return 0
