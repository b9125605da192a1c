"""Measure the memory, the network traffic and the throughput of several processes on one machine.

python benchmarks/scale.py costs         memory and traffic of a step with 1, 2 and 4 processes and both strategies,
                                         beside the formulas of docs/explanation/parallelism.md
python benchmarks/scale.py throughput    speed of two processes with one thread each, and of one process with two
                                         threads, in alternation
python benchmarks/scale.py start         memory of 1, 2 and 4 processes that create, save and load a sharded model
python benchmarks/scale.py calculate     results of the formulas for 1 B and 10 B parameters on many GPUs

The script counts all traffic of the loopback interface, so run nothing else on the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

MIB = 2**20


def loopback_bytes() -> int:
    with open("/proc/net/dev", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.strip().startswith("lo:"))


def peak_memory() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def prepared(folder: Path) -> Path:
    from timemix.data.config import DataConfig
    from timemix.data.prepare import prepare

    if not (folder / "tokens").exists():
        prepare(folder / "tokens", DataConfig(source="builtin"))
    return folder / "tokens"


def worker(folder: Path, preset_name: str, strategy: str, batch_size: int, steps: int) -> None:
    """Train some steps, under torchrun or alone. Process 0 prints the largest measurements of all processes."""
    import torch
    import torch.distributed as dist

    from timemix.config.presets import preset
    from timemix.config.run import RunConfig
    from timemix.data.config import DataConfig
    from timemix.data.corpus import open_corpus
    from timemix.runtime.distributed import joined
    from timemix.training.start import resolved
    from timemix.training.trainer import Trainer

    with joined() as world:
        full = preset(preset_name)
        train = replace(full.train, batch_size=batch_size, strategy=strategy, device="cpu", precision="float32")
        corpus = open_corpus(folder / "tokens")
        config = resolved(RunConfig(full.model, DataConfig(source=str(folder / "tokens")), train), corpus)
        before = peak_memory()
        trainer = Trainer(config, folder, corpus, world=world)
        seconds = []
        for step in range(steps + 2):
            if step == 2:
                world.first_does(lambda: None)
                passed = loopback_bytes()
            start = time.perf_counter()
            trainer.train_step()
            seconds.append(time.perf_counter() - start)
        world.first_does(lambda: None)
        passed = loopback_bytes() - passed

        def local(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to_local() if hasattr(tensor, "to_local") else tensor

        parameters = list(trainer.model.parameters())
        held = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        held += [x for o in trainer.optimizers for state in o.state.values() for x in state.values()]
        measured = [sum(local(x).numel() * local(x).element_size() for x in held), peak_memory() - before]
        everyone = [measured]
        if world.size > 1:
            gathered = [torch.zeros(2, dtype=torch.float64) for _ in range(world.size)]
            dist.all_gather(gathered, torch.tensor(measured, dtype=torch.float64))
            everyone = [x.tolist() for x in gathered]
        if world.first:
            report = {
                "parameters": sum(p.numel() for p in parameters),
                "held": max(x[0] for x in everyone),
                "peak": max(x[1] for x in everyone),
                "bytes_per_step_and_process": passed / steps / world.size,
                "tokens_per_second": trainer.tokens_per_step / median(seconds[2:]),
            }
            print("RESULT " + json.dumps(report), flush=True)


def start_worker(folder: Path, layers: int, channels: int, vocab_size: int) -> None:
    """Create, save and load a sharded llama. Process 0 prints the largest memory growth of all processes."""
    import torch

    from timemix.config.run import RunConfig
    from timemix.models.registry import model_config
    from timemix.runs.folder import Progress
    from timemix.runtime.distributed import joined, own_part
    from timemix.tokenizers.character import ByteTokenizer
    from timemix.training.parallel import new_model
    from timemix.training.saving import Checkpoints, restore_training

    fields = {"layers": layers, "channels": channels, "heads": channels // 64, "vocab_size": vocab_size}
    config = model_config("llama", ctx_len=256, ffn_ratio=3.5, **fields)
    with joined() as world:
        # Any sharded program needs this memory: imports, connections, a small model.
        tiny = model_config("llama", layers=1, channels=64, heads=1, vocab_size=16, ctx_len=16)
        new_model(tiny, "shard", world, torch.device("cpu"), torch.float32)
        grown = [memory_now()]
        forget_peak()
        torch.manual_seed(1)
        model, _ = new_model(config, "shard", world, torch.device("cpu"), torch.float32)
        grown.append(peak_memory())
        forget_peak()
        tokenizer = ByteTokenizer()
        progress = Progress(step=0, seconds=0.0, valid_loss=None, valid_step=None)
        tensors = {"model": model.state_dict(), "training": {}}
        Checkpoints(folder, RunConfig(model=config), tokenizer, world, print).write(tensors, progress, go_on=False)
        grown.append(peak_memory())
        forget_peak()
        restore_training(folder / "checkpoints" / "step-00000000", model, [], world)
        grown.append(peak_memory())
        sizes = [4 * x.numel() for x in model.parameters()]
        shard = 4 * sum(own_part(x).numel() for x in model.parameters())
        values = [*(each - grown[0] for each in grown[1:]), shard]
        table = [[value if rank == world.rank else 0.0 for value in values] for rank in range(world.size)]
        flat = world.sum(*(value for row in table for value in row))
        create, save, load, held = (max(flat[i :: len(values)]) for i in range(len(values)))
        if world.first:
            report = {"whole": sum(sizes), "largest": max(sizes), "held": held}
            print("RESULT " + json.dumps(report | {"create": create, "save": save, "load": load}), flush=True)


def memory_now() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def forget_peak() -> None:
    """Reset the peak memory of this process to its current memory."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def start(layers: int, channels: int, vocab_size: int) -> None:
    print("| processes | parameters | whole, MiB | a shard | largest tensor | limit | create | save | load |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for n in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            got = launch_worker(n, 1, "start-worker", folder, layers, channels, vocab_size)
        limit = got["held"] + 4 * got["largest"]
        cells = (got["whole"], got["held"], got["largest"], limit, got["create"], got["save"], got["load"])
        print(f"| {n} | {got['whole'] // 4:,} | " + " | ".join(f"{x / MIB:,.0f}" for x in cells) + " |", flush=True)


def launch(folder: Path, processes: int, threads: int, *arguments: object) -> dict:
    return launch_worker(processes, threads, "worker", str(folder), *arguments)


def launch_worker(processes: int, threads: int, *arguments: object) -> dict:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [__file__, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        sys.exit(done.stderr)
    return json.loads(found[0].removeprefix("RESULT "))


def costs(folder: Path) -> None:
    print("| strategy | processes | held, MiB | 16 P or 16 P / n | peak, MiB | sent, MiB a step | formula |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    # Sharding gathers the weights twice and scatters the gradient once. gloo scatters with an all-reduce.
    for strategy, exchanges in (("replicate", 2), ("shard", 4)):
        for n in (1, 2, 4):
            got = launch(folder, n, 1, "seed", strategy, 4, 3)
            weights = 4 * got["parameters"]
            held = 4 * weights / (n if strategy == "shard" else 1)
            sent = exchanges * (n - 1) / n * weights
            print(
                f"| {strategy} | {n} | {got['held'] / MIB:.1f} | {held / MIB:.1f} | {got['peak'] / MIB:.0f}"
                f" | {got['bytes_per_step_and_process'] / MIB:.1f} | {sent / MIB:.1f} |",
                flush=True,
            )


def throughput(folder: Path, rounds: int) -> None:
    for name, batch_size in (("cpu-small", 12), ("cpu-small", 48), ("seed", 16)):
        steps = 4 if name == "seed" else 100
        pairs = []
        for _ in range(rounds):
            one = launch(folder, 1, 2, name, "replicate", batch_size, steps)["tokens_per_second"]
            two = launch(folder, 2, 1, name, "replicate", batch_size, steps)["tokens_per_second"]
            pairs.append((one, two))
        ratios = [two / one for one, two in pairs]
        one, two = np.median(pairs, axis=0)
        print(
            f"{name}, batch {batch_size}: one process of two threads {one:,.0f} tokens/s, two of one {two:,.0f};"
            f" ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def calculate() -> None:
    """Print the calculated costs of larger models. docs/explanation/parallelism.md lists the assumptions."""
    flops, tokens = 0.4 * 990e12, 16 * 1024
    print("| parameters | GPUs | replicate: GB | ms of traffic | shard: GB | ms of traffic | ms of computing |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for parameters, layers in ((1e9, 24), (10e9, 48)):
        for n in (8, 64, 512, 1024):
            bandwidth = 450e9 if n == 8 else 50e9
            replicate, shard = (k * (n - 1) / n * 4 * parameters / bandwidth * 1e3 for k in (2, 3))
            held = 16 * parameters / n + 2 * 4 * parameters / layers
            computing = 6 * parameters * tokens / flops * 1e3
            print(
                f"| {parameters / 1e9:.0f} B | {n} | {16 * parameters / 1e9:.0f} | {replicate:.0f}"
                f" | {held / 1e9:.1f} | {shard:.0f} | {computing:.0f} |"
            )


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        folder, name, strategy, batch_size, steps = sys.argv[2:]
        worker(Path(folder), name, strategy, int(batch_size), int(steps))
        return
    if sys.argv[1:2] == ["start-worker"]:
        folder, *sizes = sys.argv[2:]
        start_worker(Path(folder), *map(int, sizes))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("costs", "throughput", "start", "calculate"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=3, default=(16, 2048, 32768), metavar=("LAYERS", "CHANNELS", "VOCAB"))
    asked = parser.parse_args()
    if asked.what == "calculate":
        calculate()
        return
    if asked.what == "start":
        start(*asked.size)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared(Path(folder))
        if asked.what == "costs":
            costs(Path(folder))
        else:
            throughput(Path(folder), asked.rounds)


if __name__ == "__main__":
    main()
