"""Run all tests and measurements on a GPU, one stage per command, in less than 9 minutes per stage.

python benchmarks/gpu.py --stage a             tests that compare the GPU with the CPU
python benchmarks/gpu.py --stage c --data DIR  the published experiment: loss curves of four architectures
python benchmarks/gpu.py --stage b             training steps and the op, beside attention and a Llama
python benchmarks/gpu.py --stage d             generation

Run stage a first: if its tests fail, no speed figure is valid. After every part, a stage writes STAGE.json in the
folder --out. A stopped stage resumes after the finished parts in STAGE.json. `--toy` runs the same code with tiny
models on the CPU.

Predictions for an H100 or H200 (790 TFLOP/s in bfloat16; 3.3 or 4.8 TB/s):

a  60 s. The models are tiny, so start-up and compiling take all of the time.
b  360 s: 60 s of compiling for each of three lengths, 120 s of compiling for the large size, 15 s for each race.
   17 M parameters, 16,384 tokens: 6 N D = 1.8 TFLOP = 2.2 ms; about 10 GB of memory traffic = 2 to 3 ms. Memory
   limits products with 512 channels to 25 % of the peak.
   24 x 1024, 302 M parameters, 16,384 tokens: 30 TFLOP = 38 ms at the peak, 95 ms at 40 % of it.
c  450 s: 7,813 steps of 12 ms (rwkv1), 9 ms (mha_rotary, mha_shift), 18 ms (mha_pro), compiling 20 to 40 s each.
d  60 s. 17 M parameters in float32 are 69 MB, 15 us per step; launching about 400 single kernels takes 4 ms.
   As a CUDA graph, these kernels take 2 to 3 us each, so about 1 ms per step. The graph reads all 256 positions.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

COLORS = {"rwkv1": "red", "mha_rotary": "gray", "mha_shift": "green", "mha_pro": "black"}
"""Colours of the published figure."""
ARCHITECTURES = tuple(COLORS)
PUBLISHED = {"rwkv1": 1.00, "mha_rotary": 1.05, "mha_shift": 1.01, "mha_pro": 0.993}
"""Final smoothed training losses in the published figure, for the text simplebooks-92."""


class Record:
    """The JSON file of a stage, with the machine and the results of finished parts."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"machine": machine(device)}

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Return the result of a part, and run the part first if the file has no result."""
        if name not in self.content:
            print(f"{name} ...", flush=True)
            start = time.perf_counter()
            found = work()
            self.content[name] = found
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        return self.content[name]


def machine(device: str) -> dict[str, str]:
    """Return the name of the device, the versions of the software and the date."""
    import torch

    from timemix._version import __version__

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": name,
        "torch": str(torch.__version__),
        "timemix": __version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_tests(record: Record, device: str) -> None:
    """Run the tests marked `cuda`."""

    def tests() -> dict[str, Any]:
        # -p no:benchmark: the plugin benchmark warns if xdist is installed, and the tests treat warnings as errors.
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "cuda"]
        log = record.path.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            done = subprocess.run(
                [*command, "--show-capture=no", "--tb=short", "tests/test_device.py", "tests/generation/test_graph.py"],
                env=os.environ | {"TIMEMIX_TEST_DEVICE": device},
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
            )
        lines = log.read_text().splitlines()
        print("\n".join(lines[-30:]))
        return {"passed": done.returncode == 0, "summary": lines[-1] if lines else "", "failed": _failed(lines)}

    record.part("tests", tests)


def _failed(lines: list[str]) -> list[str]:
    return [line.partition(" ")[2] for line in lines if line.startswith("FAILED ")]


def train_published(record: Record, device: str, data: Path, work: Path, toy: bool, seeds: list[int]) -> None:
    """Train the architectures of the published figure: 17.2 M and 18.5 M parameters, 128 M tokens each."""
    import torch

    from timemix.config.presets import preset
    from timemix.data.config import DataConfig
    from timemix.data.corpus import is_corpus
    from timemix.data.prepare import prepare
    from timemix.runs.metrics import read_metrics
    from timemix.training.train import train

    def trained(arch: str, seed: int) -> dict[str, Any]:
        config = preset("seed", arch)
        changes: dict[str, Any] = {"device": device, "seed": seed, "valid_every": 1000, "save_every": 10**6}
        if toy:
            config = replace(config, model=config.model.tiny())
            changes |= {"steps": 4, "batch_size": 4, "valid_every": 2, "log_every": 1}
        out = work / f"{arch}-{seed}"
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loaded = train(config, out, data=str(work / "tokens"), train=changes, resume=False)
        rows = read_metrics(out)
        # The loss of a single step is noisy, so the record has means of 100 steps.
        losses = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
        speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None]
        return {
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "wall_seconds": time.perf_counter() - start,
            "training_seconds": rows[-1]["seconds"],
            "tokens_per_second": statistics.median(speeds),
            "memory": rows[-1].get("memory"),
            "losses": thinned(losses, 10),
            "valid": [(row["step"], row["valid_loss"]) for row in rows if row.get("valid_loss") is not None],
            "smoothed": sum(loss for _, loss in losses[-50:]) / len(losses[-50:]),
            "published": PUBLISHED[arch],
        }

    if not is_corpus(work / "tokens"):
        prepare(work / "tokens", DataConfig(source=str(data / "train.txt"), valid=str(data / "valid.txt")))
    for seed in seeds:
        for arch in ARCHITECTURES:
            found = record.part(f"{arch} seed {seed}", lambda arch=arch, seed=seed: trained(arch, seed))
            print(
                f"{arch}: smoothed {found['smoothed']:.4f}, held-out {found['valid'][-1][1]:.4f},"
                f" {found['training_seconds']:.0f} s, {found['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )


def draw_published(record: Record, out: Path) -> None:
    """Draw the loss curves of stage c in the colours of the published figure."""
    from timemix.reporting.plots import plot_bands

    with tempfile.TemporaryDirectory() as folder:
        groups: dict[str, list[Path]] = {}
        for name, found in record.content.items():
            if name == "machine":
                continue
            run = Path(folder) / name
            run.mkdir()
            rows = [{"step": step, "loss": loss} for step, loss in found["losses"]]
            rows.append({"step": rows[-1]["step"] + 1, "valid_loss": found["valid"][-1][1]})
            for row in rows:
                row |= {"tokens": row["step"] * 64 * 256, "seconds": row["step"]}
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            groups.setdefault(name.partition(" ")[0], []).append(run)
        title = f"training loss, one {record.content['machine']['device']}; held-out loss at the right edge"
        plot_bands(groups, out, colors=COLORS, title=title)


def thinned(points: list[tuple[int, float]], every: int) -> list[tuple[int, float]]:
    """Return the mean of every group of `every` points, at the last step of the group."""
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    return [(group[-1][0], round(sum(loss for _, loss in group) / len(group), 5)) for group in groups]


def race_training(record: Record, device: str, toy: bool) -> None:
    """Time training steps of the published size at each length, training steps of a large model, and the op alone."""
    from timemix.bench.op import bench_op
    from timemix.bench.train import bench_train
    from timemix.config.presets import preset
    from timemix.models.registry import model_config
    from timemix.storage.json_files import to_json

    def say(line: str) -> None:
        print(f"  {line}", flush=True)

    seed = preset("seed")
    train = replace(seed.train, device=device, compile="on" if device == "cuda" else "off")
    tokens, lengths = (64, (16, 32)) if toy else (16384, (256, 2048, 8192))
    seconds = 0.01 if toy else 0.5
    for ctx_len in lengths:
        model = replace(seed.model.tiny() if toy else seed.model, ctx_len=ctx_len, vocab_size=65)
        sizes = replace(train, batch_size=tokens // ctx_len)
        record.part(
            f"train {ctx_len}",
            lambda model=model, sizes=sizes: to_json(bench_train(model, sizes, seconds=seconds, say=say)),
        )
    record.part(
        "op",
        lambda: to_json(
            bench_op(
                ctx_lens=(8, 17) if toy else (256, 1024, 2048, 4096, 8192),
                batch_size=2 if toy else 8,
                heads=2 if toy else 8,
                channels=16 if toy else 512,
                seconds=0.01 if toy else 0.3,
                device=device,
                say=say,
            )
        ),
    )
    large = model_config("rwkv1", layers=24, heads=16, channels=1024, ctx_len=2048, ffn_ratio=3.0, vocab_size=65)
    record.part(
        "train 24 x 1024",
        lambda: to_json(
            bench_train(
                large.tiny() if toy else large, replace(train, batch_size=2 if toy else 8), seconds=seconds, say=say
            )
        ),
    )


def generate_by_batch(record: Record, device: str, toy: bool) -> None:
    """Time the generation of the engine for each number of active requests."""
    import torch

    from timemix.config.presets import preset
    from timemix.generation.engine import Engine
    from timemix.generation.request import Request
    from timemix.models.language_model import LanguageModel

    def speed(arch: str, rows: int) -> dict[str, float]:
        torch.manual_seed(0)
        config = preset("seed", arch).model
        model = LanguageModel(config.tiny() if toy else config).to(device).eval()
        tokens = 4 if toy else 100
        engine = Engine(model, slots=rows)
        for i in range(rows):
            engine.add(Request([1, 2, 3], tokens, sample=i))
        for _ in range(2 if toy else 20):
            engine.step()
        start, made = time.perf_counter(), 0
        while engine.busy:
            made += len(engine.step())
        seconds = time.perf_counter() - start
        return {"tokens_per_second": made / seconds, "step_seconds": seconds / (made / rows)}

    for arch in ("rwkv1", "mha_rotary"):
        for rows in (1, 2) if toy else (1, 8, 32, 128):
            found = record.part(f"{arch} {rows}", lambda arch=arch, rows=rows: speed(arch, rows))
            print(f"  {arch}, {rows} rows: {found['tokens_per_second']:,.0f} tokens/s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices="acbd", action="append", help="stage, may be repeated; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the JSON files")
    parser.add_argument("--data", type=Path, help="folder with train.txt and valid.txt, for stage c")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of stage c")
    parser.add_argument("--draw", type=Path, help="path of a picture with the loss curves of stage c")
    parser.add_argument("--toy", action="store_true", help="use tiny models on the CPU")
    asked = parser.parse_args(arguments)
    device = "cpu" if asked.toy else "cuda"
    for stage in asked.stage or "acbd":
        record = Record(asked.out / f"{stage}.json", device)
        if stage == "a":
            run_tests(record, device)
        elif stage == "b":
            race_training(record, device, asked.toy)
        elif stage == "c":
            if asked.data is None:
                parser.error("stage c needs --data, a folder with train.txt and valid.txt")
            train_published(record, device, asked.data, asked.out / "runs", asked.toy, asked.seeds)
            if asked.draw is not None:
                draw_published(record, asked.draw)
        else:
            generate_by_batch(record, device, asked.toy)


if __name__ == "__main__":
    main()
