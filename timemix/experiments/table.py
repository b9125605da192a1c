"""Build the table of a comparison: mean losses, paired differences with intervals, and verdicts."""

import statistics
from dataclasses import dataclass, field, replace
from typing import Any

from timemix.data.corpus import Corpus
from timemix.evaluation.texts import bits_per_byte
from timemix.experiments.compare import Comparison
from timemix.experiments.jobs import Failure, Result
from timemix.experiments.spec import Verdict
from timemix.experiments.variants import Variant
from timemix.reporting.markdown import markdown_table, mean_and_deviation
from timemix.reporting.statistics import Difference, interval, paired_difference, verdict_word, verdict_words
from timemix.storage.json_files import OPTIONAL, to_json


@dataclass(frozen=True, kw_only=True)
class Row:
    """Results of one variant. Losses are in nats per token."""

    name: str
    label: str
    parameters: int | None = None
    """Number of parameters."""
    chosen: dict[str, Any] | None = None
    """Best tuning point."""
    tuning: list[dict[str, Any]] = field(default_factory=list)
    """All tuning points, each with its loss on the end of the training text in `valid_loss`."""
    train_losses: dict[int, float] = field(default_factory=dict)
    """Training loss by seed."""
    valid_losses: dict[int, float] = field(default_factory=dict)
    """Held-out loss by seed."""
    valid_bits_per_byte: dict[int, float] = field(default_factory=dict)
    """Held-out loss by seed in bits per byte of the text; empty if the number of bytes is unknown."""
    valid_at: dict[int, dict[str, float]] = field(default_factory=dict)
    """Held-out losses by seed, then by training step."""
    tokens_per_second: float | None = None
    """Median training speed of the runs."""
    seconds: float = 0
    """Total training time of all runs, in seconds."""
    peak_memory: float | None = None
    """Peak memory of a training step, in bytes."""
    failed: dict[int, str] = field(default_factory=dict)
    """Error message by seed."""
    chosen_precision: dict[int, str] = field(default_factory=dict)
    """Precision by seed that `train.precision = "auto"` chose; empty for another value of `train.precision`."""
    text: str = ""
    """Hashes of the tokenizer and of the held-out text."""
    by_position: dict[int, tuple[float, ...]] | None = field(default=None, metadata=OPTIONAL)
    """Held-out loss by seed, then by position in the window."""
    difference: Difference | None = None
    """Held-out loss of this row minus the held-out loss of the first row, paired by seed, with a 95 % t-interval."""


@dataclass(frozen=True)
class Judgement:
    """A claim, its measured gain, and the verdict that follows from this gain."""

    claim: str
    better: str
    worse: str
    gain: Difference | None
    verdict: str
    pairs: int
    """Number of seeds with both runs."""


@dataclass(frozen=True)
class Table:
    """Results of a comparison, and content of table.json."""

    title: str
    tokens: int | None
    seconds: float | None
    seeds: list[int]
    variants: list[Row]
    verdicts: list[Judgement]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object for table.json. The first row has no field `difference`.

        The field `comparable` of a row is whether the row has the tokenizer and the held-out text of the first row.
        """
        table = to_json(self)
        rows = table["variants"]
        del rows[0]["difference"]
        for row in rows:
            row["comparable"] = row["text"] == rows[0]["text"]
        return table


def build_table(comparison: Comparison) -> Table:
    """Return the table of a comparison with the runs that are finished so far."""
    experiment = comparison.experiment
    first, *others = [_row(comparison, variant) for variant in experiment.variants]
    rows = [first]
    for row in others:
        difference = paired_difference(_losses(first), _losses(row)) if row.text == first.text else None
        rows.append(replace(row, difference=difference))
    by_name = {row.name: row for row in rows}
    return Table(
        title=experiment.title,
        tokens=experiment.tokens,
        seconds=experiment.seconds,
        seeds=list(experiment.seeds),
        variants=rows,
        verdicts=[judge(verdict, by_name[verdict.better], by_name[verdict.worse]) for verdict in experiment.verdicts],
    )


def _row(comparison: Comparison, variant: Variant) -> Row:
    results = {job.number: comparison.result(job) or Failure("not run") for job in comparison.seed_jobs(variant)}
    good = {seed: r for seed, r in results.items() if isinstance(r, Result)}
    tuning: list[dict[str, Any]] = []
    corpus = comparison.corpus(variant)
    for job in comparison.tuning_jobs(variant):
        tuned = comparison.good_result(job)
        tuning.append({**comparison.point(job), "valid_loss": None if tuned is None else tuned.valid_loss})
    return Row(
        name=variant.name,
        label=variant.heading,
        parameters=next((r.parameters for r in good.values()), None),
        chosen=comparison.best_point(variant),
        tuning=tuning,
        train_losses={seed: r.train_loss for seed, r in good.items()},
        valid_losses={seed: r.valid_loss for seed, r in good.items()},
        valid_bits_per_byte=_bits_per_byte(good, corpus),
        valid_at={seed: r.valid_at for seed, r in good.items()},
        tokens_per_second=statistics.median([r.tokens_per_second for r in good.values()]) if good else None,
        seconds=sum(r.seconds for r in good.values()),
        peak_memory=comparison.memory(variant),
        failed={seed: r.error for seed, r in results.items() if isinstance(r, Failure)},
        chosen_precision=_chosen_precision(comparison, variant, good),
        text=f"{corpus.tokenizer.hash} {corpus.info.valid.sha256}",
        by_position=_by_position(good) if comparison.experiment.by_position and good else None,
    )


def _bits_per_byte(good: dict[int, Result], corpus: Corpus) -> dict[int, float]:
    bits = {seed: bits_per_byte(r.valid_loss, corpus) for seed, r in good.items()}
    return {seed: each for seed, each in bits.items() if each is not None}


def _chosen_precision(comparison: Comparison, variant: Variant, good: dict[int, Result]) -> dict[int, str]:
    if comparison.config(comparison.seed_jobs(variant)[0]).train.precision != "auto":
        return {}
    return {seed: r.precision for seed, r in good.items() if r.precision is not None}


def _by_position(good: dict[int, Result]) -> dict[int, tuple[float, ...]]:
    return {seed: r.by_position for seed, r in good.items() if r.by_position is not None}


def judge(verdict: Verdict, better: Row, worse: Row) -> Judgement:
    """Test the claim that the variant `worse` has a higher held-out loss than the variant `better`.

    The verdict is "holds", "does not hold", "undecided" or "not compared". Variants with different tokenizers or
    held-out texts are not compared.

    Args:
        verdict: The claim.
        better: Results of the variant with the lower loss.
        worse: Results of the variant with the higher loss.
    """
    low, high = _losses(better, verdict), _losses(worse, verdict)
    difference = paired_difference(low, high) if better.text == worse.text else None
    pairs = len(low.keys() & high.keys())
    return Judgement(verdict.claim, verdict.better, verdict.worse, difference, verdict_word(difference), pairs)


def _losses(row: Row, verdict: Verdict | None = None) -> dict[int, float]:
    """Return held-out losses by seed: after training, at a verdict's step, or over a verdict's first positions."""
    if verdict is not None and verdict.at_step is not None:
        step = str(verdict.at_step)
        return {seed: losses[step] for seed, losses in row.valid_at.items() if step in losses}
    if verdict is not None and verdict.first_positions is not None:
        n = verdict.first_positions
        return {seed: statistics.fmean(losses[:n]) for seed, losses in (row.by_position or {}).items()}
    return row.valid_losses


def summary(table: Table) -> str:
    """Return the budget, the seeds and the units as text above the table."""
    budget = f"on {table.tokens:,} tokens" if table.tokens else f"for {table.seconds:g} s"
    return (
        f"Each variant is trained {budget}, once with each seed ({', '.join(map(str, table.seeds))}). Losses are in"
        " nats per token, as mean ± standard deviation over the seeds. A difference is the held-out loss of a row minus"
        " the held-out loss of the first row, as a mean over pairs of runs with equal seeds, with a 95 %"
        " interval."
    )


def result_rows(table: Table) -> list[list[str]]:
    """Return the rows of the main table as text, headings first."""
    rows = [
        [
            "variant",
            "parameters",
            "chosen",
            "training loss",
            "held-out loss",
            "bits per byte",
            "difference",
            "tokens/s",
            "memory",
        ]
    ]
    for row in table.variants:
        memory, speed = row.peak_memory, row.tokens_per_second
        rows.append(
            [
                row.label,
                "-" if row.parameters is None else f"{row.parameters:,}",
                point_words(row.chosen),
                mean_and_deviation(row.train_losses.values()),
                mean_and_deviation(row.valid_losses.values()),
                mean_and_deviation(row.valid_bits_per_byte.values()),
                interval(row.difference),
                "-" if speed is None else f"{speed:,.0f}",
                "-" if memory is None else f"{memory / 2**20:,.0f} MiB",
            ]
        )
    return rows


def verdict_rows(table: Table) -> list[list[str]]:
    """Return the rows of the table of verdicts as text, headings first."""
    return [["claim", "better by", "verdict"]] + [
        [v.claim, interval(v.gain), verdict_words(v.gain, v.pairs)] for v in table.verdicts
    ]


def tuning_rows(table: Table) -> list[list[str]]:
    """Return the rows of the tuning table as text, with a star at the chosen settings; empty without tuning."""
    tried = [
        {point_words({k: v for k, v in p.items() if k != "valid_loss"}): p["valid_loss"] for p in row.tuning}
        for row in table.variants
    ]
    # Architectures with different fields have different tuning points.
    points = list(dict.fromkeys(point for losses in tried for point in losses))
    rows = [["variant", *points]] if points else []
    for row, losses in zip(table.variants if points else [], tried, strict=False):
        chosen = point_words(row.chosen)
        rows.append([row.label, *(_tried(losses[p], p == chosen) if p in losses else "-" for p in points)])
    return rows


def _tried(loss: float | None, is_chosen: bool) -> str:
    return "failed" if loss is None else f"{loss:.4f}{' *' * is_chosen}"


def to_markdown(table: Table) -> str:
    """Return the table as Markdown."""
    parts = [f"# {table.title}", summary(table), markdown_table(result_rows(table), words=(0, 2))]
    if table.verdicts:
        parts.append(markdown_table(verdict_rows(table), words=(0, 2)))
    if grid := tuning_rows(table):
        parts += [
            "The next table shows the loss of every tuning run (seed 0) on the last 5 % of the training text. A star"
            " marks the lowest loss of each variant. All other runs of a variant use the settings that gave the loss"
            " with the star."
        ]
        parts.append(markdown_table(grid))
    if said := warnings(table):
        parts.append("\n".join(f"- {each}" for each in said))
    return "\n\n".join(parts) + "\n"


def warnings(table: Table) -> list[str]:
    """Return warnings about a comparison: failed runs, unequal sizes, and best values at the edge of a tuning grid."""
    said = []
    for row in table.variants:
        said += [f"Variant {row.label!r}, seed {seed}, failed: {error}" for seed, error in row.failed.items()]
    said += [
        f"Variant {row.label!r} has another held-out text or tokenizer, so its losses are not compared."
        for row in table.variants
        if row.text != table.variants[0].text
    ]
    precisions = sorted({each for row in table.variants for each in row.chosen_precision.values()})
    if len(precisions) > 1:
        said.append(
            f"Some runs use {' and others '.join(precisions)}, because train.precision is auto and processors differ;"
            " set train.precision to compare the runs in one precision."
        )
    first = table.variants[0].parameters
    for row in table.variants:
        failed = sum(point["valid_loss"] is None for point in row.tuning)
        if 0 < failed < len(row.tuning):
            said.append(
                f"Variant {row.label!r}: {failed} of {len(row.tuning)} tuning runs failed, so its settings are the best"
                " of the others."
            )
        if row.parameters and first and abs(row.parameters / first - 1) > 0.01:
            more = row.parameters / first - 1
            said.append(
                f"Variant {row.label!r} has {abs(more):.1%} {'more' if more > 0 else 'fewer'} parameters than the first"
                " variant."
            )
        chosen = row.chosen or {}
        tried = {k: [p[k] for p in row.tuning] for k in chosen if row.tuning}
        for name, values in tried.items():
            value = chosen[name]
            numbers = isinstance(value, int | float) and not isinstance(value, bool)
            if numbers and len(set(values)) > 1 and value in (min(values), max(values)):
                said.append(
                    f"The best {name} of variant {row.label!r}, {value:g}, is at the edge of the grid; widen the grid."
                )
    return said


def point_words(point: dict[str, Any] | None) -> str:
    """Return a tuning point as short text, such as "lr 0.004, zero"."""
    if point is None:
        return "-"
    names = {name: name.rpartition(".")[2] for name in point}
    values = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in point.items()}
    return ", ".join(v if isinstance(v, str) else f"{names[k]} {values[k]}" for k, v in point.items())
