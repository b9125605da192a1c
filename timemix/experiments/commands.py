"""The verbs compare, inspect, plot and bench: their options, and what they print."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from timemix.arguments import parse, preset_of
from timemix.config.presets import preset
from timemix.config.run import RunConfig, TrainConfig
from timemix.errors import UserError, nearest
from timemix.experiments.experiment import (
    AnyExperiment,
    Experiment,
    SpeedExperiment,
    Variant,
    find_experiment,
    read_experiment,
    shipped,
    with_data,
)
from timemix.models.config import ARCHITECTURES, ModelConfig
from timemix.storage.files import write_text

if TYPE_CHECKING:
    from timemix.experiments.compare import Job
    from timemix.training.trainer import Watch


GRID = {"train": {"lr": [2e-3, 4e-3, 8e-3]}, "model": {"initial": ["original", "zero"]}}
SEED_COLORS = {"rwkv1": "red", "rwkv1_exp": "orange", "mha_rotary": "gray", "mha_pro": "black", "mha_shift": "green"}


@dataclass(frozen=True)
class CompareArguments:
    """Train variants on the same batches, each at its best learning rate, and say which learns better.

    Name an experiment file (.toml), one that comes with timemix, or architectures:
    timemix compare --arch rwkv1 mha_rotary --data FILE --out DIR. Called again, it goes on where it was. Runs are
    spread over processes by torchrun: torchrun --nproc-per-node 2 -m timemix compare ...
    """

    experiment: tyro.conf.Positional[str | None] = None
    """Experiment file, or the name of one that comes with timemix."""
    arch: tuple[str, ...] = ()
    """Architectures to compare, instead of a file."""
    out: Path | None = None
    """Folder of the comparison; None: runs/ and the name of the experiment."""
    data: str | None = None
    """Training text: as `train --data`; None: what the file says, else `builtin`."""
    valid: str | None = None
    """Validation text; None: what the file says, else the end of the training text."""
    seeds: int | None = None
    """Run seeds 1 to this number; None: what the file says, else 1 to 3."""
    tokens: int | None = None
    """Training tokens of every run; None: what the file says, else 1.5 million."""
    size: str = "cpu-small"
    """Preset that gives the architectures of --arch their size."""
    tune: bool = True
    """With --arch: choose learning rate and initial values of each first, by 6 runs with seed 0."""
    reuse: Path | None = None
    """Folder of other comparisons' folders: a run that one of them has finished, same config and tokens, is copied."""
    device: str = "auto"
    """cpu, cuda ...; auto: cuda where there is one, under torchrun each process its own."""
    json: bool = False
    """Print the table as one JSON object."""


@dataclass(frozen=True)
class PlotArguments:
    """Draw the loss curves of runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path | None = None
    """PNG or SVG to write; None: loss.png in the first run."""
    x: Literal["tokens", "steps", "seconds"] = "tokens"
    """Horizontal axis."""
    smoothing: float = 0.03
    """Width of the Gaussian over the training loss, as a share of its points; 0: none."""
    title: str | None = None
    """Heading of the picture."""


@dataclass(frozen=True)
class InspectArguments:
    """Look inside a trained model: its tables over time, what its projections give, which of them use token-shift."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one of its checkpoints."""
    out: Path | None = None
    """Folder for the pictures; None: inspect/ in the run folder."""
    data: str | None = None
    """Text to read, as `eval --data`; None: the text that the run held out."""
    encoding: str = "utf-8"
    """Encoding of the text files."""
    tokens: int = 16384
    """Read at most this many tokens."""
    checkpoint: str = "best"
    """best, newest, or a step."""
    device: str = "auto"
    """cpu, cuda ...; auto: cuda where there is one."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise UserError(f"--tokens is {self.tokens}; it must be at least 2")


@dataclass(frozen=True)
class BenchOpArguments:
    """Time wkv1 alone, forward and backward, in each of its forms, beside a plain writing and fused attention."""

    ctx_lens: tuple[int, ...] = (256, 512, 1024, 2048)
    """Positions."""
    batch_size: int = 2
    """Rows."""
    heads: int = 8
    """Number of heads; divides channels."""
    channels: int = 512
    """Width."""
    seconds: float = 2.0
    """Time for each path at each length; three rounds at least."""
    device: str = "auto"
    """cpu, cuda ...; auto: cuda where there is one."""
    out: Path | None = None
    """Folder for bench.json and bench.md."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class BenchTrainArguments:
    """Time a training step on random tokens, beside a plain writing and attention: timemix bench train seed

    A preset is named first; fields of its model and its training are changed as for `timemix train`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seconds: float = 10.0
    """Time for each path; three rounds at least."""
    out: Path | None = None
    """Folder for bench.json and bench.md."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class BenchSampleArguments:
    """Time the writing of text, random weights, beside recomputing, a Llama and the floor: timemix bench sample seed

    A preset is named first; fields of its model are changed as for `timemix train`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Texts written at once."""
    seconds: float = 2.0
    """Time for each path; three rounds at least."""
    out: Path | None = None
    """Folder for bench.json, bench.md and batches.png."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise UserError(f"--batches {list(self.batches)}: each must be at least 1")


def bench(arguments: list[str]) -> int:
    what = arguments[0] if arguments else ""
    if what not in ("op", "train", "sample"):
        raise UserError(f"bench what? timemix bench op, bench train or bench sample, not {what!r}")
    asked: BenchOpArguments | BenchTrainArguments | BenchSampleArguments
    if what == "op":
        asked = parse(BenchOpArguments, arguments[1:], "bench op")
    elif what == "sample":
        config, rest = preset_of(arguments[1:], "cpu-small")
        sizes = BenchSampleArguments(replace(config.model, vocab_size=65))
        asked = parse(BenchSampleArguments, rest, "bench sample", sizes)
    else:
        config, rest = preset_of(arguments[1:], "cpu-small")
        # Not the vocabulary of a text: that of characters.
        default = BenchTrainArguments(replace(config.model, vocab_size=65), config.train)
        asked = parse(BenchTrainArguments, rest, "bench train", default)
    if not 0 < asked.seconds < math.inf:
        raise UserError(f"--seconds is {asked.seconds}; it must be above 0, and finite")
    from timemix.experiments import bench as benchmark

    if isinstance(asked, BenchOpArguments):
        options = {n: getattr(asked, n) for n in ("ctx_lens", "batch_size", "heads", "channels", "seconds", "device")}
        report = benchmark.bench_op(**options, say=_say)
    elif isinstance(asked, BenchSampleArguments):
        from timemix.experiments.bench_sample import bench_sample, draw_batches

        report = bench_sample(asked.model, batches=asked.batches, seconds=asked.seconds, say=_say)
        if asked.out is not None:
            draw_batches(report, asked.out / "batches.png")
    else:
        report = benchmark.bench_train(asked.model, asked.train, seconds=asked.seconds, say=_say)
    words = benchmark.to_markdown(report)
    if asked.out is not None:
        write_text(asked.out / "bench.json", json.dumps(report, indent=1) + "\n")
        write_text(asked.out / "bench.md", words)
    print(json.dumps(report) if asked.json else words, end="\n" if asked.json else "")
    return 0


def compare(arguments: list[str]) -> int:
    parsed = parse(CompareArguments, arguments, "compare")
    name, experiment = _experiment(parsed)
    out = parsed.out or Path("runs") / name
    device = _own_device(parsed.device)
    first = int(os.environ.get("RANK", "0")) == 0
    from timemix.experiments import sampling_study, speed, table
    from timemix.training.signals import Interrupted

    try:
        if isinstance(experiment, Experiment):
            found, words = _train_all(experiment, out, device, parsed.reuse, first), table.to_markdown
        elif not first:
            return 0
        elif isinstance(experiment, SpeedExperiment):
            found, words = speed.run_speed(experiment, out, _say, device), speed.to_markdown
        else:
            found, words = sampling_study.run_sampling(experiment, out, _say, device), sampling_study.to_markdown
    except Interrupted as stop:
        _say(f"timemix: stopped; the same command goes on with {out}")
        return 128 + stop.number
    if first:
        print(json.dumps(found) if parsed.json else words(found), end="\n" if parsed.json else "")
        _say(f"the comparison is in {out}: {', '.join(sorted(p.name for p in out.iterdir() if p.suffix in _REPORTS))}")
    return 0


_REPORTS = (".html", ".md", ".png")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _train_all(experiment: Experiment, out: Path, device: str, reuse: Path | None, first: bool) -> dict[str, Any]:
    """Runs what is left of a comparison; the first process then writes its report and gets the table."""
    from timemix.experiments.compare import Comparison
    from timemix.experiments.report import write_report

    comparison = Comparison(experiment, out, reuse=reuse, device=device)
    comparison.run(_watching, _say)
    return write_report(comparison) if first else {}


def _experiment(parsed: CompareArguments) -> tuple[str, AnyExperiment]:
    """Name and experiment that the options describe. Raises UserError for none, for both, or for bad values."""
    if (parsed.experiment is None) == (not parsed.arch):
        known = ", ".join(path.stem for path in shipped())
        raise UserError(f"name an experiment file, one of {known}, or architectures with --arch")
    if parsed.experiment is not None and (parsed.size != CompareArguments.size or not parsed.tune):
        raise UserError("--size and --no-tune go with --arch; an experiment file says these itself")
    if parsed.experiment is not None:
        path = find_experiment(parsed.experiment)
        name, experiment = path.stem, read_experiment(path)
    else:
        name, experiment = "-".join(parsed.arch), _of_architectures(parsed)
    experiment = with_data(experiment, parsed.data, parsed.valid)
    changes: dict[str, Any] = {}
    if parsed.seeds is not None:
        if parsed.seeds < 1:
            raise UserError(f"--seeds is {parsed.seeds}; it must be at least 1")
        changes["seeds"] = tuple(range(1, parsed.seeds + 1))
    if parsed.tokens is not None:
        changes |= {"tokens": parsed.tokens, "seconds": None}
    if changes and not isinstance(experiment, Experiment):
        raise UserError(f"{name} trains no variants: --seeds and --tokens say nothing to it")
    return name, replace(experiment, **changes)


def _of_architectures(parsed: CompareArguments) -> Experiment:
    for arch in parsed.arch:
        if arch not in ARCHITECTURES:
            raise UserError(f"unknown architecture {arch!r}{nearest(arch, ARCHITECTURES)}")
    # The held-out text is read at the beginning and at the end: often would cost more than 2 % of the time.
    steps = preset(parsed.size).train.steps
    return Experiment(
        title=" against ".join(parsed.arch),
        variants=tuple(Variant(a, {"model": {"arch": a}}, color=SEED_COLORS.get(a, "")) for a in parsed.arch),
        tokens=1_500_000,
        preset=parsed.size,
        base={"train": {"valid_every": steps, "save_every": 500}},
        tune=GRID if parsed.tune else {},
    )


def _own_device(device: str) -> str:
    """`auto` under torchrun: the GPU of this process's local rank, where there is one."""
    local_rank = os.environ.get("LOCAL_RANK")
    if device != "auto" or local_rank is None:
        return device
    import torch

    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _watching(job: "Job", config: RunConfig) -> "Iterator[Watch]":
    """A bar for the run on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from timemix.progress import watching

    print(job.name, file=sys.stderr)
    with watching(0, config.train.steps) as watch:
        yield watch


def inspect(arguments: list[str]) -> int:
    parsed = parse(InspectArguments, arguments, "inspect")
    from timemix.data.corpus import evenly_spaced
    from timemix.data.sources import read_source
    from timemix.evaluation.inspect import draw, inspect_run
    from timemix.runs.folder import checkpoints
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device

    if (parsed.run / "metrics.jsonl").exists() and not checkpoints(parsed.run):
        raise UserError(
            f"{parsed.run} has no weights, so neither tables nor projections can be shown; its losses can:"
            f" timemix plot {parsed.run}"
        )
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(choose_device(parsed.device)[0]))
    run = loaded.folder.parent.parent
    if parsed.data is None:
        tokens: Any = loaded.corpus().valid
    else:
        tokens, _ = loaded.tokenizer.encode_lenient(read_source(parsed.data, encoding=parsed.encoding).text)
    report = inspect_run(loaded, evenly_spaced(tokens, parsed.tokens))
    pictures = draw(report, loaded.config.model, parsed.out or run / "inspect")
    if parsed.json:
        print(json.dumps(report))
        return 0
    _print_projections(report)
    for what, reason in report["not_shown"].items():
        print(f"not shown: {what}: {reason}")
    print("\n".join(str(picture) for picture in pictures))
    return 0


def _print_projections(report: dict[str, Any]) -> None:
    print(
        f"{report['arch']}, {report['loss']:.4f} nats per token on {report['tokens']:,} tokens."
        " Share: of the shifted channels in |weight| x deviation of the input, now and at the start of training."
        " Added: nats per token when this projection alone does not see them.\n"
    )
    print("layer  half   projection      mean  deviation  share  start    added")
    for row in report["projections"]:
        share, start = (("-" if x is None else f"{x:.2f}") for x in (row["share"], row["share_at_start"]))
        added = f"{row['loss_without_shifted'] - report['loss']:+.4f}" if "loss_without_shifted" in row else "-"
        print(
            f"{row['layer']:>5}  {row['half']:<6} {row['projection']:<11} {row['mean']:>8.3f} {row['deviation']:>10.3f}"
            f" {share:>6} {start:>6} {added:>8}"
        )


def plot(arguments: list[str]) -> int:
    parsed = parse(PlotArguments, arguments, "plot")
    from timemix.reporting.plots import plot_loss

    if not parsed.runs:
        raise UserError("name at least one run folder: timemix plot runs/NAME")
    out = parsed.out or parsed.runs[0] / "loss.png"
    plot_loss(list(parsed.runs), out, x=parsed.x, smoothing=parsed.smoothing, title=parsed.title)
    print(out)
    return 0
