"""The loss curves of runs as one picture."""

import json
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from timemix.errors import UserError
from timemix.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

XAxis = Literal["tokens", "steps", "seconds"]

# Key in metrics.jsonl, and label.
_X_AXES = {
    "tokens": ("tokens", "training tokens"),
    "steps": ("step", "training steps"),
    "seconds": ("seconds", "training time (seconds)"),
}
# Okabe and Ito (2008), told apart by the colour-blind; without its yellow, too pale on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
# Points drawn per kind of line, over all runs: dense enough to show the noise, few enough for a small SVG.
_MAX_POINTS = 1200
_MAX_MARKERS = 16
_DPI = 150
_PALETTE = 128


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl, oldest first: step, tokens, seconds, loss and valid_loss (nats per
    token), and whatever else was logged. A last line cut short by a kill is skipped.

    Raises UserError where the folder or the file is missing, or another line is not a JSON object.
    """
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}; name one that `timemix train --out` made")
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}, is {run} a run folder? ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UserError(f"line {number} of {path} is not a JSON object; remove or repair it")
    return rows


def plot_loss(
    runs: Sequence[Path],
    out: Path,
    *,
    x: XAxis = "tokens",
    smoothing: float = 0.03,
    title: str | None = None,
) -> None:
    """Draws training and validation loss of run folders, in nats per token, to `out` (.png or .svg).

    x: tokens, steps, or seconds of training. smoothing: standard deviation of the Gaussian that smooths the
    training loss, as a share of its logged lines; 0 = none. The vertical axis fits what comes after the first
    tenth of each run, for the first losses dwarf the rest. Last validation losses stand at the right edge.

    Raises UserError for an unknown x or suffix, a smoothing outside 0 to 1, no run, a run without losses,
    whatever `read_metrics` raises it for, and where `out` cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
    from PIL import Image

    suffix = out.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise UserError(f"cannot tell the picture's format from {out}; end its name in .png or .svg")
    if x not in _X_AXES:
        raise UserError(f"x must be one of {', '.join(_X_AXES)}, not {x!r}")
    if not 0 <= smoothing <= 1:
        raise UserError(f"smoothing must be from 0 to 1, not {smoothing}")
    if not runs:
        raise UserError("there is no run to plot; name one or more run folders")

    key, x_label = _X_AXES[x]
    curves = [_curve(run, key, smoothing) for run in runs]
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    figure = Figure(figsize=(7.2, 4.3), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, 1.01 * max(curve.last_x for curve in curves) or 1)
    axes.set_ylim(_loss_limits(curves))
    _draw(axes, names, curves)
    _label_last_losses(axes, curves)
    axes.set_xlabel(x_label)
    axes.set_ylabel("loss (nats per token)")
    if x != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", parse_math=False)

    with atomic_file(out) as temporary:
        figure.savefig(temporary, format=suffix[1:])
        if suffix == ".png":
            # A palette instead of 32 bits per pixel makes the file a third as large.
            with Image.open(temporary) as image:
                image.convert("RGB").quantize(_PALETTE).save(temporary, dpi=(_DPI, _DPI))


class _Curve(NamedTuple):
    """One run; each array is (2, points): x and loss, points may be 0."""

    train: np.ndarray
    smoothed: np.ndarray
    valid: np.ndarray

    @property
    def last_x(self) -> float:
        return max(points[0, -1] for points in (self.train, self.valid) if points.size)


def _curve(run: Path, key: str, smoothing: float) -> _Curve:
    rows = read_metrics(run)
    train, valid = _points(rows, key, "loss"), _points(rows, key, "valid_loss")
    if not train.size and not valid.size:
        raise UserError(f"{run / 'metrics.jsonl'} holds no losses yet; plot again when the run has gone on")
    smoothed = np.stack([train[0], _gaussian(train[1], smoothing * train.shape[1])])
    return _Curve(train, smoothed, valid)


def _points(rows: list[dict[str, Any]], key: str, loss: str) -> np.ndarray:
    """(2, points): x and loss of the rows that hold both as finite numbers."""
    pairs = [(0 if row.get("step") == 0 else row.get(key), row.get(loss)) for row in rows]
    finite = [pair for pair in pairs if all(isinstance(n, int | float) and math.isfinite(n) for n in pair)]
    return np.array(finite, dtype=float).reshape(-1, 2).T


def _gaussian(values: np.ndarray, deviation: float) -> np.ndarray:
    """Mean of each value and its neighbours under a Gaussian; `deviation` counts values."""
    if deviation == 0:
        return values
    reach = math.ceil(3 * deviation)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    middle = slice(reach, reach + len(values))
    # Near the ends only a part of the weights falls on values.
    return np.convolve(values, weights)[middle] / np.convolve(np.ones_like(values), weights)[middle]


def _loss_limits(curves: list[_Curve]) -> tuple[float, float]:
    shown: list[float] = []
    for curve in curves:
        train, smoothed, valid = (
            points[1, points[0] >= 0.1 * curve.last_x] for points in (curve.train, curve.smoothed, curve.valid)
        )
        shown += [*smoothed, *valid]
        if train.size:
            shown += np.quantile(train, (0.002, 0.998)).tolist()
    margin = 0.06 * (max(shown) - min(shown)) or 0.1
    return min(shown) - margin, max(shown) + margin


def _draw(axes: "Axes", names: list[str], curves: list[_Curve]) -> None:
    """Lines and legend: one run by two colors, several by a color and a marker each."""
    from matplotlib.lines import Line2D

    solid: dict[str, Any] = {"linewidth": 1.3}
    dashed = solid | {"linestyle": "--", "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.7}
    alone = len(curves) == 1
    most = _MAX_POINTS // len(curves)
    handles, labels = [], []
    for i, (name, curve) in enumerate(zip(names, curves, strict=True)):
        marker = _MARKERS[i % len(_MARKERS)]
        color = _COLORS[i % len(_COLORS)]
        valid_color = _COLORS[1] if alone else color
        axes.plot(*_thinned(curve.train, most), color=color, alpha=0.25, linewidth=0.6)
        axes.plot(*_thinned(curve.smoothed, most), color=color, **solid)
        valid = _thinned(curve.valid, most)
        every = math.ceil(valid.shape[1] / _MAX_MARKERS) or 1
        axes.plot(*valid, color=valid_color, marker=marker, markevery=every, **dashed)
        if not alone:
            handles.append(Line2D([], [], color=color, marker=marker, **solid))
            labels.append(name)
    train_color, valid_color = _COLORS[:2] if alone else ("0.4", "0.4")
    handles.append(Line2D([], [], color=train_color, **solid))
    handles.append(Line2D([], [], color=valid_color, marker=_MARKERS[0], **dashed))
    legend = axes.legend(handles, [*labels, "training", "validation"], loc="upper right", edgecolor="none")
    for text in legend.get_texts():
        text.set_parse_math(False)


def _thinned(points: np.ndarray, most: int) -> np.ndarray:
    """Every n-th point from the newest backwards, so that the newest stays."""
    return points[:, :: -(math.ceil(points.shape[1] / most) or 1)]


def _label_last_losses(axes: "Axes", curves: list[_Curve]) -> None:
    """Last validation losses beside the right edge, moved up where they would overlap."""
    low, high = axes.get_ylim()
    line = 0.045 * (high - low)
    ends = [(curve.valid[1, -1], color) for curve, color in zip(curves, cycle(_COLORS)) if curve.valid.size]
    y = -math.inf
    for loss, color in sorted(ends):
        y = max(loss, y + line)
        color = _COLORS[1] if len(curves) == 1 else color
        axes.text(1.01, y, f"{loss:.3f}", color=color, va="center", fontsize=9, transform=axes.get_yaxis_transform())
