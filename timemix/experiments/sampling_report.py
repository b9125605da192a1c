"""Write the report of a sampling experiment: table, Markdown page and picture."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from torch import Tensor

from timemix.experiments.spec import SamplingExperiment
from timemix.generation.sampler import Sampler
from timemix.reporting.markdown import markdown_table
from timemix.reporting.plots import save_picture, spare_colors
from timemix.reporting.statistics import Difference, interval, paired_difference, verdict_word
from timemix.storage.json_files import OPTIONAL, Range

TOP_A, POWER = 0.02, 2.0
N_GRAM = 8
METRICS = ("judge_loss", "repetition", "variety")
Each = Annotated[tuple[float, ...], Range(1)]
"""One measured number for each text, for at least one text."""


@dataclass(frozen=True)
class Setting:
    """A sampler with its label, as one row of the tables."""

    label: str
    temperature: float
    """Temperature of the comparison. The temperature of `sampler` may be lower."""
    sampler: Sampler


@dataclass(frozen=True)
class TextFigures:
    """Measurements of each text that one setting generates."""

    judge_loss: Each
    """Loss of each text given its prompt, measured by the larger judge model, in nats per token."""
    repetition: Each
    """Share of the N_GRAM-grams of prompt and text that repeat an earlier N_GRAM-gram."""
    variety: Each
    """Share of distinct 4-grams among the 4-grams of the text."""


@dataclass(frozen=True)
class Measured(TextFigures):
    """All measurements of one setting: an entry of measurements.json."""

    entropy: float
    """Mean entropy of the filtered distributions, in nats."""


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """Mean measurements of one setting over all its texts."""

    label: str
    temperature: float
    sampler: Sampler
    entropy: float
    judge_loss: float
    repetition: float
    variety: float
    differences: dict[str, Difference | None] | None = field(default=None, metadata=OPTIONAL)
    """Measurements of this setting minus measurements of top-a at this temperature, paired by text. None for top-a."""


@dataclass(frozen=True)
class SamplingJudgement:
    """A claim, its measured gain, and the verdict that follows from this gain."""

    claim: str
    gain: Difference | None
    verdict: str


@dataclass(frozen=True)
class SamplingTable:
    """Results of a sampling experiment, and content of table.json."""

    title: str
    rows: list[SettingRow]
    verdicts: list[SamplingJudgement]
    samples: int
    tokens: int


def build_table(experiment: SamplingExperiment, settings: list[Setting], found: dict[str, Measured]) -> SamplingTable:
    """Return the means of all settings, the differences from top-a at each temperature, and verdicts at temperature 1.

    Args:
        experiment: The experiment.
        settings: All settings.
        found: Measurements of each setting, by the label of the setting.
    """
    rows = [_row(setting, found) for setting in settings]
    verdicts = []
    for row in rows:
        if row.differences is not None and row.temperature == 1.0:
            rival = row.label.partition(" at ")[0].replace("plain", "sampling without a filter")
            for metric, words in (("judge_loss", "more probable text"), ("repetition", "less repetition")):
                gain = row.differences[metric]
                claim = f"top-a generates {words} than {rival} at equal entropy"
                verdicts.append(SamplingJudgement(claim, gain, verdict_word(gain)))
    return SamplingTable(experiment.title, rows, verdicts, experiment.samples, experiment.tokens)


def _row(setting: Setting, found: dict[str, Measured]) -> SettingRow:
    measured, differences = found[setting.label], None
    if " at " in setting.label and not setting.label.startswith("top-a"):
        top_a = found[f"top-a at {setting.temperature:g}"]
        differences = {
            m: paired_difference(_by_sample(getattr(top_a, m)), _by_sample(getattr(measured, m))) for m in METRICS
        }
    return SettingRow(
        label=setting.label,
        temperature=setting.temperature,
        sampler=setting.sampler,
        entropy=measured.entropy,
        judge_loss=statistics.fmean(measured.judge_loss),
        repetition=statistics.fmean(measured.repetition),
        variety=statistics.fmean(measured.variety),
        differences=differences,
    )


def _by_sample(values: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(values))


def to_markdown(table: SamplingTable) -> str:
    """Return the table as Markdown."""
    heading = ["setting", "entropy", "loss under the judge model", "repetition", "variety"]
    compared = [[*heading, "loss minus loss of top-a", "repetition minus repetition of top-a"]]
    swept = [heading]
    for row in table.rows:
        sampler = row.sampler
        factor = next(
            (
                f", {n} {getattr(sampler, n):.3g}"
                for n in ("top_p", "min_p", "top_k")
                if getattr(sampler, n) not in (0, 1)
            ),
            "",
        )
        factor = factor or (f", temperature {sampler.temperature:.3g}" if row.label.startswith("plain") else "")
        cells = [row.label + factor, *(f"{getattr(row, k):.4f}" for k in ("entropy", *METRICS))]
        if " at " in row.label:
            compared.append([*cells, *(interval((row.differences or {}).get(m)) for m in METRICS[:2])])
        else:
            swept.append(cells)
    parts = [
        f"# {table.title}",
        f"Each setting generates {table.samples} texts of {table.tokens} tokens. All settings use the same pieces of"
        " held-out text as prompts. Entropy is the mean entropy of the filtered next-token distributions, in nats, over"
        " positions of the held-out text. The loss under the judge model is the loss that a larger model assigns to the"
        f" generated texts, in nats per token. Repetition is the share of a text's {N_GRAM}-grams that occurred earlier"
        " in the text. Variety is the share of distinct 4-grams in a text. A difference from top-a is a mean over pairs"
        " of texts with equal prompts, with a 95 % interval.",
        markdown_table(compared),
        markdown_table(
            [["claim", "better by", "verdict"]] + [[v.claim, interval(v.gain), v.verdict] for v in table.verdicts],
            words=(0, 2),
        ),
        "The next table shows measurements with other factors and powers of top-a, at temperature 1:",
        markdown_table(swept),
    ]
    return "\n\n".join(parts) + "\n"


def draw_table(
    experiment: SamplingExperiment, settings: list[Setting], table: SamplingTable, logits: Tensor, out: Path
) -> None:
    """Plot the kept probability mass against the largest probability, and the loss of texts against the entropy.

    Args:
        experiment: The experiment.
        settings: All settings.
        table: The table.
        logits: Logits of the writer model, (positions, V).
        out: Path of the picture, .png or .svg.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.9), dpi=150, layout="constrained")
    mass, quality = figure.subplots(1, 2)
    rows = {row.label: row for row in table.rows}
    p = Sampler().probabilities(logits)
    p_max = p.amax(-1).numpy()
    bins = np.linspace(0, 1, 21)
    place = np.digitize(p_max, bins) - 1
    temperature = min(experiment.temperatures, key=lambda t: abs(t - 1))
    colors = spare_colors(())
    for i, name in enumerate(("top-a", "top-p", "min-p", "top-k", "plain")):
        color, marker = next(colors), "osD^v"[i]
        own = [s for s in settings if s.label.startswith(f"{name} at ")]
        if name != "plain":
            setting = next(s for s in own if s.temperature == temperature)
            kept = ((setting.sampler.probabilities(logits) > 0) * p).sum(-1).numpy()
            means = [kept[place == b].mean() if (place == b).sum() >= 10 else math.nan for b in range(20)]
            mass.plot((bins[:-1] + bins[1:]) / 2, means, color=color, marker=marker, markersize=4, label=name)
        points = sorted((rows[s.label].entropy, rows[s.label].judge_loss) for s in own)
        quality.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=name)
    swept = [rows[s.label] for s in settings if " at " not in s.label]
    quality.plot([r.entropy for r in swept], [r.judge_loss for r in swept], "x", color="0.5", markersize=5,
                 label="sweep of top-a")  # fmt: skip
    mass.set_xlabel(f"largest next-token probability (temperature {temperature:g})")
    mass.set_ylabel("mean probability mass that the filter keeps")
    quality.set_xlabel("mean entropy of the filtered distributions (nats)")
    quality.set_ylabel("loss of texts under the judge model (nats per token)")
    for axes in (mass, quality):
        axes.legend(edgecolor="none", fontsize=8)
        axes.grid(color="0.92", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, out)
