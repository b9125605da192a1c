"""Table, verdicts and picture of an experiment with synthetic tasks."""

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class SyntheticRow:
    """Accuracy of one variant on one task."""

    name: str
    label: str
    parameters: int
    lr: float
    accuracy: dict[int, Difference]
    """Mean accuracy over seeds by size of the test, with the ends of its 95 % interval."""
    diverged: int
    """Number of seeds whose loss diverged."""


@dataclass(frozen=True)
class TaskTable:
    """Results of all variants on one task."""

    name: str
    kind: str
    size: int
    """Largest size of a training sequence."""
    answers: int
    """Number of different answers."""
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
        found: Results of all runs.
    """
    tasks = [_task_table(experiment, task, found[task.name]) for task in experiment.tasks]
    verdicts = [_judge(verdict, found[verdict.task]) for verdict in experiment.verdicts]
    return SyntheticTable(experiment.title, len(experiment.seeds), tasks, verdicts)


def _task_table(experiment: SyntheticExperiment, task: TaskSetting, found: dict[str, dict[int, Measured]]) -> TaskTable:
    rows = []
    for variant in experiment.variants:
        results = list(found[variant.name].values())
        accuracy = {n: _share([r.accuracy[str(n)] for r in results]) for n in task.tests}
        diverged = sum(r.loss is None for r in results)
        first = results[0]
        rows.append(SyntheticRow(variant.name, variant.heading, first.parameters, first.lr, accuracy, diverged))
    return TaskTable(task.name, task.kind, task.size, TASKS[task.kind].answers, rows)


def _share(values: list[float]) -> Difference:
    """Return the mean of shares with its 95 % interval, cut to the range from 0 to 1."""
    return {end: None if x is None else min(1.0, max(0.0, x)) for end, x in mean_interval(values).items()}


def _judge(verdict: TaskVerdict, found: dict[str, dict[int, Measured]]) -> TaskJudgement:
    better, worse = (
        {seed: result.accuracy[str(verdict.size)] for seed, result in found[name].items()}
        for name in (verdict.better, verdict.worse)
    )
    difference = paired_difference(worse, better)
    return TaskJudgement(verdict.claim, difference, verdict_word(difference))


def to_markdown(table: SyntheticTable) -> str:
    """Return the table as Markdown."""
    seeds = f"{table.seeds} seeds" if table.seeds > 1 else "one seed"
    parts = [
        f"# {table.title}",
        f"The figures are shares of right answers: means over {seeds}"
        + (", with 95 % intervals." if table.seeds > 1 else "."),
    ]
    for task in table.tasks:
        words = TASKS[task.kind].size
        half = " Only the second half of the answers of a sequence counts." if TASKS[task.kind].running else ""
        parts += [
            f"## {task.name}",
            f"Trained on up to {task.size} {words}. A guess is right with probability 1/{task.answers}.{half}",
        ]
        rows = [["variant", "parameters", "lr", *(f"{n} {words}" for n in task.rows[0].accuracy)]]
        for row in task.rows:
            label = row.label + (f" ({row.diverged} diverged)" if row.diverged else "")
            rows.append([label, f"{row.parameters:,}", f"{row.lr:g}", *map(share_words, row.accuracy.values())])
        parts.append(markdown_table(rows))
    if table.verdicts:
        rows = [["claim", "difference of the accuracies", "verdict"]]
        rows += [[v.claim, interval(v.difference), verdict_words(v.difference, table.seeds)] for v in table.verdicts]
        parts.append(markdown_table(rows, words=(0, 2)))
    return "\n\n".join(parts) + "\n"


def share_words(share: Difference) -> str:
    """Return a share with its interval as text, such as "0.981 (0.950 to 1.000)"."""
    spread = "" if share["low"] is None else f" ({share['low']:.3f} to {share['high']:.3f})"
    return f"{share['mean']:.3f}{spread}"


def draw_table(experiment: SyntheticExperiment, table: SyntheticTable, out: Path) -> None:
    """Draw the accuracy of each variant by size of the test, one diagram per task.

    A dotted line marks the largest size in training, and a dashed line the accuracy of a guess.

    Args:
        experiment: The experiment.
        table: The table of the experiment.
        out: Picture to write.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(table.tasks))
    lines = math.ceil(len(table.tasks) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 3.1 * lines + 0.3), dpi=150, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    spare = spare_colors(v.color for v in experiment.variants)
    colors = [variant.color or next(spare) for variant in experiment.variants]
    for axes, task in zip(grid, table.tasks, strict=False):
        _draw_task(axes, task, colors)
    for axes in grid[len(table.tasks) :]:
        axes.set_axis_off()
    grid[0].set_ylabel("share of right answers")
    grid[0].legend(edgecolor="none")
    save_picture(figure, out)


def _draw_task(axes: Any, task: TaskTable, colors: list[str]) -> None:
    sizes = list(task.rows[0].accuracy)
    for i, (row, color) in enumerate(zip(task.rows, colors, strict=True)):
        shares = list(row.accuracy.values())
        means = [share["mean"] or 0.0 for share in shares]
        low, high = ([_end(share, end) for share in shares] for end in ("low", "high"))
        axes.fill_between(sizes, low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot(sizes, means, color=color, marker="osD^vPX"[i % 7], markeredgecolor="white", label=row.label)
    axes.axvline(task.size, color="0.5", linewidth=0.9, linestyle=":")
    axes.axhline(1 / task.answers, color="0.5", linewidth=0.9, linestyle="--")
    axes.set(title=task.name, xlabel=TASKS[task.kind].size, ylim=(-0.03, 1.05), xscale="log")
    axes.minorticks_off()
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.grid(color="0.92", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _end(share: Difference, end: str) -> float:
    """Return an end of an interval; the mean without an interval."""
    value = share["mean"] if share[end] is None else share[end]
    return value or 0.0
