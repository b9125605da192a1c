"""Pictures of loss curves."""

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from timemix.errors import InvalidValue, MissingFile
from timemix.runs.metrics import read_metrics
from timemix.storage.files import atomic_file
from timemix.storage.json_files import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("timemix")

XAxis = Literal["tokens", "steps", "seconds"]

# For each x axis: the key in metrics.jsonl, and the label.
_X_AXES = {
    "tokens": ("tokens", "training tokens"),
    "steps": ("step", "training steps"),
    "seconds": ("seconds", "training time (seconds)"),
}
# The colour-blind-safe palette of Okabe and Ito (2008), without its yellow, which is too pale on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
# Largest number of points of each type of line in all runs: enough points for the noise, and few for a small SVG.
_MAX_POINTS = 1200
_MAX_MARKERS = 16
_DPI = 150
_PALETTE = 128


# Numbers above this limit are not drawn, because computations with such numbers would overflow.
_LARGEST_DRAWN = 1e30


def plot_loss(
    runs: Sequence[Path],
    out: Path,
    *,
    x: XAxis = "tokens",
    smoothing: float = 0.03,
    title: str | None = None,
) -> None:
    """Draw training and validation loss of runs, in nats per token.

    The vertical axis fits the losses after the first tenth of each run: the first losses are much larger. The last
    validation losses are printed at the right edge.

    Args:
        runs: Run folders.
        out: Picture to write, .png or .svg.
        x: Horizontal axis: "tokens", "steps" or "seconds" of training.
        smoothing: Standard deviation of the Gaussian that smooths the training loss, as a share of the logged lines,
            from 0 (no smoothing) to 1.
        title: Title of the picture.

    Raises:
        InvalidValue: `runs` is empty, or `x`, `smoothing` or the suffix of `out` is not supported.
        MissingFile: A run does not exist or has no losses yet.
        DamagedFile: A metrics.jsonl is damaged.
        CannotWrite: `out` cannot be written.
    """
    _check(out, x, smoothing)
    if not runs:
        raise InvalidValue("there is no run to plot; name one or more run folders")

    key, _ = _X_AXES[x]
    curves = [_curve(run, key, smoothing) for run in runs]
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    figure, axes = _loss_axes(x, max(curve.last_x for curve in curves), _loss_limits(curves), title)
    _draw(axes, names, curves)
    ends = [curve.valid[1, -1] if curve.valid.size else None for curve in curves]
    _label_ends(axes, ends, [_COLORS[1]] if len(curves) == 1 else cycle(_COLORS))
    save_picture(figure, out)


def plot_bands(
    groups: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    colors: dict[str, str] | None = None,
    x: XAxis = "tokens",
    smoothing: float = 0.03,
    title: str | None = None,
) -> None:
    """Draw the training loss of groups of runs, such as the seeds of each variant, in nats per token.

    A line shows the mean of the smoothed losses of a group. A band shows one standard deviation on each side of the
    line. The mean of the last held-out losses is printed at the right edge.

    Args:
        groups: Run folders of each group, by name. The runs of a group must have logged the same steps.
        out: Picture to write, .png or .svg.
        colors: Colors of groups, by name. Default: a colour-blind-safe palette.
        x: Horizontal axis: "tokens", "steps" or "seconds" of training.
        smoothing: Standard deviation of the Gaussian that smooths the training loss, as a share of the logged lines,
            from 0 (no smoothing) to 1.
        title: Title of the picture.

    Raises:
        InvalidValue: There is no group, a group is empty, or `x`, `smoothing` or the suffix of `out` is not supported.
        MissingFile: A run does not exist or has no losses yet.
        DamagedFile: A metrics.jsonl is damaged.
        CannotWrite: `out` cannot be written.
    """
    _check(out, x, smoothing)
    if not groups or not all(groups.values()):
        raise InvalidValue("there is no run to plot; name one or more run folders")
    bands = {name: mean_over_runs(runs, smoothing) for name, runs in groups.items()}
    ends = {name: _last_losses(runs) for name, runs in groups.items()}
    last_x = max(positions[x][-1] for positions, _, _ in bands.values())
    shown = [mean[positions[x] >= 0.1 * positions[x][-1]] for positions, mean, _ in bands.values()]
    figure, axes = _loss_axes(x, last_x, _limits([*np.concatenate(shown), *filter(None, ends.values())]), title)
    spare = spare_colors((colors or {}).values())
    chosen = [(colors or {}).get(name) or next(spare) for name in groups]
    for i, (name, (positions, mean, deviation)) in enumerate(bands.items()):
        axes.fill_between(positions[x], mean - deviation, mean + deviation, color=chosen[i], alpha=0.2, linewidth=0)
        every = len(mean) // 8 + 1
        marks: dict[str, Any] = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 5, "markeredgecolor": "white"}
        # Each curve starts its markers at another point, so that the markers of close curves do not overlap.
        start = (i + 1) * every // (len(bands) + 1)
        axes.plot(positions[x], mean, color=chosen[i], linewidth=1.3, markevery=(start, every), label=name, **marks)
    axes.set_ylabel("training loss (nats per token)")
    _label_ends(axes, list(ends.values()), chosen)
    if any(loss is not None for loss in ends.values()):
        axes.text(1.01, 1.01, "held-out\nloss", color="0.3", va="bottom", fontsize=9, transform=axes.transAxes)
    _legend(axes, loc="best")
    save_picture(figure, out)


def plot_positions(losses: Mapping[str, Sequence[float]], out: Path, *, colors: Mapping[str, str]) -> None:
    """Draw the loss of each variant minus the loss of the first variant, at each position of the window.

    Differences are smoothed with a Gaussian of standard deviation 1.5 positions.

    Args:
        losses: Losses in nats per token at each position, by name of the variant.
        out: Picture to write, .png or .svg.
        colors: Colors of all variants, by name.

    Raises:
        InvalidValue: The suffix of `out` is not supported.
        CannotWrite: `out` cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    first, *others = losses
    axes.axhline(0, color=colors[first], linewidth=1.3, label=first)
    for i, name in enumerate(others, 1):
        added = _gaussian(np.subtract(losses[name], losses[first]), 1.5)
        style: dict[str, Any] = {"marker": _MARKERS[i % len(_MARKERS)], "markevery": len(added) // 8 + 1}
        axes.plot(added, color=colors[name], linewidth=1.3, markersize=5, markeredgecolor="white", label=name, **style)
    axes.set_xlabel("position in the window")
    axes.set_ylabel(f"loss minus loss of {first}\n(nats per token)", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.7)
    # Curves may be anywhere in the plot, so the legend is beside it.
    _legend(axes, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    save_picture(figure, out)


def mean_over_runs(
    runs: Sequence[Path], smoothing: float = 0.03
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Average the smoothed training losses of runs that logged the same steps, up to the end of the shortest run.

    Args:
        runs: Run folders.
        smoothing: Standard deviation of the Gaussian that smooths each loss, as a share of the logged lines.

    Returns:
        Horizontal positions by name ("tokens", "steps", and "seconds" as a mean over runs), mean loss in nats per
        token, and standard deviation of the loss, each (points,).

    Raises:
        MissingFile: A run does not exist or has no losses yet.
        DamagedFile: A metrics.jsonl is damaged.
    """
    curves = {name: [_curve(run, key, smoothing).smoothed for run in runs] for name, (key, _) in _X_AXES.items()}
    points = min(c.shape[1] for c in curves["tokens"])
    if points == 0:
        raise MissingFile(
            f"{runs[0] / 'metrics.jsonl'} has no training losses yet; plot again when the run has trained further"
        )
    x = {name: np.mean([c[0, :points] for c in each], axis=0) for name, each in curves.items()}
    losses = np.stack([c[1, :points] for c in curves["tokens"]])
    deviation = losses.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(points)
    return x, losses.mean(axis=0), deviation


def spare_colors(taken: Iterable[str]) -> Iterator[str]:
    """Return an endless sequence of colors from a colour-blind-safe palette, without the colors in `taken`."""
    used = set(taken)
    return cycle([color for color in _COLORS if color not in used] or _COLORS)


def _last_losses(runs: Sequence[Path]) -> float | None:
    """Return the mean of the last validation losses of runs, or None if a run has no validation loss."""
    last = [_curve(run, "tokens", 0).valid for run in runs]
    return float(np.mean([v[1, -1] for v in last])) if all(v.size for v in last) else None


def _check(out: Path, x: str, smoothing: float) -> None:
    check_picture_name(out)
    if x not in _X_AXES:
        raise InvalidValue(f"x is {x!r}; it must be one of {', '.join(_X_AXES)}")
    if not 0 <= smoothing <= 1:
        raise InvalidValue(f"smoothing is {smoothing}; it must be from 0 to 1")


def check_picture_name(out: Path) -> None:
    """Raise InvalidValue for a picture whose suffix is neither .png nor .svg."""
    if out.suffix.lower() not in (".png", ".svg"):
        raise InvalidValue(f"the picture {out} has an unsupported suffix {out.suffix!r}; use .png or .svg")


def _loss_axes(x: XAxis, last_x: float, limits: tuple[float, float], title: str | None) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7.2, 4.3), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, 1.01 * last_x or 1)
    axes.set_ylim(limits)
    axes.set_xlabel(_X_AXES[x][1])
    axes.set_ylabel("loss (nats per token)")
    if x != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, loc="left", parse_math=False)
    return figure, axes


def save_picture(figure: "Figure", out: Path) -> None:
    """Write a figure as .svg, or as .png with a palette of few colors, so that the file stays small.

    Args:
        figure: The figure.
        out: Picture to write, .png or .svg.

    Raises:
        InvalidValue: The suffix of `out` is not supported.
        CannotWrite: `out` cannot be written.
    """
    from PIL import Image

    check_picture_name(out)
    suffix = out.suffix.lower()
    with atomic_file(out) as temporary:
        with _glyphs_explained(out):
            figure.savefig(temporary, format=suffix[1:])
        if suffix == ".png":
            # A palette instead of 32 bits per pixel reduces the file to a third of its size.
            with Image.open(temporary) as image:
                image.convert("RGB").quantize(_PALETTE).save(temporary, dpi=(_DPI, _DPI))


@contextlib.contextmanager
def _glyphs_explained(out: Path) -> Iterator[None]:
    """Replace the warnings of matplotlib about characters outside its font by one sentence with all characters."""
    with warnings.catch_warnings(record=True) as found:
        warnings.filterwarnings("always", r"Glyph \d+")
        yield
    codes = [re.match(r"Glyph (\d+) ", str(each.message)) for each in found]
    if missing := sorted({chr(int(code[1])) for code in codes if code}):
        logger.warning("the font of %s lacks characters, which appear as boxes: %s", out, " ".join(missing))
    for each, code in zip(found, codes, strict=True):
        if not code:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


class _Curve(NamedTuple):
    """Losses of a run. Each array (2, points) holds the horizontal positions and the losses; `points` may be 0."""

    train: np.ndarray
    smoothed: np.ndarray
    valid: np.ndarray
    valid_bits_per_byte: float | None
    """Last validation loss in bits per byte of the text, None if unknown."""

    @property
    def last_x(self) -> float:
        result: float = max(points[0, -1] for points in (self.train, self.valid) if points.size)
        return result


def _curve(run: Path, key: str, smoothing: float) -> _Curve:
    rows = read_metrics(run)
    train, valid = _points(rows, key, "loss"), _points(rows, key, "valid_loss")
    if not train.size and not valid.size:
        raise MissingFile(f"{run / 'metrics.jsonl'} has no losses yet; plot again when the run has trained further")
    smoothed = np.stack([train[0], _gaussian(train[1], smoothing * train.shape[1])])
    bits = _points(rows, key, "valid_bits_per_byte")
    return _Curve(train, smoothed, valid, float(bits[1, -1]) if bits.size else None)


def _points(rows: list[dict[str, Any]], key: str, loss: str) -> np.ndarray:
    """Return x and loss (2, points) of the rows in which both numbers are finite and x >= 0."""
    pairs: list[tuple[Any, Any]] = [(0 if row.get("step") == 0 else row.get(key), row.get(loss)) for row in rows]
    drawn = [pair for pair in pairs if all(is_number(n) and abs(n) <= _LARGEST_DRAWN for n in pair) and pair[0] >= 0]
    return np.array(drawn, dtype=float).reshape(-1, 2).T


def _gaussian(values: np.ndarray, deviation: float) -> np.ndarray:
    """Smooth values with a Gaussian; the first value stays unchanged.

    A loss falls fastest at its beginning, where a mean over later values alone would be far too low. The values are
    therefore extended to the left by a point reflection about the first value: 2 values[0] - values[i].

    Args:
        values: Values (N,).
        deviation: Standard deviation of the Gaussian, as a number of values.
    """
    if deviation == 0 or not len(values):
        return values
    reach = math.ceil(3 * deviation)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    left = min(reach, len(values) - 1)
    # (N,) -> (left + N,)
    continued = np.concatenate([2 * values[0] - values[left:0:-1], values])
    own = slice(reach + left, reach + left + len(values))
    # Near the ends, only some weights are multiplied by values: divide by the sum of these weights.
    result: np.ndarray = _convolved(continued, weights)[own] / _convolved(np.ones_like(continued), weights)[own]
    return result


def _convolved(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return np.convolve of two arrays, computed in O(n log n) by FFT if the first array is long."""
    if len(values) < 20_000:
        return np.convolve(values, weights)
    size = len(values) + len(weights) - 1
    return np.fft.irfft(np.fft.rfft(values, size) * np.fft.rfft(weights, size), size)


def _loss_limits(curves: list[_Curve]) -> tuple[float, float]:
    shown: list[float] = []
    for curve in curves:
        train, smoothed, valid = (
            points[1, points[0] >= 0.1 * curve.last_x] for points in (curve.train, curve.smoothed, curve.valid)
        )
        # The last validation loss is printed beside the axes, also if it is from step 0.
        shown += [*smoothed, *valid, *curve.valid[1, -1:]]
        if train.size:
            shown += np.quantile(train, (0.002, 0.998)).tolist()
    return _limits(shown)


def _limits(shown: Sequence[float]) -> tuple[float, float]:
    margin = 0.06 * (max(shown) - min(shown)) or 0.1 * max(1, abs(max(shown)))
    return min(shown) - margin, max(shown) + margin


def _draw(axes: "Axes", names: list[str], curves: list[_Curve]) -> None:
    """Draw lines and legend: two colors for one run, or a color and a marker for each of several runs."""
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
    bits = curves[0].valid_bits_per_byte if alone else None
    valid_label = "validation" if bits is None else f"validation (at the end {bits:.3f} bits per byte)"
    _legend(axes, handles, [*labels, "training", valid_label], loc="best")


def _legend(axes: "Axes", *entries: Any, **options: Any) -> None:
    """Draw a legend without a frame. Names in a legend are plain text, not mathematics: a run may be named a$b$c."""
    for text in axes.legend(*entries, edgecolor="none", **options).get_texts():
        text.set_parse_math(False)


def _thinned(points: np.ndarray, most: int) -> np.ndarray:
    """Return at most about `most` points: every n-th point, counted back from the newest point."""
    return points[:, :: -(math.ceil(points.shape[1] / most) or 1)]


def _label_ends(axes: "Axes", losses: list[float | None], colors: Iterable[str]) -> None:
    """Print the last validation losses at the right edge. Move numbers up if numbers would overlap."""
    low, high = axes.get_ylim()
    line = 0.045 * (high - low)
    y = -math.inf
    for loss, color in sorted((loss, color) for loss, color in zip(losses, colors, strict=False) if loss is not None):
        y = max(loss, y + line)
        axes.text(1.01, y, f"{loss:.3f}", color=color, va="center", fontsize=9, transform=axes.get_yaxis_transform())
