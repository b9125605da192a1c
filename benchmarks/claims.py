"""Run all experiments that come with timemix, and write tables, verdicts and pictures into docs/claims.md.

    python benchmarks/claims.py --data FOLDER [--out runs/claims] [--only heads top-a ...] [--write-only]

FOLDER contains pgbooks_small_train.txt.xz, pgbooks_valid.txt, zh_novels_train.txt.xz and zh_novels_valid.txt. The same
command resumes a stopped script. Training experiments run in two processes of one thread each, which is faster on two
cores than one process with two threads. The speed experiment runs in one process, while nothing else runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from timemix.experiments.spec import Experiment, SpeedExperiment, find_experiment, read_experiment
from timemix.experiments.speed import ratio_words
from timemix.reporting.markdown import markdown_table, with_blocks
from timemix.reporting.statistics import interval, paired_difference, verdict_word

ROOT = Path(__file__).parent.parent
# The order of the page. The speed experiment is second to last, when no training experiment runs.
NAMES = (
    "architectures",
    "activation",
    "normalization",
    "heads",
    "tables",
    "token-shift-en",
    "token-shift-zh",
    "token-shift-layers",
    "initial",
    "long-context",
    "top-a",
)
# The short table shows every verdict of these experiments, and the first verdict of each other experiment.
WHOLE = ("architectures", "long-context")
INSPECTED = ("rwkv1", "mha_shift", "mha_pro")


def run(name: str, data: Path, out: Path) -> None:
    """Run one experiment in the folder OUT/NAME.

    Args:
        name: Name of the experiment.
        data: Folder of the texts.
        out: Folder of all experiments.
    """
    experiment = read_experiment(find_experiment(name))
    text = "zh_novels_train.txt.xz" if name.endswith("-zh") else "pgbooks_small_train.txt.xz"
    valid = text.replace("_small", "").replace("_train.txt.xz", "_valid.txt")
    options = ["-m", "timemix", "compare", name, "--out", str(out / name)]
    environment = dict(os.environ)
    command = [sys.executable]
    if not isinstance(experiment, SpeedExperiment):
        options += ["--data", str(data / text), "--valid", str(data / valid)]
    if isinstance(experiment, Experiment):
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        options += ["--reuse", str(out)]
        environment["OMP_NUM_THREADS"] = "1"
    subprocess.run([*command, *options], check=True, env=environment)


def inspect(out: Path) -> None:
    """Measure the use of token-shift in the trained models of each architecture and seed; write OUT/inspect.json."""
    found: dict[str, dict[str, dict]] = {}
    seeds = read_experiment(find_experiment("architectures")).seeds
    for arch in INSPECTED:
        for seed in seeds:
            run_ = out / "architectures" / "variants" / arch / f"seed-{seed}"
            command = [sys.executable, "-m", "timemix", "inspect", str(run_), "--tokens", "8192", "--json"]
            report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found.setdefault(arch, {})[str(seed)] = {key: report[key] for key in ("loss", "projections")}
    (out / "inspect.json").write_text(json.dumps(found), encoding="utf-8")


def weights_rows(out: Path) -> list[list[str]]:
    """Return the rows of the table of claims about trained weights, with paired differences and verdicts."""
    found = json.loads((out / "inspect.json").read_text(encoding="utf-8"))

    def mean(arch: str, projection: str, what: str, layers: slice = slice(None)) -> dict[int, float]:
        """Return means over layers by seed: the share of the shifted channels, or the loss that their removal adds."""
        values = {}
        for seed, report in found[arch].items():
            rows = [r for r in report["projections"] if (r["half"], r["projection"]) == ("mixer", projection)]
            each = [r["share"] if what == "share" else r["loss_without_shifted"] - report["loss"] for r in rows]
            values[int(seed)] = sum(each[layers]) / len(each[layers])
        return values

    rows = [["claim", "difference", "verdict"]]
    for arch, low in (("mha_shift", "query"), ("mha_pro", "query"), ("rwkv1", "receptance")):
        letter = low[0].upper()
        claims = {
            "share": f"in {arch}, the shifted channels have a larger weight share in the projection V than in {letter}",
            "added": f"in {arch}, removing the shifted channels from the projection V adds more loss than removing"
            f" these channels from {letter}",
        }
        for what, claim in claims.items():
            gain = paired_difference(mean(arch, low, what), mean(arch, "value", what))
            rows.append([claim, interval(gain), verdict_word(gain)])
    for arch in INSPECTED:
        gain = paired_difference(mean(arch, "value", "share", slice(-1, None)), mean(arch, "value", "share", slice(1)))
        rows.append(
            [
                f"in {arch}, the shifted channels have a smaller weight share in the projection V of the last layer"
                " than of the first layer",
                interval(gain),
                verdict_word(gain),
            ]
        )
    return rows


def verdict_rows(name: str, out: Path) -> list[list[str]]:
    """Return the rows of the claims of an experiment as text: claim, gain and verdict."""
    table = json.loads((out / name / "table.json").read_text(encoding="utf-8"))
    return [[v["claim"], ratio_words(v["ratio"], "x") if "ratio" in v else interval(v["gain"]), v["verdict"]]
            for v in table["verdicts"]]  # fmt: skip


def blocks(out: Path) -> dict[str, str]:
    """Return the generated parts of docs/claims.md by name. A part is between `<!-- NAME -->` and `<!-- /NAME -->`."""
    found, summary, short = {}, [["claim", "better by", "verdict", "experiment"]], [["claim", "verdict"]]
    for name in NAMES:
        if not (out / name / "table.json").exists():
            summary.append([f"({name})", "-", "not run", f"[{name}](#{name})"])
            continue
        rows = verdict_rows(name, out)
        summary += [[*row, f"[{name}](#{name})"] for row in rows]
        short += [[row[0], row[2]] for row in (rows if name in WHOLE else rows[:1])]
        text = (out / name / "table.md").read_text(encoding="utf-8").partition("\n")[2].strip()
        found[name] = f"{text}\n\n{cost(name, out)}\n\n![{name}](claims-{name}.png)"
        pictures = [out / name / p for p in ("loss.png", "speed.png", "top-a.png")]
        shutil.copy(next(p for p in pictures if p.exists()), ROOT / "docs" / f"claims-{name}.png")
        if (position := out / name / "position.png").exists():
            shutil.copy(position, ROOT / "docs" / f"claims-{name}-position.png")
            found[name] += f"\n\n![{name} by position](claims-{name}-position.png)"
    if (out / "inspect.json").exists():
        rows = weights_rows(out)
        summary += [[*row, "[weights](#weights)"] for row in rows[1:]]
        short.append([rows[1][0], rows[1][2]])
        found["weights"] = markdown_table(rows, words=(0, 2)) + "\n\n![weights](claims-weights.png)"
        picture = out / "architectures/variants/mha_shift/seed-1/inspect/shift.png"
        shutil.copy(picture, ROOT / "docs" / "claims-weights.png")
    found["verdicts"] = markdown_table(summary, words=(0, 2, 3))
    found["short"] = markdown_table(short, words=(0, 1))
    return found


def cost(name: str, out: Path) -> str:
    """Return a sentence on the number and the total training time of the runs of an experiment."""
    results = [json.loads(p.read_text(encoding="utf-8")) for p in (out / name / "variants").glob("*/*/result.json")]
    trained = [r for r in results if "seconds" in r]
    if not results:
        return "The command `python benchmarks/claims.py` runs this experiment."
    minutes = sum(r["seconds"] for r in trained) / 60
    return (
        f"The {len(trained)} training runs of this experiment took {minutes:.0f} minutes of one processor core in"
        " total."
    )


def write(out: Path) -> None:
    """Replace the generated parts of docs/claims.md by new parts from the tables in the folder `out`."""
    path = ROOT / "docs" / "claims.md"
    path.write_text(with_blocks(path.read_text(encoding="utf-8"), blocks(out)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the texts")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder of the experiments")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="experiments to run; default: all")
    parser.add_argument("--write-only", action="store_true", help="write docs/claims.md from existing tables only")
    options = parser.parse_args()
    if not options.write_only:
        if options.data is None:
            parser.error("give the folder of the texts: --data FOLDER")
        for name in options.only:
            run(name, options.data, options.out)
        if "architectures" in options.only:
            inspect(options.out)
    write(options.out)


if __name__ == "__main__":
    main()
