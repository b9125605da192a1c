"""Sampling experiments: filters compared at like entropy, and a sweep over the factors of top-a.

A writer and a larger judge are trained on one text. Every setting goes on from the same pieces of held-out text; what
it writes is measured by the judge's loss, by repetition and by variety, text by text, so that differences are paired.

OUT/writer, judge (run folders), data, table.json, table.md, top-a.png
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from timemix.config.run import RunConfig
from timemix.data.batches import validation_windows
from timemix.data.corpus import Corpus, is_corpus, open_corpus
from timemix.data.prepare import prepare, text_hash
from timemix.data.shards import Tokens
from timemix.errors import FileError, InUse, InvalidValue
from timemix.evaluation.loss import cross_entropy
from timemix.experiments.compare import begin_or_resume, on_corpus
from timemix.experiments.spec import PROMPT_TOKENS, SamplingExperiment
from timemix.generation.generate import generate_tokens
from timemix.generation.sampler import Sampler
from timemix.models.language_model import LanguageModel
from timemix.reporting.markdown import markdown_table
from timemix.reporting.plots import save_picture, spare_colors
from timemix.reporting.statistics import Difference, interval, paired_difference, verdict_word
from timemix.runs.folder import newest, read_progress
from timemix.runs.load import load
from timemix.storage.files import write_text
from timemix.storage.json_files import OPTIONAL, Misfit, Range, read_json, to_json, to_record
from timemix.storage.locks import claimed

TOP_A, POWER = 0.02, 2.0
POSITIONS = 8192
N_GRAM = 8
METRICS = ("judge_loss", "repetition", "variety")
Each = Annotated[tuple[float, ...], Range(1)]
"""A figure of each text, of one text at least."""


@dataclass(frozen=True)
class TextFigures:
    """Of each text of a setting: loss under the judge, repetition and variety; see `measure_text`."""

    judge_loss: Each
    repetition: Each
    variety: Each


@dataclass(frozen=True)
class Measured(TextFigures):
    """What measurements.json holds of a setting."""

    entropy: float


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """Means of a setting over its texts; differences: to top-a at the same temperature, paired by text."""

    label: str
    temperature: float
    sampler: Sampler
    entropy: float
    judge_loss: float
    repetition: float
    variety: float
    differences: dict[str, Difference | None] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class SamplingJudgement:
    """A verdict, and the paired gain that it follows from."""

    claim: str
    gain: Difference | None
    verdict: str


@dataclass(frozen=True)
class SamplingTable:
    """Everything that a sampling experiment found: the content of table.json."""

    title: str
    rows: list[SettingRow]
    verdicts: list[SamplingJudgement]
    samples: int
    tokens: int


@dataclass(frozen=True)
class Setting:
    """One way to draw tokens."""

    label: str
    temperature: float
    sampler: Sampler


def run_sampling(
    experiment: SamplingExperiment, out: Path, say: Callable[[str], None], device: str = "auto"
) -> SamplingTable:
    """Trains writer and judge, writes with every setting, and returns the table, also written to `out`.

    Goes on where it was: training from its checkpoints, settings from what measurements.json holds.
    Raises InUse where `out` holds another experiment, or another process works in it.
    """
    with claimed(out / ".lock") as mine:
        if not mine:
            raise InUse(f"another process is working in {out}")
        corpus = _corpus(experiment, out)
        writer = _trained(experiment.config("writer"), corpus, out, "writer", device, say)
        judge = _trained(experiment.config("judge"), corpus, out, "judge", device, say)
        prompts = _prompts(corpus, experiment.samples)
        logits = held_out_logits(writer, corpus.valid)
        settings = like_entropy(experiment, logits) + sweep(experiment)
        path = out / "measurements.json"
        found = _measured_before(path) if path.exists() else {}
        for setting in settings:
            if setting.label not in found:
                texts = _write(writer, prompts, experiment.tokens, setting.sampler)
                figures = to_json(measure_text(texts, prompts, judge))
                measured = Measured(**figures, entropy=mean_entropy(setting.sampler, logits))
                found[setting.label] = measured
                write_text(path, json.dumps({label: to_json(m) for label, m in found.items()}))
                say(f"{setting.label}: judge's loss {statistics.fmean(measured.judge_loss):.3f}")
        table = build_table(experiment, settings, found)
        write_text(out / "table.json", json.dumps(to_json(table), indent=1) + "\n")
        write_text(out / "table.md", to_markdown(table))
        _draw(experiment, settings, table, logits, out / "top-a.png")
    return table


def _measured_before(path: Path) -> dict[str, Measured]:
    """What measurements.json holds, without what is damaged: that is measured again."""
    found = {}
    for label, data in read_json(path).items():
        with contextlib.suppress(Misfit):
            found[label] = to_record(data, Measured)
    return found


def _corpus(experiment: SamplingExperiment, out: Path) -> Corpus:
    config = experiment.config("writer").data
    path = out / "experiment.json"
    plain = json.loads(json.dumps(asdict(experiment)))
    plain["base"].get("data", {}).pop("source", None)
    plain["base"].get("data", {}).pop("valid", None)
    ours = {"experiment": {k: v for k, v in plain.items() if k != "title"}, "text": text_hash(config)}
    if not path.exists():
        write_text(path, json.dumps(ours, indent=1))
    elif (theirs := read_json(path)) != ours:
        same = theirs.get("experiment") == ours["experiment"]
        what = "this experiment on another text" if same else "another experiment"
        raise FileError(f"{out} holds {what}; choose another folder")
    if is_corpus(Path(config.source)):
        return open_corpus(Path(config.source))
    folder = out / "data"
    return open_corpus(folder) if is_corpus(folder) else prepare(folder, config, progress=True)


def _trained(
    config: RunConfig, corpus: Corpus, out: Path, name: str, device: str, say: Callable[[str], None]
) -> LanguageModel:
    """The model of a run in OUT/NAME, trained to its end; goes on with one that was begun."""
    source = Path(config.data.source) if is_corpus(Path(config.data.source)) else out / "data"
    trainer = begin_or_resume(on_corpus(config, source, corpus, device), out / name)
    if trainer.step < trainer.config.train.steps:
        say(f"training {name}: {trainer.config.train.steps - trainer.step} steps")
        trainer.run()
    say(f"{name}: held-out loss {read_progress(newest(out / name)).valid_loss:.4f}")
    return load(out / name, device=str(trainer.device)).model


def _prompts(corpus: Corpus, count: int) -> list[list[int]]:
    """Pieces of held-out text, evenly spread."""
    last = len(corpus.valid) - PROMPT_TOKENS
    if last < count:
        raise InvalidValue(f"the held-out text has {len(corpus.valid)} tokens; {count} prompts need more")
    return [corpus.valid[s : s + PROMPT_TOKENS].tolist() for s in (last * i // count for i in range(count))]


@torch.no_grad()
def held_out_logits(model: LanguageModel, tokens: np.ndarray | Tokens) -> Tensor:
    """The model's logits (positions, V) over the first held-out windows."""
    ctx_len = model.config.ctx_len
    rows = []
    for inputs, _ in validation_windows(tokens[: POSITIONS + 1], ctx_len, 64):
        rows.append(model(torch.from_numpy(inputs).to(model.device))[0].flatten(0, 1).cpu())
    return torch.cat(rows)


def mean_entropy(sampler: Sampler, logits: Tensor) -> float:
    """Mean entropy in nats of the distributions that a sampler draws from, over rows of logits."""
    p = sampler.probabilities(logits)
    return float(-torch.special.xlogy(p, p).sum(-1).mean())


def like_entropy(experiment: SamplingExperiment, logits: Tensor) -> list[Setting]:
    """At each temperature top-a with the factors of 2021, and the other filters at the factor of like mean entropy.

    Plain sampling has no factor: its temperature is lowered instead. top-k comes as near as a whole number can.
    """
    settings = []
    for t in experiment.temperatures:
        ours = Sampler(temperature=t, top_a=TOP_A, top_a_power=POWER)
        target = mean_entropy(ours, logits)
        found = {
            "top-a": ours,
            "top-p": _solve(partial(_top_p, t), 1e-3, 1.0, target, logits),
            "min-p": _solve(partial(_min_p, t), 0.0, 1.0, target, logits),
            "top-k": _nearest_top_k(t, target, logits),
            "plain": _solve(lambda x: Sampler(temperature=x), 1e-3, t, target, logits),
        }
        settings += [Setting(f"{name} at {t:g}", t, sampler) for name, sampler in found.items()]
    return settings


def _top_p(temperature: float, x: float) -> Sampler:
    return Sampler(temperature=temperature, top_p=x)


def _min_p(temperature: float, x: float) -> Sampler:
    return Sampler(temperature=temperature, min_p=1 - x)


def _solve(make: Callable[[float], Sampler], low: float, high: float, target: float, logits: Tensor) -> Sampler:
    """The sampler of a family whose mean entropy, which rises with x, is `target`, by bisection."""
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(make(middle), logits) < target else (low, middle)
    return make(high)


def _nearest_top_k(temperature: float, target: float, logits: Tensor) -> Sampler:
    """The whole number of tokens kept whose mean entropy, which rises with it, comes nearest to `target`."""
    low, high = 1, logits.shape[1]
    while high - low > 1:
        middle = (low + high) // 2
        above = mean_entropy(Sampler(temperature=temperature, top_k=middle), logits) > target
        low, high = (low, middle) if above else (middle, high)
    around = [Sampler(temperature=temperature, top_k=k) for k in (low, high)]
    return min(around, key=lambda s: abs(mean_entropy(s, logits) - target))


def sweep(experiment: SamplingExperiment) -> list[Setting]:
    """Every pair of factors of top-a at temperature 1, and none."""
    pairs = [(a, p) for a in experiment.top_a for p in experiment.powers]
    settings = [
        Setting(f"top-a {a:g}, power {p:g}", 1.0, Sampler(top_a=a, top_a_power=p)) for a, p in pairs
    ]  # fmt: skip
    return [Setting("no filter", 1.0, Sampler()), *settings]


def _write(model: LanguageModel, prompts: list[list[int]], tokens: int, sampler: Sampler) -> list[list[int]]:
    columns = [new.tolist() for new in generate_tokens(model, prompts, tokens, sampler)]
    return [list(row) for row in zip(*columns, strict=True)]


def measure_text(texts: list[list[int]], prompts: list[list[int]], judge: LanguageModel) -> TextFigures:
    """Loss under the judge, repetition and variety of every text.

    judge_loss: nats per token, given the prompt. repetition: share of the N_GRAM-grams of prompt and text that are not
    the first of their kind. variety: distinct 4-grams of the text per 4-gram.
    """
    return TextFigures(
        judge_loss=tuple(_judge_loss(texts, prompts, judge)),
        repetition=tuple(1 - _distinct(p + t, N_GRAM) for p, t in zip(prompts, texts, strict=True)),
        variety=tuple(_distinct(t, 4) for t in texts),
    )


def _distinct(tokens: list[int], n: int) -> float:
    """Distinct n-grams per n-gram."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)


@torch.no_grad()
def _judge_loss(texts: list[list[int]], prompts: list[list[int]], judge: LanguageModel) -> list[float]:
    rows = torch.tensor([p + t for p, t in zip(prompts, texts, strict=True)])
    losses = []
    for piece in rows.split(16):
        piece = piece.to(judge.device)
        logits, _ = judge(piece[:, :-1])
        loss = cross_entropy(logits, piece[:, 1:], reduction="none").view(len(piece), -1)
        losses += loss[:, len(prompts[0]) - 1 :].mean(-1).tolist()
    return losses


def build_table(experiment: SamplingExperiment, settings: list[Setting], found: dict[str, Measured]) -> SamplingTable:
    """Means of every setting, at each temperature the paired differences to top-a, and verdicts at temperature 1."""
    rows = [_row(setting, found) for setting in settings]
    verdicts = []
    for row in rows:
        if row.differences is not None and row.temperature == 1.0:
            rival = row.label.partition(" at ")[0]
            for metric, words in (("judge_loss", "more probable text"), ("repetition", "less repetition")):
                gain = row.differences[metric]
                claim = f"top-a writes {words} than {rival} at like entropy"
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
    """The table as a person reads it."""
    heading = ["setting", "entropy", "judge's loss", "repetition", "variety"]
    compared = [[*heading, "judge's loss - top-a's", "repetition - top-a's"]]
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
        f"{table.samples} texts of {table.tokens} tokens per setting, going on from the same held-out text."
        " Entropy: mean over held-out positions of the filtered distribution, nats. Judge's loss: nats per token of the"
        f" text under a larger model. Repetition: share of {N_GRAM}-grams seen before in the same text. Variety:"
        " distinct 4-grams per 4-gram. Differences are paired by text, with their 95 % interval.",
        markdown_table(compared),
        markdown_table(
            [["claim", "better by", "verdict"]] + [[v.claim, interval(v.gain), v.verdict] for v in table.verdicts],
            words=(0, 2),
        ),
        "The factors of top-a at temperature 1:",
        markdown_table(swept),
    ]
    return "\n\n".join(parts) + "\n"


def _draw(
    experiment: SamplingExperiment, settings: list[Setting], table: SamplingTable, logits: Tensor, out: Path
) -> None:
    """Kept mass against the largest probability, and the judge's loss against entropy."""
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
    mass.set_xlabel(f"largest probability (temperature {temperature:g})")
    mass.set_ylabel("mass kept, mean")
    quality.set_xlabel("mean entropy of the filtered distribution (nats)")
    quality.set_ylabel("loss under the judge (nats per token)")
    for axes in (mass, quality):
        axes.legend(edgecolor="none", fontsize=8)
        axes.grid(color="0.92", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    save_picture(figure, out)
