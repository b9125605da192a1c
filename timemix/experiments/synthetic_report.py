"""Table, verdicts and picture of an experiment with synthetic tasks."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timemix.experiments.synthetic_spec import SyntheticExperiment, TaskSetting, TaskVerdict
from timemix.experiments.synthetic_tasks import TASKS
from timemix.reporting.markdown import markdown_table
from timemix.reporting.plots import save_picture, spare_colors
from timemix.reporting.statistics import (
    Difference,
    interval,
    mean_interval,
    paired_difference,
    verdict_word,
    verdict_words,
)
from timemix.storage.json_files import OPTIONAL

COLUMNS = 3
"""Number of tasks in a row of the picture."""


@dataclass(frozen=True)
class Measured:
    """Result of one run, and content of its file."""

    accuracy: dict[str, float]
    """Share of right answers by size of the test."""
    loss: float | None
    """Mean loss of the last twentieth of the training steps in nats per answer, None if the loss diverged."""
    lr: float
    """Learning rate."""
    parameters: int
    """Number of parameters of the model."""
    seconds: float
    """Time of training and tests in seconds."""
    precision: str | None = field(default=None, metadata=OPTIONAL)
    """Precision of matrix products, None in a result of an earlier version."""


@dataclass(frozen=True)
class SyntheticRow:
    """Accuracy of one variant on one task."""

    name: str
    label: str
    parameters: int
    lr: float
    accuracy: dict[int, Difference]
    """Mean accuracy over seeds by size of the test, with the ends of its 95 % interval."""
    by_seed: dict[int, dict[int, float]]
    """Accuracy by size of the test, then by seed."""
    precisions: list[str]
    """Precisions of the runs, each once."""
    diverged: int
    """Number of seeds whose loss diverged."""


@dataclass(frozen=True)
class TaskTable:
    """Results of all variants on one task."""

    name: str
    kind: str
    size: int
    """Largest size of a training sequence."""
    guess: dict[int, float]
    """Accuracy of a guess by frequency (`SyntheticTask.guess`), by size of the test."""
    rows: list[SyntheticRow]


@dataclass(frozen=True)
class TaskJudgement:
    """A verdict, and the difference of accuracies from which the verdict follows."""

    claim: str
    difference: Difference | None
    """Accuracy of the variant `better` minus accuracy of the variant `worse`."""
    verdict: str


@dataclass(frozen=True)
class SyntheticTable:
    """Results of an experiment, and content of table.json."""

    title: str
    seeds: int
    lrs: list[float]
    """Learning rates that were tried."""
    tasks: list[TaskTable]
    verdicts: list[TaskJudgement]


Found = dict[str, dict[str, dict[int, Measured]]]
"""Results by name of the task, name of the variant, and seed."""


def best_lr(tuned: dict[float, Measured]) -> float:
    """Return the learning rate whose run has the lowest loss.

    Args:
        tuned: Results of the tuning runs by learning rate.
    """
    return min(tuned, key=lambda lr: math.inf if (loss := tuned[lr].loss) is None else loss)


def build_table(experiment: SyntheticExperiment, found: Found) -> SyntheticTable:
    """Return the mean accuracies with their intervals, and the verdicts.

    Args:
        experiment: The experiment.
        found: Results of all runs of a task, for at least one task.
    """
    tasks = [_task_table(experiment, task, found[task.name]) for task in experiment.tasks if task.name in found]
    verdicts = [
        _judge(verdict, found[verdict.task], experiment.rows)
        for verdict in experiment.verdicts
        if verdict.task in found
    ]
    return SyntheticTable(experiment.title, len(experiment.seeds), list(experiment.lrs), tasks, verdicts)


def _task_table(experiment: SyntheticExperiment, task: TaskSetting, found: dict[str, dict[int, Measured]]) -> TaskTable:
    rows = []
    for variant in experiment.variants:
        results = found[variant.name]
        by_seed = {n: {seed: r.accuracy[str(n)] for seed, r in results.items()} for n in task.tests}
        first, *_ = results.values()
        rows.append(
            SyntheticRow(
                name=variant.name,
                label=variant.heading,
                parameters=first.parameters,
                lr=first.lr,
                accuracy={n: _share(list(values.values())) for n, values in by_seed.items()},
                by_seed=by_seed,
                precisions=sorted({r.precision for r in results.values() if r.precision is not None}),
                diverged=sum(r.loss is None for r in results.values()),
            )
        )
    guess = {n: TASKS[task.kind].guess(n) for n in task.tests}
    return TaskTable(task.name, task.kind, task.size, guess, rows)


def _share(values: list[float]) -> Difference:
    """Return the mean of shares with its 95 % interval, cut to the range from 0 to 1."""
    return {end: None if x is None else min(1.0, max(0.0, x)) for end, x in mean_interval(values).items()}


def _judge(verdict: TaskVerdict, found: dict[str, dict[int, Measured]], rows: int) -> TaskJudgement:
    better, worse = (
        {seed: result.accuracy[str(verdict.size)] for seed, result in found[name].items()}
        for name in (verdict.better, verdict.worse)
    )
    difference = paired_difference(worse, better)
    # Shares of a limited number of answers can differ equally with every seed, which does not make the mean certain.
    if difference and (mean := difference["mean"]) and (low := difference["low"]) is not None and mean - low < 1e-9:
        difference = {"mean": mean, "low": mean - 1 / rows, "high": mean + 1 / rows}
    return TaskJudgement(verdict.claim, difference, verdict_word(difference))


def to_markdown(table: SyntheticTable) -> str:
    """Return the table as Markdown."""
    seeds = f"{table.seeds} seeds" if table.seeds > 1 else "one seed"
    parts = [
        f"# {table.title}",
        f"The figures are shares of right answers: means over {seeds}"
        + (", with 95 % intervals." if table.seeds > 1 else ".")
        + " The first row is a guess: the answer that is most frequent in the sequence, or at the position if every"
        " position has an answer.",
    ]
    for task in table.tasks:
        words = TASKS[task.kind].size
        half = " Only the second half of the answers of a sequence counts." if TASKS[task.kind].running else ""
        parts += [
            f"## {task.name}",
            f"Trained on up to {task.size} {words}.{half}",
            markdown_table(task_rows(task)),
        ]
    if table.verdicts:
        rows = [["claim", "difference of the accuracies", "verdict"]]
        rows += [[v.claim, interval(v.difference), verdict_words(v.difference, table.seeds)] for v in table.verdicts]
        parts.append(markdown_table(rows, words=(0, 2)))
    if said := warnings(table):
        parts.append("\n".join(f"- {each}" for each in said))
    return "\n\n".join(parts) + "\n"


def task_rows(task: TaskTable, digits: int = 3) -> list[list[str]]:
    """Return the table of a task as text, headings first: a guess, then the variants.

    The last column has the accuracy of each seed at the largest test that is not larger than the training, because the
    mean of seeds that learned the task and seeds that did not hides both.

    Args:
        task: Results of all variants.
        digits: Number of digits after the decimal point.
    """
    sizes = list(task.guess)
    shown = max((n for n in sizes if n <= task.size), default=sizes[0])
    heads = [f"{n} {TASKS[task.kind].size}" for n in sizes]
    rows = [["variant", "parameters", "lr", *heads, f"each seed at {shown}"]]
    rows.append(["a guess", "-", "-", *(f"{share:.2f}" for share in task.guess.values()), "-"])
    for row in task.rows:
        label = row.label + (f" ({row.diverged} diverged)" if row.diverged else "")
        shares = [share_words(share, digits) for share in row.accuracy.values()]
        seeds = ", ".join(f"{share:.2f}" for share in sorted(row.by_seed[shown].values()))
        rows.append([label, f"{row.parameters:,}", f"{row.lr:g}", *shares, seeds])
    return rows


def warnings(table: SyntheticTable) -> list[str]:
    """Return warnings about an experiment: learning rates at the edge of the grid, unequal sizes and precisions."""
    said = []
    for task in table.tasks:
        if len(table.lrs) > 1:
            at_edge = {row.label: row.lr for row in task.rows if row.lr in (min(table.lrs), max(table.lrs))}
            if at_edge:
                names = ", ".join(f"{label} ({lr:g})" for label, lr in at_edge.items())
                said.append(f"{task.name}: the best lr is at the edge of the grid for {names}; widen the grid.")
        few, many = (choose(task.rows, key=lambda row: row.parameters) for choose in (min, max))
        if many.parameters > 1.01 * few.parameters:
            more = many.parameters / few.parameters - 1
            said.append(f"{task.name}: {many.label} has {more:.0%} more parameters than {few.label}.")
    precisions = sorted({each for task in table.tasks for row in task.rows for each in row.precisions})
    if len(precisions) > 1:
        said.append(f"The runs use different precisions: {', '.join(precisions)}; set train.precision.")
    return said


def share_words(share: Difference, digits: int = 3) -> str:
    """Return a share with its interval as text, such as "0.981 (0.950 to 1.000)"."""
    spread = "" if share["low"] is None else f" ({share['low']:.{digits}f} to {share['high']:.{digits}f})"
    return f"{share['mean']:.{digits}f}{spread}"


def draw_table(experiment: SyntheticExperiment, table: SyntheticTable, out: Path) -> None:
    """Draw the accuracy of each variant by size of the test, one diagram per task.

    A dotted line marks the largest size in training, and a dashed line the accuracy of a guess. Small dots are seeds.

    Args:
        experiment: The experiment.
        table: The table of the experiment.
        out: Picture to write.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(table.tasks))
    lines = math.ceil(len(table.tasks) / columns)
    figure = Figure(figsize=(3.4 * columns + 1.6, 3.1 * lines + 0.3), dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    spare = spare_colors(v.color for v in experiment.variants)
    colors = [variant.color or next(spare) for variant in experiment.variants]
    for axes, task in zip(grid, table.tasks, strict=False):
        _draw_task(axes, task, colors)
    for axes in grid[len(table.tasks) :]:
        axes.set_axis_off()
    grid[0].set_ylabel("share of right answers")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", edgecolor="none")
    save_picture(figure, out)


def _draw_task(axes: Any, task: TaskTable, colors: list[str]) -> None:
    sizes = list(task.rows[0].accuracy)
    for i, (row, color) in enumerate(zip(task.rows, colors, strict=True)):
        shares = list(row.accuracy.values())
        means = [share["mean"] or 0.0 for share in shares]
        low, high = ([_end(share, end) for share in shares] for end in ("low", "high"))
        axes.fill_between(sizes, low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot(sizes, means, color=color, marker="osD^vPX"[i % 7], markeredgecolor="white", label=row.label)
        for size, shares_of in row.by_seed.items():
            axes.plot([size] * len(shares_of), list(shares_of.values()), ".", color=color, markersize=3, alpha=0.6)
    axes.axvline(task.size, color="0.5", linewidth=0.9, linestyle=":")
    axes.plot(sizes, list(task.guess.values()), color="0.5", linewidth=0.9, linestyle="--")
    axes.set(title=task.name, xlabel=TASKS[task.kind].size, ylim=(-0.03, 1.05), xscale="log")
    axes.minorticks_off()
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.grid(color="0.92", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _end(share: Difference, end: str) -> float:
    """Return an end of an interval; the mean without an interval."""
    value = share["mean"] if share[end] is None else share[end]
    return value or 0.0
