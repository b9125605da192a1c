"""Speed experiments: a training step of each variant at each context length, in turn, each in a fresh process.

OUT/experiment.json, measurements.json (grows; what stands in it is not measured again), table.json, table.md, speed.png
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from timemix.bench.measure import OUT_OF_MEMORY, measure_training
from timemix.errors import FileError, InUse
from timemix.experiments.spec import SpeedExperiment
from timemix.reporting.markdown import markdown_table
from timemix.reporting.plots import save_picture, spare_colors
from timemix.reporting.statistics import Difference, paired_difference, verdict_word
from timemix.runtime.device import choose_device
from timemix.storage.files import write_text
from timemix.storage.json_files import is_number, misfit, read_json
from timemix.storage.locks import claimed

# What a value of measurements.json holds.
_FAILED: dict[str, Callable[[Any], bool]] = {"error": lambda x: isinstance(x, str)}
_MEASURED: dict[str, Callable[[Any], bool]] = {
    "tokens_per_second": lambda x: is_number(x) and x > 0,
    "peak_memory": lambda x: x is None or (is_number(x) and x > 0),
}


def run_speed(
    experiment: SpeedExperiment, out: Path, say: Callable[[str], None], device: str = "auto"
) -> dict[str, Any]:
    """Measures what is not yet measured, writes the table and its picture, and returns the table.

    Variants take turns within a round, so that what else the machine does falls on all of them.
    Raises InUse where `out` holds another experiment, or another process measures into it.
    """
    choose_device(device)
    with claimed(out / ".lock") as mine:
        if not mine:
            raise InUse(f"another process is measuring into {out}")
        _check_folder(experiment, out)
        path = out / "measurements.json"
        found = read_json(path) if path.exists() else {}
        # What is damaged is measured again.
        found = {key: m for key, m in found.items() if misfit(m, _FAILED) is None or misfit(m, _MEASURED) is None}
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
                    # What failed for another reason than its size is measured again by the next call.
                    kept = {k: v for k, v in found.items() if v.get("error", OUT_OF_MEMORY) == OUT_OF_MEMORY}
                    write_text(path, json.dumps(kept, indent=1))
        table = build_table(experiment, found)
        write_text(out / "table.json", json.dumps(table, indent=1) + "\n")
        write_text(out / "table.md", to_markdown(table))
        if any("error" not in measured for measured in found.values()):
            _draw(experiment, table, out / "speed.png")
    return table


def _check_folder(experiment: SpeedExperiment, out: Path) -> None:
    path = out / "experiment.json"
    ours = json.loads(json.dumps(asdict(experiment)))
    if not path.exists():
        write_text(path, json.dumps(ours, indent=1))
        return
    theirs = read_json(path)
    differ = [n for n in ("variants", "ctx_lens", "tokens", "preset", "base", "vocab_size") if theirs.get(n) != ours[n]]
    if differ:
        raise FileError(f"{out} holds another experiment (different: {', '.join(differ)}); choose another folder")


def _words(measured: dict[str, Any]) -> str:
    if "error" in measured:
        return str(measured["error"])
    return f"{measured['tokens_per_second']:,.0f} tokens/s, {_mebibytes(measured['peak_memory'])}"


def _mebibytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


def build_table(experiment: SpeedExperiment, found: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, slopes, and verdicts at the longest context length.

    A slope is the exponent of ctx_len in the time of a step, or in its memory, fitted over the upper half of the
    lengths: at a constant number of tokens per step 0 is linear in the text, 1 quadratic.
    """
    rows = []
    for variant in experiment.variants:
        row: dict[str, Any] = {"name": variant.name, "label": variant.heading}
        for what, key in (("tokens_per_second", "tokens_per_second"), ("memory", "peak_memory")):
            row[what] = {t: [found[f"{variant.name} {t} {r}"].get(key) for r in range(experiment.rounds)]
                         for t in experiment.ctx_lens}  # fmt: skip
            middle = {t: median(values) for t, values in row[what].items()}
            row[f"{what}_slope"] = slope({t: v for t, v in middle.items() if v})
        rows.append(row)
    by_name = {row["name"]: row for row in rows}
    longest = max(experiment.ctx_lens)
    fails = {
        v.name: {found[f"{v.name} {longest} {r}"].get("error") for r in range(experiment.rounds)}
        for v in experiment.variants
    }
    verdicts = []
    for verdict in experiment.verdicts:
        better, worse = (_logarithms(by_name[name][verdict.of][longest]) for name in (verdict.better, verdict.worse))
        # Less memory is better, more speed is.
        difference = paired_difference(better, worse) if verdict.of == "memory" else paired_difference(worse, better)
        ratio: Difference | None = None
        if difference is not None:
            ratio = {k: None if v is None else math.exp(v) for k, v in difference.items()}
        word = verdict_word(difference)
        if better and fails[verdict.worse] == {OUT_OF_MEMORY}:
            word = "holds: the other runs out of memory"
        elif worse and fails[verdict.better] == {OUT_OF_MEMORY}:
            word = "does not hold: it runs out of memory"
        verdicts.append({"claim": verdict.claim, "at": longest, "ratio": ratio, "verdict": word})
    return {"title": experiment.title, "tokens": experiment.tokens, "variants": rows, "verdicts": verdicts}


def median(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def slope(points: dict[int, float]) -> float | None:
    """Exponent of a power law through the upper half of the points, None for fewer than two."""
    upper = sorted(points.items())[len(points) // 2 - (len(points) == 2) :]
    if len(upper) < 2:
        return None
    x, y = np.log([p[0] for p in upper]), np.log([p[1] for p in upper])
    return float(np.polyfit(x, y, 1)[0])


def _logarithms(values: list[float | None]) -> dict[int, float]:
    return {i: math.log(v) for i, v in enumerate(values) if v is not None}


def to_markdown(table: dict[str, Any]) -> str:
    """The table as a person reads it."""
    lengths = list(table["variants"][0]["memory"])
    parts = [
        f"# {table['title']}",
        f"{table['tokens']:,} tokens per step; medians. A slope is the exponent of ctx_len.",
    ]
    for what, heading, write, sign in (
        ("tokens_per_second", "tokens/s at ctx_len", lambda x: "-" if x is None else f"{x:,.0f}", -1),
        ("memory", "peak memory at ctx_len", _mebibytes, 1),
    ):
        rows = [[heading, *map(str, lengths), "slope" if what == "memory" else "slope of the time"]]
        for row in table["variants"]:
            power = row[f"{what}_slope"]
            cells = [write(median(row[what][t])) for t in lengths]
            rows.append([row["label"], *cells, "-" if power is None else f"{sign * power:.2f}"])
        parts.append(markdown_table(rows))
    if table["verdicts"]:
        rows = [["claim", "ratio", "verdict"]]
        rows += [
            [f"{v['claim']} (ctx_len {v['at']})", ratio_words(v["ratio"]), v["verdict"]] for v in table["verdicts"]
        ]
        parts.append(markdown_table(rows, words=(0, 2)))
    return "\n\n".join(parts) + "\n"


def ratio_words(ratio: Difference | None, unit: str = "") -> str:
    if ratio is None:
        return "-"
    spread = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{ratio['mean']:.2f}{unit}{spread}"


def _draw(experiment: SpeedExperiment, table: dict[str, Any], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.7), dpi=150, layout="constrained")
    speed, memory = figure.subplots(1, 2)
    spare = spare_colors(v.color for v in experiment.variants)
    for i, (variant, row) in enumerate(zip(experiment.variants, table["variants"], strict=True)):
        style: dict[str, Any] = {
            "color": variant.color or next(spare),
            "marker": "osD^vPX"[i % 7],
            "label": row["label"],
        }
        for axes, what, unit in ((speed, "tokens_per_second", 1), (memory, "memory", 2**20)):
            known = {t: m / unit for t, values in row[what].items() if (m := median(values)) is not None}
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
