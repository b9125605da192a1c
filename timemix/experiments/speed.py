"""Measure a training step of each variant at each context length, every measurement in a new process.

The folder OUT has experiment.json, measurements.json, table.json, table.md and speed.png. A resumed experiment does not
repeat the measurements in measurements.json.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from timemix.bench.measure import OUT_OF_MEMORY, StepFailure, StepSpeed, measure_training
from timemix.errors import FileError, InUse
from timemix.experiments.jobs import refuse_foreign
from timemix.experiments.measurements import saved_measurements
from timemix.experiments.spec import SpeedExperiment, SpeedVerdict
from timemix.experiments.variants import Variant
from timemix.reporting.markdown import markdown_table
from timemix.reporting.plots import save_picture, spare_colors
from timemix.reporting.statistics import Difference, paired_difference, verdict_word
from timemix.runtime.device import choose_device
from timemix.storage.files import write_text
from timemix.storage.json_files import read_json, to_json
from timemix.storage.locks import claimed

Measured = dict[str, StepSpeed | StepFailure]
"""Content of measurements.json. A key has the names of a variant, a context length and a round."""


@dataclass(frozen=True)
class SpeedRow:
    """All measurements of one variant."""

    name: str
    label: str
    tokens_per_second: dict[int, list[float | None]]
    """Speed by context length, one value per round, None for a failed step."""
    tokens_per_second_slope: float | None
    """Exponent b of the power law speed ~ ctx_len^b, fitted at the longer half of the context lengths."""
    memory: dict[int, list[float | None]]
    """Peak memory in bytes by context length, one value per round, None for a failed step."""
    memory_slope: float | None
    """Exponent b of the power law memory ~ ctx_len^b, fitted at the longer half of the context lengths."""

    def values(self, of: str) -> dict[int, list[float | None]]:
        """Return the field "tokens_per_second" or "memory"."""
        return self.memory if of == "memory" else self.tokens_per_second


@dataclass(frozen=True)
class SpeedJudgement:
    """A verdict at one context length, and the ratio from which the verdict follows."""

    claim: str
    at: int
    """Context length."""
    ratio: Difference | None
    """Ratio of two speeds or two memory sizes. A ratio above 1 supports the claim."""
    verdict: str


@dataclass(frozen=True)
class SpeedTable:
    """Results of a speed experiment, and content of table.json."""

    title: str
    tokens: int
    variants: list[SpeedRow]
    verdicts: list[SpeedJudgement]


def run_speed(experiment: SpeedExperiment, out: Path, say: Callable[[str], None], device: str = "auto") -> SpeedTable:
    """Run the missing measurements of an experiment, and write the table and the picture to a folder.

    The variants alternate within a round, so that other load on the machine affects all variants.

    Args:
        experiment: The experiment.
        out: Folder of the experiment.
        say: Function that prints a line of text for each measurement.
        device: PyTorch device.

    Returns:
        The table.

    Raises:
        InUse: Another process is working in the folder `out`.
        FileError: The folder `out` has another experiment, or a file is damaged or cannot be written.
        Unavailable: The machine lacks the device.
    """
    found_device, _ = choose_device(device)
    with claimed(out / ".lock") as mine:
        if not mine:
            raise InUse(f"another process is working in {out}; wait until it ends, or choose another folder")
        _check_folder(experiment, found_device.type, out)
        path = out / "measurements.json"
        found: Measured = saved_measurements(path, StepSpeed, StepFailure)
        for round_ in range(experiment.rounds):
            for ctx_len in experiment.ctx_lens:
                for variant in experiment.variants:
                    key = f"{variant.name} {ctx_len} {round_}"
                    if key in found:
                        continue
                    config = experiment.config(variant, ctx_len)
                    config = replace(config, train=replace(config.train, device=device))
                    found[key] = measure_training(config, steps=2)
                    say(f"{key}: " + _words(found[key]))
                    # Save only results and failures by lack of memory. The next call repeats all other failed
                    # measurements.
                    kept = {
                        k: m for k, m in found.items() if not (isinstance(m, StepFailure) and m.error != OUT_OF_MEMORY)
                    }
                    write_text(path, json.dumps({k: to_json(m) for k, m in kept.items()}, indent=1))
        table = build_table(experiment, found)
        write_text(out / "table.json", json.dumps(to_json(table), indent=1) + "\n")
        write_text(out / "table.md", to_markdown(table))
        if any(isinstance(measured, StepSpeed) for measured in found.values()):
            _draw(experiment, table, out / "speed.png")
    return table


def _check_folder(experiment: SpeedExperiment, device: str, out: Path) -> None:
    path = out / "experiment.json"
    ours = json.loads(json.dumps(asdict(experiment) | {"device": device}))
    if not path.exists():
        refuse_foreign(out)
        write_text(path, json.dumps(ours, indent=1))
        return
    # Earlier versions did not record the device.
    theirs = {"device": device} | read_json(path)
    fields = ("variants", "ctx_lens", "tokens", "preset", "base", "vocab_size", "device")
    differ = [name for name in fields if theirs.get(name) != ours[name]]
    if differ:
        raise FileError(f"{out} has another experiment (different: {', '.join(differ)}); choose another folder")


def _words(measured: StepSpeed | StepFailure) -> str:
    if isinstance(measured, StepFailure):
        return measured.error
    return f"{measured.tokens_per_second:,.0f} tokens/s, {_mebibytes(measured.peak_memory)}"


def _mebibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


def build_table(experiment: SpeedExperiment, found: Measured) -> SpeedTable:
    """Return the measurements, their slopes, and the verdicts at the longest context length.

    A slope is the exponent of ctx_len in a power law of the speed or the memory of a step. A step has the same number
    of tokens at every length. A slope of 0 therefore means that the cost of a sequence is linear in ctx_len. A slope of
    1 for memory, or -1 for speed, means that the cost of a sequence is quadratic in ctx_len.

    Args:
        experiment: The experiment.
        found: Measurements by variant, context length and round.
    """
    rows = {variant.name: _row(experiment, variant, found) for variant in experiment.variants}
    verdicts = [_judge(experiment, verdict, rows, found) for verdict in experiment.verdicts]
    return SpeedTable(experiment.title, experiment.tokens, list(rows.values()), verdicts)


def _row(experiment: SpeedExperiment, variant: Variant, found: Measured) -> SpeedRow:
    speed: dict[int, list[float | None]] = {t: [] for t in experiment.ctx_lens}
    memory: dict[int, list[float | None]] = {t: [] for t in experiment.ctx_lens}
    for t in experiment.ctx_lens:
        for round_ in range(experiment.rounds):
            measured = found[f"{variant.name} {t} {round_}"]
            speed[t].append(measured.tokens_per_second if isinstance(measured, StepSpeed) else None)
            memory[t].append(measured.peak_memory if isinstance(measured, StepSpeed) else None)
    return SpeedRow(variant.name, variant.heading, speed, _slope_of(speed), memory, _slope_of(memory))


def _slope_of(values: dict[int, list[float | None]]) -> float | None:
    return slope({t: middle for t, each in values.items() if (middle := median(each))})


def _judge(
    experiment: SpeedExperiment, verdict: SpeedVerdict, rows: dict[str, SpeedRow], found: Measured
) -> SpeedJudgement:
    longest = max(experiment.ctx_lens)

    def out_of_memory(name: str) -> bool:
        rounds = [found[f"{name} {longest} {r}"] for r in range(experiment.rounds)]
        return all(isinstance(m, StepFailure) and m.error == OUT_OF_MEMORY for m in rounds)

    better, worse = (_logarithms(rows[name].values(verdict.of)[longest]) for name in (verdict.better, verdict.worse))
    # Less memory and higher speed are better.
    difference = paired_difference(better, worse) if verdict.of == "memory" else paired_difference(worse, better)
    ratio: Difference | None = None
    if difference is not None:
        ratio = {k: None if v is None else math.exp(v) for k, v in difference.items()}
    word = verdict_word(difference)
    if better and out_of_memory(verdict.worse):
        word = f"holds: {rows[verdict.worse].label} runs out of memory"
    elif worse and out_of_memory(verdict.better):
        word = f"does not hold: {rows[verdict.better].label} runs out of memory"
    return SpeedJudgement(verdict.claim, longest, ratio, word)


def median(values: list[float | None]) -> float | None:
    """Return the median of the values that are not None, or None if all values are None."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def slope(points: dict[int, float]) -> float | None:
    """Fit a power law to the upper half of the points; return its exponent, None for fewer than two points."""
    upper = sorted(points.items())[len(points) // 2 - (len(points) == 2) :]
    if len(upper) < 2:
        return None
    x, y = np.log([p[0] for p in upper]), np.log([p[1] for p in upper])
    return float(np.polyfit(x, y, 1)[0])


def _logarithms(values: list[float | None]) -> dict[int, float]:
    return {i: math.log(v) for i, v in enumerate(values) if v is not None}


def to_markdown(table: SpeedTable) -> str:
    """Return the table as Markdown."""
    lengths = list(table.variants[0].memory)
    parts = [
        f"# {table.title}",
        f"A training step has {table.tokens:,} tokens at every ctx_len. The figures are medians over the rounds of"
        " measurement. A slope is the exponent of ctx_len in a power law that is fitted to the longer half of the"
        " context lengths.",
    ]
    for what, heading, write, sign in (
        ("tokens_per_second", "tokens/s at ctx_len", lambda x: "-" if x is None else f"{x:,.0f}", -1),
        ("memory", "peak memory at ctx_len", _mebibytes, 1),
    ):
        rows = [[heading, *map(str, lengths), "slope of the memory" if what == "memory" else "slope of the time"]]
        for row in table.variants:
            power = row.memory_slope if what == "memory" else row.tokens_per_second_slope
            cells = [write(median(row.values(what)[t])) for t in lengths]
            rows.append([row.label, *cells, "-" if power is None else f"{sign * power:.2f}"])
        parts.append(markdown_table(rows))
    if table.verdicts:
        rows = [["claim", "ratio", "verdict"]]
        rows += [[f"{v.claim} (ctx_len {v.at})", ratio_words(v.ratio), v.verdict] for v in table.verdicts]
        parts.append(markdown_table(rows, words=(0, 2)))
    return "\n\n".join(parts) + "\n"


def ratio_words(ratio: Difference | None, unit: str = "") -> str:
    """Return a ratio with its interval as text, such as "1.52 (1.40 to 1.63)", or "-" without a ratio."""
    if ratio is None:
        return "-"
    spread = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{ratio['mean']:.2f}{unit}{spread}"


def _draw(experiment: SpeedExperiment, table: SpeedTable, out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.7), dpi=150, layout="constrained")
    speed, memory = figure.subplots(1, 2)
    spare = spare_colors(v.color for v in experiment.variants)
    for i, (variant, row) in enumerate(zip(experiment.variants, table.variants, strict=True)):
        style: dict[str, Any] = {
            "color": variant.color or next(spare),
            "marker": "osD^vPX"[i % 7],
            "label": row.label,
        }
        for axes, what, unit in ((speed, "tokens_per_second", 1), (memory, "memory", 2**20)):
            known = {t: m / unit for t, values in row.values(what).items() if (m := median(values)) is not None}
            axes.plot(known.keys(), known.values(), markeredgecolor="white", **style)
    speed.set_ylabel("tokens per second")
    memory.set_ylabel("peak memory (MiB)")
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(experiment.ctx_lens, [str(t) for t in experiment.ctx_lens])
        axes.set_xlabel("context length (tokens)")
        axes.grid(color="0.92", linewidth=0.7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend(edgecolor="none")
    save_picture(figure, out)
