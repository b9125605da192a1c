"""Measurements of the matrix states of a recurrent model along a text.

Each head of each layer has a square matrix S[t] over values and keys, the state after token t. In the following
formulas, w is the log-decay of a channel of the keys, and s are the singular values of S[t]:

    half-life of a channel    ln 2 / -w
    change by token t         |S[t] - S[t-1]|, where |.| is the Frobenius norm, and S[-1] = 0
    effective rank            exp(-sum_i p_i ln p_i), where p_i = s_i^2 / sum_j s_j^2

The effective rank is from 1 to the size of the matrix. It follows O. Roy and M. Vetterli, "The effective rank: a
measure of effective dimensionality" (EUSIPCO 2007), who use s_i in place of s_i^2. The sum of s_i^2 is |S[t]|^2.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from timemix.data.shards import Tokens
from timemix.errors import NotFinite
from timemix.models.language_model import LanguageModel, evaluating
from timemix.ops.common import fused
from timemix.reporting.plots import save_picture
from timemix.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POSITIONS = 256
"""Largest number of tokens whose half-lives, rates, norms and effective ranks are measured."""
PIECE = 128
"""Number of tokens that the model processes at a time."""
MOST_CHANGING = 10
"""Number of tokens of the vocabulary that are listed for each layer."""
HALF_LIFE_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class HeadState:
    """Statistics of the matrix state of one head, over all measured tokens."""

    layer: int
    head: int
    half_life: list[float]
    """Quantiles of the half-life in tokens over channels and tokens, at the levels of HALF_LIFE_QUANTILES."""
    rate: float | None
    """Mean of the in-context learning rate over channels and tokens; None for a state without a delta rule."""
    rate_deviation: float | None
    """Standard deviation of the in-context learning rate over channels and tokens, or None like `rate`."""
    norm: list[float]
    """Frobenius norm of the state after each measured token."""
    effective_rank: list[float]
    """Effective rank of the state after each measured token."""


@dataclass(frozen=True, kw_only=True)
class TokenChange:
    """Change of the states of a layer by the occurrences of one token of the vocabulary."""

    layer: int
    token: int
    text: str
    count: int
    """Number of occurrences in the text."""
    change: float
    """Mean of |S[t] - S[t-1]| over the occurrences, summed over the heads of the layer."""


@dataclass(frozen=True, kw_only=True)
class StateReport:
    """Measurements of the matrix states of a model along a text."""

    positions: list[int]
    """Position of each measured token in the text, from 0."""
    heads: list[HeadState]
    """Statistics of every head of every layer."""
    changes: list[TokenChange]
    """The tokens of the vocabulary with the largest mean change, largest first, for every layer."""


@torch.no_grad()
def measure_states(model: LanguageModel, tokenizer: Tokenizer, tokens: np.ndarray | Tokens) -> StateReport | None:
    """Measure the matrix states of a model along a text. The state is carried through the whole text.

    Args:
        model: The model.
        tokenizer: Tokenizer of the model.
        tokens: Token ids of the text, (n,).

    Returns:
        The measurements; None if the architecture has no matrix states.

    Raises:
        NotFinite: A state is not finite.
    """
    recurrences = [each for block in model.blocks if (each := block.recurrence()) is not None]
    if not recurrences:
        return None
    positions = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), POSITIONS)).round().astype(int))
    found: list[dict[str, Tensor]] = []
    changes = torch.zeros(len(recurrences), model.config.vocab_size, dtype=torch.float64)
    state = model.init_state(1)
    with evaluating(model), fused.left_out(), _recorded(recurrences) as calls:
        for begin in range(0, len(tokens), PIECE):
            piece = torch.from_numpy(tokens[begin : begin + PIECE].astype(np.int64))
            _, state = model(piece[None].to(model.device), state, logits=None)
            # Each layer made one call with tensors (1, ...): L layers become a batch of L rows.
            inputs = {name: torch.cat([call[name] for call in calls]) for name in calls[0]}
            calls.clear()
            measured = positions[(positions >= begin) & (positions < begin + PIECE)] - begin
            change, values = _follow(recurrences[0], inputs, measured.tolist())
            changes.index_add_(1, piece, change.double().cpu())
            found.append(values)
    # (L, measured tokens, ...)
    values = {name: torch.cat([each[name] for each in found], 1).cpu() for name in found[0]}
    counts = torch.from_numpy(np.bincount(tokens[:], minlength=model.config.vocab_size))
    return StateReport(
        positions=positions.tolist(), heads=_heads(values), changes=_most_changing(changes, counts, tokenizer)
    )


@contextmanager
def _recorded(recurrences: list[nn.Module]) -> Iterator[list[dict[str, Tensor]]]:
    """Record the tensors of 4 dimensions that each call of the recurrences gets by keyword."""
    calls: list[dict[str, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[()], named: dict[str, Any], output: Any) -> None:
        log_decay = named["log_decay"]
        if log_decay.ndim == 2:
            named = named | {"log_decay": log_decay.expand(*named["k"].shape[:2], *log_decay.shape)}
        calls.append({name: x for name, x in named.items() if isinstance(x, Tensor) and x.ndim == 4})

    hooks = [each.register_forward_hook(record, with_kwargs=True) for each in recurrences]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _follow(recurrence: nn.Module, inputs: dict[str, Tensor], measured: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Follow the states S (L, H, N, N) of all layers through the tokens of a piece.

    Args:
        recurrence: Module of the recurrence.
        inputs: Arguments of the recurrence for T tokens, (L, T, H, N), and the state before the first of them.
        measured: Indices of the tokens to measure, rising.

    Returns:
        The change by each token, summed over heads (L, T), and tensors (L, len(measured), ...) by name.
    """
    S = inputs.pop("state")
    changes, singular = [], [S.new_zeros(S.shape[0], 0, *S.shape[1:3])]
    for t in range(inputs["log_decay"].shape[1]):
        before = S
        # A call of `forward` runs no hook.
        _, S = recurrence.forward(**{name: x[:, t : t + 1] for name, x in inputs.items()}, state=S, lengths=None)
        if not S.isfinite().all():
            raise NotFinite(
                "a state is not finite: the weights are damaged, or training diverged; use another checkpoint"
            )
        changes.append(torch.linalg.matrix_norm(S - before).sum(-1))
        if t in measured:
            # (L, H, N, N) -> (L, 1, H, N)
            singular.append(torch.linalg.svdvals(S)[:, None])
    s = torch.cat(singular, 1)
    values = {
        "half_life": half_life(inputs["log_decay"][:, measured]),
        "norm": s.square().sum(-1).sqrt(),
        "effective_rank": effective_rank(s),
    }
    if "rate" in inputs:
        values["rate"] = inputs["rate"][:, measured]
    return torch.stack(changes, 1), values


def half_life(log_decay: Tensor) -> Tensor:
    """Return the number of tokens after which a constant decay leaves half of the state.

    Args:
        log_decay: Log-decays, at most 0, of any shape.

    Returns:
        The half-lives in tokens. A log-decay of 0 counts as the smallest positive float32.
    """
    result: Tensor = math.log(2) / (-log_decay.double()).clamp(min=torch.finfo(torch.float32).tiny)
    return result


def effective_rank(singular: Tensor) -> Tensor:
    """Return the effective rank of matrices, with the formula at the top of this module.

    Args:
        singular: Singular values (..., N), at least 0.

    Returns:
        The effective ranks (...), from 1 to N, and 0 for a matrix of zeros.
    """
    # With the largest singular value as the unit, no square overflows or underflows as a whole.
    s = singular.double()
    s = s / s.amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    p = s.square() / s.square().sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy.exp().where(p.sum(-1) > 0, 0)


def _heads(values: dict[str, Tensor]) -> list[HeadState]:
    """Return the statistics of every head from tensors (L, measured tokens, H, ...)."""
    layers, _, heads = values["norm"].shape
    rows = []
    for layer in range(layers):
        for head in range(heads):
            own = {name: value[layer, :, head].double().numpy() for name, value in values.items()}
            rows.append(
                HeadState(
                    layer=layer,
                    head=head,
                    half_life=np.quantile(own["half_life"], HALF_LIFE_QUANTILES).tolist(),
                    rate=float(own["rate"].mean()) if "rate" in own else None,
                    rate_deviation=float(own["rate"].std()) if "rate" in own else None,
                    norm=own["norm"].tolist(),
                    effective_rank=own["effective_rank"].tolist(),
                )
            )
    return rows


def _most_changing(changes: Tensor, counts: Tensor, tokenizer: Tokenizer) -> list[TokenChange]:
    """Return the tokens with the largest mean change in each layer, from sums (L, V) and occurrences (V,)."""
    means = changes / counts.clamp(min=1)
    chosen = means.where(counts > 0, -1).topk(min(MOST_CHANGING, int((counts > 0).sum()))).indices
    return [
        TokenChange(
            layer=layer,
            token=token,
            text=tokenizer.decode([token]),
            count=int(counts[token]),
            change=float(means[layer, token]),
        )
        for layer, row in enumerate(chosen.tolist())
        for token in row
    ]


def draw_states(report: StateReport, out: Path) -> None:
    """Draw half-lives and rates by head, and norms and effective ranks along the text, with a row for each layer.

    Args:
        report: Report of `measure_states`.
        out: Picture to write.

    Raises:
        CannotWrite: The picture cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = 1 + max(row.layer for row in report.heads)
    figure = Figure(figsize=(11, 1.7 * layers + 0.6), dpi=130, layout="constrained")
    grid = figure.subplots(layers, 4, squeeze=False, sharex="col")
    for layer, panels in enumerate(grid):
        _draw_layer(panels, [row for row in report.heads if row.layer == layer], report.positions)
        panels[0].set_ylabel(f"layer {layer}", fontsize=9)
    rate = "in-context learning rate" if report.heads[0].rate is not None else ""
    titles = ("half-life in tokens (10, 50, 90 %)", rate, "norm |S|", "effective rank")
    labels = ("head", "head", "position", "position")
    for top, bottom, title, label in zip(grid[0], grid[-1], titles, labels, strict=True):
        top.set_title(title, fontsize=10)
        bottom.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        bottom.set_xlabel(label, fontsize=8)
    save_picture(figure, out)


def _draw_layer(panels: "Sequence[Axes]", rows: list[HeadState], positions: list[int]) -> None:
    """Draw the four panels of a layer. The heads have the same colours in all panels."""
    from matplotlib import colormaps

    half_lives, rates, norms, ranks = panels
    half_lives.set_yscale("log")
    for row in rows:
        color = colormaps["viridis"](row.head / max(1, len(rows) - 1) * 0.9)
        low, middle, high = row.half_life
        half_lives.errorbar(row.head, middle, [[middle - low], [high - middle]], fmt="o", markersize=4, color=color)
        if row.rate is not None:
            rates.errorbar(row.head, row.rate, row.rate_deviation, fmt="o", markersize=4, color=color)
        norms.plot(positions, row.norm, color=color, linewidth=1)
        ranks.plot(positions, row.effective_rank, color=color, linewidth=1)
    rates.set_ylim(0, 1)
    if all(row.rate is None for row in rows):
        rates.set_axis_off()
    norms.set_ylim(bottom=0)
    ranks.set_ylim(bottom=0)
    for axes in panels:
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
