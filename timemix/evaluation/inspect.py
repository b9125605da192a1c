"""Inspection of a trained model: tables over positions, outputs of projections, use of token-shift, matrix states."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from timemix.data.batches import validation_windows
from timemix.data.shards import Tokens
from timemix.errors import InvalidValue
from timemix.evaluation.loss import loss_per_token
from timemix.evaluation.states import StateReport, draw_states, measure_states
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.ops.common import fused
from timemix.reporting.plots import save_picture, spare_colors
from timemix.runs.load import Loaded
from timemix.storage.json_files import OPTIONAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes


TABLES = ("f", "alpha", "beta", "gamma")
HALVES = ("mixer", "ffn")
# The projections that read the token-shifted input, with their letters in the papers.
PROJECTIONS = {"query": "Q", "receptance": "R", "key": "K", "value": "V"}
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Statistics of a projection on a text: its outputs, and its use of the shifted channels.

    Fields about shifted channels are None in a layer without shifted channels. Fields that end in `_at_start` describe
    the model before training, and are None if the run started from another model.
    """

    layer: int
    half: str
    """Sublayer: "mixer" (time-mix or attention) or "ffn" (channel-mix or feed-forward)."""
    projection: str
    """Name of the projection, such as "key"."""
    after_sigmoid: bool
    """Whether the model applies a sigmoid to the outputs. The statistics then describe the outputs of the sigmoid."""
    mean: float
    """Mean of the outputs."""
    deviation: float
    """Standard deviation of the outputs."""
    quantiles: list[float]
    """Quantiles of the outputs, at the levels of QUANTILES."""
    loss_without_shifted: float | None = field(default=None, metadata=OPTIONAL)
    """Loss in nats per token when only the shifted inputs of this projection are set to zero."""
    shifted: float | None
    """Mean of |weight| x standard deviation of the input channel, over all shifted channels and all outputs."""
    unshifted: float | None
    """Mean of |weight| x standard deviation of the input channel, over all unshifted channels and all outputs."""
    share: float | None
    """shifted / (shifted + unshifted), or None if shifted and unshifted are both zero."""
    shifted_at_start: float | None
    unshifted_at_start: float | None
    share_at_start: float | None


@dataclass(frozen=True)
class Inspection:
    """Tables and statistics of a model, measured on a text."""

    run: str
    """Checkpoint folder."""
    arch: str
    """Architecture."""
    tokens: int
    """Number of tokens of the text."""
    loss: float
    """Loss on the text in nats per token."""
    tables: list[dict[str, Any]]
    """Tables of each layer, as nested lists.

    The table f has shape (heads, ctx_len), indexed by lag, or is a free matrix of shape (heads, ctx_len, ctx_len). The
    tables alpha and beta have shape (heads, ctx_len), and gamma has shape (ctx_len,).
    """
    projections: list[Projection]
    """Statistics of every projection of every layer."""
    states: StateReport | None = field(metadata=OPTIONAL)
    """Measurements of the matrix states along the text, or None if the architecture has no matrix states."""
    not_shown: dict[str, str]
    """Parts of the report that the architecture of the model lacks, each with a reason."""


def inspect_run(loaded: Loaded, tokens: np.ndarray | Tokens) -> Inspection:
    """Measure tables and statistics of a trained model on a text.

    Args:
        loaded: The model.
        tokens: Token ids of the text, (tokens,), at least 2. The statistics of projections use the first 2048 tokens.

    Raises:
        InvalidValue: The text has fewer than two tokens.
    """
    if len(tokens) < 2:
        raise InvalidValue(f"the text has {len(tokens)} tokens, but at least 2 are needed; give a longer text")
    model = loaded.model
    start: LanguageModel | None = None
    # A run without a text holds imported weights, whose initial values are unknown.
    if loaded.config.start is None and loaded.config.data.source:
        # With the seed of the run, `start` gets the initial weights of the run.
        torch.manual_seed(loaded.config.train.seed)
        start = LanguageModel(loaded.config.model).to(model.device, model.head.weight.dtype).eval()
    tables = [{name: table.tolist() for name, table in block.tables().items()} for block in model.blocks]
    not_shown = {}
    if not any(tables):
        not_shown["tables"] = f"{model.config.arch} has no f, alpha, beta or gamma"
    if not any(block.shifted for block in model.blocks):
        not_shown["token-shift"] = f"no channel of this {model.config.arch} comes from earlier tokens alone"
    states = measure_states(model, loaded.tokenizer, tokens)
    if states is None:
        not_shown["states"] = f"timemix measures no states of {model.config.arch}"
    return Inspection(
        run=str(loaded.folder),
        arch=model.config.arch,
        tokens=len(tokens),
        loss=loss_per_token(model, tokens),
        tables=tables,
        projections=measure_projections(model, start, tokens),
        states=states,
        not_shown=not_shown,
    )


def measure_projections(
    model: LanguageModel, start: LanguageModel | None, tokens: np.ndarray | Tokens
) -> list[Projection]:
    """Measure every projection of every layer on a text.

    Args:
        model: The trained model.
        start: The model with its weights before training; None if these weights are unknown.
        tokens: Token ids of the text, (tokens,).
    """
    now = _observe(model, tokens)
    before = {} if start is None else _observe(start, tokens)
    rows = []
    for (layer, half, name), seen in now.items():
        block = model.blocks[layer]
        linear, shifted = block.projections()[half, name], block.shifted
        use, use_before, without = _use(linear, seen.deviation, shifted), None, None
        if use is not None:
            if start is not None:
                old = start.blocks[layer].projections()[half, name]
                use_before = _use(old, before[layer, half, name].deviation, shifted)
            with _without(linear, shifted):
                without = loss_per_token(model, tokens)
        after_sigmoid = (half, name) in block.gates
        mean, deviation, quantiles = seen.summary(after_sigmoid)
        rows.append(
            Projection(
                layer=layer,
                half=half,
                projection=name,
                after_sigmoid=after_sigmoid,
                mean=mean,
                deviation=deviation,
                quantiles=quantiles,
                loss_without_shifted=without,
                shifted=use and use[0],
                unshifted=use and use[1],
                share=_share(use),
                shifted_at_start=use_before and use_before[0],
                unshifted_at_start=use_before and use_before[1],
                share_at_start=_share(use_before),
            )
        )
    return rows


def _share(use: tuple[float, float] | None) -> float | None:
    return use[0] / sum(use) if use and sum(use) > 0 else None


class _Seen:
    """Inputs and outputs of a projection on a text."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each input channel, (C,)."""
        return torch.cat(self.inputs).std(0, correction=0)

    def summary(self, after_sigmoid: bool) -> tuple[float, float, list[float]]:
        """Return mean, standard deviation and quantiles of the outputs, or of the sigmoid of the outputs."""
        values = torch.cat(self.outputs)
        values = values.sigmoid() if after_sigmoid else values
        spread = np.quantile(values.numpy(), QUANTILES)
        return float(values.mean()), float(values.std()), spread.tolist()


@torch.no_grad()
def _observe(model: LanguageModel, tokens: np.ndarray | Tokens, most: int = 2048) -> dict[tuple[int, str, str], _Seen]:
    """Record inputs and outputs of every projection over at most `most` tokens, by layer, sublayer and name."""
    seen: dict[tuple[int, str, str], _Seen] = {}
    hooks = []
    for layer, block in enumerate(model.blocks):
        for (half, name), linear in block.projections().items():
            here = seen[layer, half, name] = _Seen()
            hooks.append(linear.register_forward_hook(_recorder(here)))
    try:
        ctx_len = model.config.ctx_len
        with fused.left_out():
            for inputs, _ in validation_windows(tokens[: most + 1], ctx_len, max(1, most // ctx_len)):
                model(torch.from_numpy(inputs).to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _recorder(seen: _Seen) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.inputs.append(inputs[0].flatten(0, 1).float().cpu())
        seen.outputs.append(output.flatten().float().cpu())

    return record


def _use(linear: nn.Linear, deviation: Tensor, shifted: int) -> tuple[float, float] | None:
    """Return two means of |weight| x deviation: over the shifted input channels, and over all other input channels.

    Return None if no channel is shifted.

    Args:
        linear: The projection.
        deviation: Standard deviation of each input channel, (C,).
        shifted: Number of shifted channels, which come first.
    """
    if shifted == 0:
        return None
    strength = linear.weight.detach().abs().float().cpu().mean(0) * deviation
    rest = strength[shifted:]
    return float(strength[:shifted].mean()), float(rest.mean()) if len(rest) else 0.0


@contextmanager
def _without(linear: nn.Linear, shifted: int) -> Iterator[None]:
    """Set the first `shifted` input channels of a linear layer to zero during the `with` block."""

    def zero(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].clone()
        x[..., :shifted] = 0
        return (x,)

    hook = linear.register_forward_pre_hook(zero)
    try:
        with fused.left_out():
            yield
    finally:
        hook.remove()


def draw(report: Inspection, config: ModelConfig, out: Path) -> list[Path]:
    """Draw projections.png, and tables.png, shift.png and states.png if the architecture has these parts.

    Args:
        report: Report of `inspect_run`.
        config: Config of the model.
        out: Folder of the pictures.

    Returns:
        Paths of the pictures.

    Raises:
        CannotWrite: A picture cannot be written.
    """
    pictures = []
    for name, shown, drawing in (
        ("tables.png", "tables" not in report.not_shown, _draw_tables),
        ("projections.png", True, _draw_projections),
        ("shift.png", "token-shift" not in report.not_shown, _draw_shift),
    ):
        if shown:
            drawing(report, config, out / name)
            pictures.append(out / name)
    if report.states is not None:
        draw_states(report.states, out / "states.png")
        pictures.append(out / "states.png")
    return pictures


def _draw_tables(report: Inspection, config: ModelConfig, out: Path) -> None:
    """Draw f by lag, alpha by source position, beta and gamma by target position: a row per layer, a line per head."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    layers = report.tables
    names = [name for name in TABLES if any(name in tables for tables in layers)]
    labels = {"f": "lag", "alpha": "source position", "beta": "target position", "gamma": "target position"}
    figure = Figure(figsize=(2.6 * len(names) + 0.6, 1.55 * len(layers) + 0.6), dpi=130, layout="constrained")
    grid = figure.subplots(len(layers), len(names), squeeze=False)
    for layer, tables in enumerate(layers):
        for axes, name in zip(grid[layer], names, strict=True):
            table = np.array(tables[name])
            if table.ndim == 3:
                # If f is a matrix over pairs of positions, only the matrix of the first head is drawn.
                reach = np.abs(np.tril(table[0])).max()
                axes.imshow(np.tril(table[0]), cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
                axes.set_xlabel("source position", fontsize=8)
            else:
                curves = np.atleast_2d(table)
                for head, curve in enumerate(curves):
                    color = "black" if len(curves) == 1 else colormaps["viridis"](head / max(1, len(curves) - 1) * 0.9)
                    axes.plot(curve, color=color, linewidth=1, label=f"head {head}")
            if layer == 0:
                axes.set_title({"f": "f (W)" if table.ndim == 3 else "f"}.get(name, name), fontsize=10)
                if name == "f" and table.ndim == 2 and 1 < len(table) <= 8:
                    axes.legend(fontsize=6, frameon=False, ncols=2)
            if layer == len(layers) - 1 and table.ndim < 3:
                axes.set_xlabel(labels[name], fontsize=8)
            if axes is grid[layer][0]:
                axes.set_ylabel(f"layer {layer}", fontsize=9)
            _plain(axes)
    save_picture(figure, out)


def _draw_projections(report: Inspection, config: ModelConfig, out: Path) -> None:
    """Draw median, middle 50 % and middle 98 % of the outputs of every projection in every layer."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((row.half, row.projection) for row in report.projections))
    columns = max(sum(half == h for h, _ in kinds) for half in HALVES)
    figure = Figure(figsize=(2.4 * columns + 0.6, 4.6), dpi=130, layout="constrained")
    grid = figure.subplots(len(HALVES), columns, squeeze=False)
    for i, half in enumerate(HALVES):
        here = [name for h, name in kinds if h == half]
        for axes, name in zip(grid[i], here, strict=False):
            rows = [r for r in report.projections if (r.half, r.projection) == (half, name)]
            for row in rows:
                low, lower, middle, upper, high = row.quantiles
                axes.plot([row.layer] * 2, [low, high], color="#0072B2", linewidth=1)
                axes.plot([row.layer] * 2, [lower, upper], color="#0072B2", linewidth=6, solid_capstyle="butt")
                axes.plot(row.layer, middle, "o", color="white", markeredgecolor="#0072B2", markersize=4)
            axes.set_title(f"{half}: " + (f"sigmoid({name})" if rows[0].after_sigmoid else name), fontsize=9)
            axes.set_xticks([r.layer for r in rows])
            _plain(axes)
        for axes in grid[i][len(here) :]:
            axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("layer", fontsize=8)
    save_picture(figure, out)


def _draw_shift(report: Inspection, config: ModelConfig, out: Path) -> None:
    """Draw the share of the shifted channels in each projection, and the loss increase when these channels are zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5.2), dpi=130, layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", squeeze=False)
    for column, half in enumerate(HALVES):
        rows = [r for r in report.projections if r.half == half and r.shifted is not None]
        names = list(dict.fromkeys(r.projection for r in rows))
        colors = spare_colors(())
        top, bottom = grid[0][column], grid[1][column]
        for i, (name, color) in enumerate(zip(names, colors, strict=False)):
            own = [r for r in rows if r.projection == name]
            x = np.array([r.layer for r in own]) + (i - (len(names) - 1) / 2) * 0.25
            share = np.array([np.nan if r.share is None else r.share for r in own])
            start = np.array([np.nan if r.share_at_start is None else r.share_at_start for r in own])
            top.bar(x, share, 0.22, color=color, label=f"{PROJECTIONS[name]} ({name})")
            top.plot(x, start, "_", color="black", markersize=9)
            bottom.bar(x, [(r.loss_without_shifted or 0.0) - report.loss for r in own], 0.22, color=color)
        top.set_title(half, fontsize=10)
        top.set_ylim(0, 1)
        top.legend(fontsize=8, frameon=False, ncols=3, loc="upper center")
        bottom.set_xlabel("layer", fontsize=9)
        for axes in (top, bottom):
            axes.set_xticks(range(config.layers))
            _plain(axes)
    grid[0][0].set_ylabel("share of the shifted channels\n(black: before training)", fontsize=9)
    grid[1][0].set_ylabel("loss added without shifted channels\n(nats per token)", fontsize=9)
    save_picture(figure, out)


def _plain(axes: "Axes") -> None:
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
