"""Compare RWKV of every year with attention: loss, tasks, speed. Write docs/family.md and its pictures.

    python benchmarks/family.py [--data FOLDER] [--out runs/family] [--only family recall ...] [--write-only]

FOLDER contains pgbooks_train.txt.xz and pgbooks_valid.txt. The tasks and the part "speed" need no text. The result of
each run is a JSON file in benchmarks/family/. The script trains only the runs without a file, also in a fresh clone. To
work in parts, stop it after some time: `timeout 90m make family DATA=FOLDER`. The part "speed" needs a machine on which
nothing else runs, and is measured again only with `--only speed`. The page is written after each part.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from timemix.bench.measure import StepFailure, measure_training
from timemix.bench.race import Contender, machine_now, race
from timemix.bench.sample import standing
from timemix.experiments.spec import Experiment, find_experiment, read_experiment
from timemix.experiments.synthetic import finished_table
from timemix.experiments.synthetic_report import SyntheticTable, task_rows, warnings
from timemix.experiments.synthetic_spec import SyntheticExperiment
from timemix.generation.decode import Step, build_step
from timemix.models.language_model import LanguageModel
from timemix.reporting.markdown import markdown_table, mean_and_deviation, with_blocks
from timemix.reporting.plots import save_picture
from timemix.reporting.statistics import Difference, interval, mean_interval, verdict_words
from timemix.storage.files import write_text
from timemix.storage.json_files import read_json, to_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "family"
PAGE = ROOT / "docs" / "family.md"
LOSSES = ("family", "family-subword", "family-time", "family-128", "family-512", "family-ideas")
TASKS = ("recall", "state-tracking", "copy")
NAMES = (*LOSSES, *TASKS, "speed")
SPEED = RESULTS / "speed.json"
POSITIONS = (100, 10_000)
DECODED = 256
"""Number of consecutive tokens of a measurement of decoding."""
ROUNDS = 5
VOCAB_SIZE = 79
# In the order of the picture
YEARS = {
    "mha_rotary": "attention\nof 2021",
    "llama": "Llama\n2023",
    "rwkv1": "RWKV\n2021",
    "rwkv4": "RWKV-4\n2022",
    "rwkv5": "RWKV-5\n2023",
    "rwkv6": "RWKV-6\n2024",
    "rwkv7": "RWKV-7\n2025",
}
# Task, setting and size of the test that a panel of the picture shows
SHOWN_TASKS = (
    ("recall", "recall-64", 32, "recall of 32 pairs, 64 channels"),
    ("state-tracking", "mod5", 64, "sums modulo 5, twice the trained length"),
)


def run(name: str, data: Path, out: Path) -> None:
    """Train the unfinished runs of an experiment.

    Args:
        name: Name of the experiment.
        data: Folder of the texts.
        out: Folder of all comparisons.
    """
    # Two processes of one thread each are faster on two cores than one process with two threads.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if name in TASKS:
        command = [sys.executable, "-m", "timemix", "compare", name, "--out", str(RESULTS / name)]
        both = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
        codes = [process.wait() for process in both]
        if any(codes):
            raise SystemExit(f"{name} failed or was stopped; the same command resumes it")
        return
    results = RESULTS / name
    options = ["compare", name, "--out", str(out / name), "--results", str(results), "--reuse", str(RESULTS)]
    options += ["--data", str(data / "pgbooks_train.txt.xz"), "--valid", str(data / "pgbooks_valid.txt")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "timemix"]
    subprocess.run([*command, *options], check=True, env=environment, stdout=subprocess.DEVNULL)
    table = read_json(out / name / "table.json")
    for row in table["variants"]:
        # The files of the runs have these losses too.
        row.pop("by_position", None)
    write_text(results / "table.json", json.dumps(table, indent=1) + "\n")


def decoding(name: str, step: Step, model: LanguageModel, position: int) -> Contender:
    """Return a contender that decodes DECODED tokens from a position. The sums over the past of `rwkv1` count."""
    state, places, tokens = standing(model, 1, position), torch.tensor([0]), torch.tensor([0])

    def call() -> None:
        nonlocal state
        state.position.fill_(position)
        for _ in range(DECODED):
            _, state = step(tokens, state, places)

    return Contender(name, call, DECODED)


def measure_speed() -> None:
    """Measure training steps and decoding of all variants in alternation, and write SPEED."""
    experiment = read_experiment(find_experiment("family"))
    assert isinstance(experiment, Experiment)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, list[float]] = {v.name: [] for v in experiment.variants}
    for _ in range(ROUNDS):
        for variant in experiment.variants:
            config = experiment.config(variant, experiment.points_of(variant)[0], 1)
            measured = measure_training(replace(config, model=replace(config.model, vocab_size=VOCAB_SIZE)), steps=4)
            if isinstance(measured, StepFailure):
                raise SystemExit(f"a training step of {variant.name} failed: {measured.error}")
            steps[variant.name].append(measured.tokens_per_second)
            found[variant.name] = {"training_memory": measured.peak_memory}
    contenders: list[Contender] = []
    for variant in experiment.variants:
        model = replace(experiment.config(variant, {}, 1).model, vocab_size=VOCAB_SIZE, ctx_len=16_384)
        torch.manual_seed(0)
        ours = LanguageModel(model).eval()
        step = build_step(ours)
        state = ours.init_state(1)
        found[variant.name] |= {
            "training": statistics.median(steps[variant.name]),
            "compiled": step.compiled,
            "state_bytes": state.nbytes,
        }
        contenders += [decoding(f"{variant.name} {p}", step, ours, p) for p in POSITIONS]
    for row in race(contenders, 3.0, torch.device("cpu"), lambda line: print(line, file=sys.stderr)):
        name, position = row.name.split()
        if row.seconds is None:
            raise SystemExit(f"{row.name}: {row.withheld}")
        found[name][f"decoding_{position}"] = DECODED / row.seconds
    content = {"machine": to_json(machine_now(torch.device("cpu"))), "variants": found}
    write_text(SPEED, json.dumps(content, indent=1) + "\n")


def table_of(name: str) -> dict[str, Any] | None:
    """Return the table of a comparison of losses; None if it was not run."""
    path = RESULTS / name / "table.json"
    return read_json(path) if path.exists() else None


def accuracies_of(name: str) -> SyntheticTable:
    """Return the table of the finished tasks of an experiment."""
    experiment = read_experiment(find_experiment(name))
    assert isinstance(experiment, SyntheticExperiment)
    return finished_table(experiment, RESULTS / name)


def loss_block(table: dict[str, Any]) -> str:
    """Return the losses of an experiment as a Markdown table."""
    rows = [
        ["architecture", "parameters", "lr", "seeds", "held-out loss (nats/token)", "difference from the first row"]
    ]
    for row in table["variants"]:
        chosen = row["chosen"] or {}
        lr = f"{chosen['train.lr']:g}" if "train.lr" in chosen else "-"
        losses = row["valid_losses"]
        parameters = "-" if row["parameters"] is None else f"{row['parameters']:,}"
        rows.append(
            [row["label"], parameters, lr, str(len(losses)), mean_and_deviation(losses.values()),
             interval(row.get("difference"))]
        )  # fmt: skip
    return markdown_table(rows)


def verdict_rows(name: str, verdicts: list[tuple[str, Difference | None, int]]) -> list[list[str]]:
    """Return the claims that have results: claim, difference and its unit, verdict, name of the experiment.

    Args:
        name: Name of the experiment.
        verdicts: The claims, each with its difference and the number of its pairs of runs.
    """
    unit = "share" if name in TASKS else "nats/subword" if name == "family-subword" else "nats/character"
    return [
        [claim, interval(gain), unit, verdict_words(gain, pairs), f"[{name}](#{name})"]
        for claim, gain, pairs in verdicts
        if gain is not None
    ]


def task_block(table: SyntheticTable) -> str:
    """Return the accuracies of an experiment, one Markdown table for each task."""
    parts = []
    for task in table.tasks:
        parts += [f"`{task.name}`, trained on sizes up to {task.size}:", markdown_table(task_rows(task, digits=2))]
    if said := warnings(table):
        parts.append("\n".join(f"- {each}" for each in said))
    return "\n\n".join(parts)


def speed_block(found: dict[str, Any]) -> str:
    """Return the speeds as a Markdown table."""
    rows = [
        ["architecture", "training: tokens/s", "training: memory", *(f"decoding at {p:,}" for p in POSITIONS), "state"]
    ]
    for name, each in found["variants"].items():
        rows.append(
            [
                name,
                f"{each['training']:,.0f}",
                "-" if each["training_memory"] is None else f"{each['training_memory'] / 2**20:,.0f} MiB",
                *(f"{each[f'decoding_{p}']:,.0f} tokens/s" for p in POSITIONS),
                f"{each['state_bytes'] / 2**10:,.0f} KiB",
            ]
        )
    return markdown_table(rows)


def hours_block() -> str:
    """Return the number and the time of the finished runs of each part as a Markdown table."""
    rows, counted = [["part", "runs", "hours of runs"]], set[str]()
    # The runs of an unfinished part are not counted.
    for name in (*(each for each in LOSSES if table_of(each) is not None), *TASKS):
        paths = [p for p in sorted((RESULTS / name).glob("*.json")) if p.name != "table.json"]
        found = [(p, read_json(p)) for p in paths]
        # A run of an earlier part has the same key there, and is not trained again.
        seconds = {each.get("key", str(p)): each["seconds"] for p, each in found if "seconds" in each}
        new = [each for key, each in seconds.items() if key not in counted]
        counted |= seconds.keys()
        if new:
            rows.append([f"[{name}](#{name})", str(len(new)), f"{sum(new) / 3600:.1f}"])
    return markdown_table(rows)


def draw(path: Path) -> bool:
    """Draw loss, recall, state tracking and decoding speed of each architecture. Return whether there is a result."""
    from matplotlib.figure import Figure

    experiment = read_experiment(find_experiment("family"))
    colors = {v.name: v.color for v in experiment.variants}
    panels: list[tuple[str, str, dict[str, Any], float | None]] = []
    if table := table_of("family"):
        losses = {
            r["name"]: mean_interval(list(r["valid_losses"].values())) for r in table["variants"] if r["valid_losses"]
        }
        panels.append(("held-out loss", "nats per character (lower is better)", losses, None))
    for name, task, size, title in SHOWN_TASKS:
        for found in (each for each in accuracies_of(name).tasks if each.name == task):
            shares = {row.name: row.accuracy[size] for row in found.rows}
            panels.append((title, "share of right answers", shares, found.guess[size]))
    if SPEED.exists():
        speeds = read_json(SPEED)["variants"]
        values = {n: {"mean": each["decoding_10000"], "low": None, "high": None} for n, each in speeds.items()}
        panels.append(("decoding after 10,000 tokens", "tokens/s on two cores", values, None))
    if not panels:
        return False
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * lines), dpi=120, layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (title, unit, values, guess) in zip(places, panels, strict=False):
        if guess is not None:
            axes.axhline(guess, color="0.6", linewidth=1, linestyle="--")
            # Between two dots
            axes.annotate("a guess", (1.5, guess), fontsize=7, color="0.4", ha="center", va="top")
        for x, name in enumerate(YEARS):
            if name in values:
                each = values[name]
                ends = None if each["low"] is None else [[each["mean"] - each["low"]], [each["high"] - each["mean"]]]
                axes.errorbar(x, each["mean"], yerr=ends, color=colors[name], marker="o", markersize=6, capsize=4)
        axes.set_xticks(range(len(YEARS)), list(YEARS.values()), fontsize=7)
        axes.set_xlim(-0.5, len(YEARS) - 0.5)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(color="0.92", linewidth=0.7, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    save_picture(figure, path)
    return True


def _not_run(options: str) -> str:
    return f"This part was not run yet. The command is `python benchmarks/family.py --only {options}`."


def blocks() -> dict[str, str]:
    """Return the generated parts of docs/family.md by name. A part is between `<!-- NAME -->` and `<!-- /NAME -->`."""
    found, claims = {}, [["claim", "better by", "unit", "verdict", "experiment"]]
    for name in LOSSES:
        table = table_of(name)
        found[name] = _not_run(f"{name} --data FOLDER") if table is None else loss_block(table)
        if table is not None:
            # The first tables lack the number of pairs, and no run of them failed.
            verdicts = [(v["claim"], v["gain"], v.get("pairs", len(table["seeds"]))) for v in table["verdicts"]]
            claims += verdict_rows(name, verdicts)
    for name in TASKS:
        accuracies = accuracies_of(name)
        found[name] = task_block(accuracies) if accuracies.tasks else _not_run(name)
        claims += verdict_rows(name, [(v.claim, v.difference, accuracies.seeds) for v in accuracies.verdicts])
    found["verdicts"] = markdown_table(claims, words=(0, 2, 3, 4))
    found["hours"] = hours_block()
    if SPEED.exists():
        found["speed"] = speed_block(read_json(SPEED))
    return found


def write(out: Path) -> None:
    """Replace the generated parts of docs/family.md, and its pictures."""
    write_text(PAGE, with_blocks(PAGE.read_text(encoding="utf-8"), blocks()))
    draw(ROOT / "docs" / "family.png")
    if (position := out / "family" / "position.png").exists():
        shutil.copy(position, ROOT / "docs" / "family-position.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the texts")
    parser.add_argument("--out", type=Path, default=Path("runs/family"), help="folder of the comparisons")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="parts to run; default: all")
    parser.add_argument("--write-only", action="store_true", help="write docs/family.md from the results only")
    options = parser.parse_args()
    if options.write_only:
        write(options.out)
        return
    names = options.only or NAMES
    if options.data is None and set(names) & set(LOSSES):
        parser.error("give the folder of the texts: --data FOLDER")
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        if name != "speed":
            run(name, options.data, options.out)
        elif options.only or not SPEED.exists():
            measure_speed()
        write(options.out)


if __name__ == "__main__":
    main()
