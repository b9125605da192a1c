"""Compare state tuning, LoRA and the training of all weights on one book: loss, time, memory and saved size.

python benchmarks/tuning.py run FOLDER --data pgbooks_train.txt.xz --book pgbooks_valid.txt --begin 71392 --length 92440
python benchmarks/tuning.py table FOLDER

`run` first trains the model FOLDER/base on the text of --data. Each further run starts from this model and trains on
the book, of which the last tenth is held out. For each way of tuning, seed 1 chooses the learning rate of the lowest
held-out loss, and all seeds train at this rate. A stopped `run` continues with the unfinished runs. The result of each
run is in FOLDER/results. `table` prints all results. The times are comparable only if nothing else runs on the machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from timemix.reporting.markdown import markdown_table, mean_and_deviation
from timemix.runs.folder import best, checkpoints, read_progress
from timemix.runs.metrics import read_metrics

RATES = {
    "state": (1e-1, 3e-1, 1.0, 3.0, 10.0),
    "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "all": (3e-5, 1e-4, 3e-4, 1e-3),
}
"""Learning rates of each way of tuning. A best rate at an end of its list calls for a longer list."""
WAYS = {"state": "state", "lora": "LoRA, rank 8", "all": "all weights"}


def train(out: Path, *options: str) -> None:
    """Train a run to its end, from its newest checkpoint if it has begun."""
    begun = (out / "config.toml").exists()
    given = ["--resume", str(out)] if begun else ["--out", str(out), *options]
    subprocess.run([sys.executable, "-m", "timemix", "train", *given, "--quiet"], check=True)


def result(run: Path) -> dict[str, Any]:
    """Return what a finished run has measured."""
    lines = read_metrics(run)
    losses = {line["step"]: line["valid_loss"] for line in lines if line.get("valid_loss") is not None}
    progress = read_progress(checkpoints(run)[-1])
    return {
        "losses": losses,
        "best": min(losses.values()),
        "seconds_per_step": progress.seconds / max(1, progress.step),
        "memory": max(line["memory"] for line in lines if "memory" in line),
        "saved": (best(run) / "model.safetensors").stat().st_size,
    }


def measured(folder: Path, way: str, rate: float, seed: int, options: list[str]) -> dict[str, Any]:
    """Train the unfinished part of a run, and return its result."""
    name = f"{way}-{rate:g}-{seed}"
    path = folder / "results" / f"{name}.json"
    if not path.exists():
        own = ["--train.tune", way, "--train.lr", str(rate), "--train.lr-final", str(rate / 10)]
        train(folder / name, "--from", str(folder / "base"), *own, "--train.seed", str(seed), *options)
        path.parent.mkdir(exist_ok=True)
        found = {"way": way, "rate": rate, "seed": seed} | result(folder / name)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(f"{name}: {found['best']:.4f} nats", flush=True)
    return dict(found)


def run(asked: argparse.Namespace) -> None:
    """Train the unfinished runs."""
    folder = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    book = folder / "book.txt"
    text = asked.book.read_text(encoding="utf-8")
    book.write_text(text[asked.begin :][: asked.length], encoding="utf-8")
    model = {"arch": "rwkv7", "layers": asked.layers, "channels": asked.channels, "ctx-len": 256}
    options = [word for name, value in model.items() for word in (f"--model.{name}", str(value))]
    options += ["--model.heads", str(asked.channels // 64), "--data.tokenizer", "subword"]
    options += ["--train.steps", str(asked.base_steps), "--train.batch-size", "16", "--train.lr", "1e-3"]
    train(folder / "base", "--data", str(asked.data), *options)
    options = ["--data", str(book), "--train.steps", str(asked.steps), "--train.batch-size", "4"]
    options += [
        "--train.valid-every",
        str(max(1, asked.steps // 10)),
        "--train.log-every",
        "10",
        "--train.warmup",
        "0.05",
    ]
    options += ["--train.precision", "float32"]
    for way, rates in RATES.items():
        found = [measured(folder, way, rate, 1, options) for rate in rates[: asked.rates]]
        rate = min(found, key=lambda each: each["best"])["rate"]
        for seed in range(2, asked.seeds + 1):
            measured(folder, way, rate, seed, options)


def table(folder: Path) -> None:
    """Print the results at the best learning rate of each way of tuning."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "results").glob("*.json"))]
    rows = [["trained", "learning rate", "held-out loss", "best step", "s per step", "peak memory", "saved"]]
    curves = [["trained, seed 1"]]
    for way, words in WAYS.items():
        first = [each for each in results if each["way"] == way and each["seed"] == 1]
        if not first:
            continue
        rate = min(first, key=lambda each: each["best"])["rate"]
        own = sorted((each for each in results if (each["way"], each["rate"]) == (way, rate)), key=lambda r: r["seed"])
        lowest = [min(each["losses"], key=each["losses"].get) for each in own]
        rows.append(
            [
                words,
                f"{rate:g}",
                mean_and_deviation([each["best"] for each in own]),
                ", ".join(lowest),
                f"{statistics.median(each['seconds_per_step'] for each in own):.3f}",
                f"{max(each['memory'] for each in own) / 2**30:.2f} GiB",
                f"{own[0]['saved'] / 2**20:.2f} MiB",
            ]
        )
        curves[0] = ["trained, seed 1", *(f"step {step}" for step in own[0]["losses"])]
        curves.append([words, *(f"{loss:.4f}" for loss in own[0]["losses"].values())])
    print(markdown_table(rows), markdown_table(curves), sep="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    running = verbs.add_parser("run", help="train the unfinished runs")
    running.add_argument("folder", type=Path)
    running.add_argument("--data", type=Path, required=True, help="text of the base model")
    running.add_argument("--book", type=Path, required=True, help="text that contains the book")
    running.add_argument("--begin", type=int, default=0, help="first character of the book")
    running.add_argument("--length", type=int, default=2**31, help="number of characters of the book")
    running.add_argument("--layers", type=int, default=6)
    running.add_argument("--channels", type=int, default=256)
    running.add_argument("--base-steps", type=int, default=6000)
    running.add_argument("--steps", type=int, default=300, help="steps on the book")
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--rates", type=int, default=5, help="largest number of learning rates to try")
    verbs.add_parser("table", help="print the results").add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.verb == "run":
        run(asked)
    table(asked.folder)


if __name__ == "__main__":
    main()
