"""The command-line verb compare: train variants on equal terms and report which variant learns better."""

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from timemix.cli.options import parse
from timemix.cli.terminal import lasting_output
from timemix.config.presets import preset
from timemix.config.run import RunConfig, read_count
from timemix.errors import Interrupted, InvalidValue
from timemix.experiments.spec import (
    AnyExperiment,
    Experiment,
    SpeedExperiment,
    find_experiment,
    read_experiment,
    shipped,
    with_data,
)
from timemix.experiments.synthetic_spec import SyntheticExperiment
from timemix.experiments.variants import Variant
from timemix.models.registry import find_architecture
from timemix.storage.json_files import to_json

if TYPE_CHECKING:
    from timemix.experiments.jobs import Job
    from timemix.experiments.table import Table
    from timemix.training.progress import Watch


LRS = [2e-3, 4e-3, 8e-3]
INITIAL = ["original", "zero"]


@dataclass(frozen=True)
class CompareArguments:
    """Train variants on the same batches, each at its best learning rate, and report which variant learns better.

    The variants are architectures (--arch), or the variants of an experiment file. In an experiment file, a line below
    [base] changes a setting of all variants, such as model.channels = 256. A line below the name of a variant changes a
    setting of that variant, such as set.model.channels = 64. docs/howto/experiment-files.md lists all fields of an
    experiment file.

    To resume an unfinished comparison, run the same command again. torchrun distributes the runs over processes.

    Examples:
        timemix compare --arch rwkv1 mha_rotary --data my.txt --out runs/compared
        timemix compare heads --data my.txt --seeds 5
        timemix compare recall --out runs/recall
        torchrun --nproc-per-node 2 -m timemix compare shift.toml --data my.txt --out runs/shift
    """

    experiment: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[EXPERIMENT]")] = None
    """Experiment file (.toml), or the name of an experiment of timemix. Default: the architectures of --arch."""
    arch: tuple[str, ...] = ()
    """Names of architectures, one or more, instead of an experiment file."""
    out: Path | None = None
    """Folder of the comparison, new or to resume. Default: runs/NAME, where NAME is the name of the experiment."""
    data: str | None = None
    """Training text, a source as in timemix train --data. Default: text of the experiment, otherwise `builtin`."""
    valid: str | None = None
    """Validation text, a source like --data. Default: text of the experiment, otherwise part of the training text."""
    seeds: int | None = None
    """Number of seeds, at least 1, counted from 1. Default: seeds of the experiment, otherwise 3."""
    tokens: int | str | None = None
    """Number of training tokens of each run, such as 500k or 20M. Default: tokens of the experiment, otherwise 1.5M."""
    size: str = "cpu-small"
    """Preset that gives the size and training of the architectures of --arch."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks of a synthetic experiment such as `recall`, one or more. Default: all tasks."""
    tune: bool = True
    """With --arch: choice of the learning rate of each architecture, by 3 runs with seed 0. An architecture with
    model.initial, such as rwkv1, has 6 runs: 3 for each kind of initial values."""
    reuse: Path | None = None
    """Folder of other comparisons, whose finished runs with equal settings and text are copied; with --results, also
    the folder of the --results folders of other comparisons. Default: no folder."""
    results: Path | None = None
    """Folder with one small JSON file for each finished run, which is not trained again. Further runs add their files.
    Default: no folder."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; `auto` is cuda if available (with torchrun, one GPU a process), otherwise cpu."""
    json: bool = False
    """Table of results as one JSON object on stdout."""


@lasting_output()
def compare(arguments: list[str]) -> int:
    parsed = parse(CompareArguments, arguments, "compare")
    name, experiment = _experiment(parsed)
    out = parsed.out or Path("runs") / name
    device = _own_device(parsed.device)
    first = int(os.environ.get("RANK", "0")) == 0
    from timemix.experiments import sampling as sampling_study
    from timemix.experiments import sampling_report, speed, synthetic, synthetic_report, table
    from timemix.runtime.machine import keep_freed_memory

    keep_freed_memory()
    status = 0
    try:
        if isinstance(experiment, Experiment):
            trained = _train_all(experiment, out, device, parsed, first)
            if trained is None:
                return 0
            found, words = trained.to_json(), table.to_markdown(trained)
            status = int(any(row.failed and not row.valid_losses for row in trained.variants))
        elif isinstance(experiment, SyntheticExperiment):
            answered = synthetic.run_synthetic(experiment, out, _say, device, parsed.tasks)
            found, words = to_json(answered), synthetic_report.to_markdown(answered)
            if not first:
                return 0
        elif not first:
            return 0
        elif isinstance(experiment, SpeedExperiment):
            timed = speed.run_speed(experiment, out, _say, device)
            found, words = to_json(timed), speed.to_markdown(timed)
        else:
            written = sampling_study.run_sampling(experiment, out, _say, device)
            found, words = to_json(written), sampling_report.to_markdown(written)
    except (Interrupted, KeyboardInterrupt) as stop:
        _say(f"timemix: stopped; the same command resumes the comparison in {out}")
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
    print(json.dumps(found) if parsed.json else words, end="\n" if parsed.json else "")
    _say(f"the comparison is in {out}: {', '.join(sorted(p.name for p in out.iterdir() if p.suffix in _REPORTS))}")
    if status:
        _say("timemix: all runs of a variant failed; their errors are below the table")
    return status


_REPORTS = (".html", ".md", ".png")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _train_all(experiment: Experiment, out: Path, device: str, parsed: CompareArguments, first: bool) -> "Table | None":
    """Run the unfinished runs of a comparison. The first process then writes the report and returns its table."""
    from timemix.experiments.compare import Comparison
    from timemix.experiments.report import write_report

    comparison = Comparison(experiment, out, reuse=parsed.reuse, results=parsed.results, device=device)
    if first and (words := comparison.estimate()):
        _say(words)
    comparison.run(_watching, _say)
    return write_report(comparison) if first else None


def _experiment(parsed: CompareArguments) -> tuple[str, AnyExperiment]:
    """Return the name and the experiment that the options give.

    Raises:
        InvalidValue: The options name neither an experiment nor architectures, or both, or hold a bad value.
    """
    if (parsed.experiment is None) == (not parsed.arch):
        known = ", ".join(path.stem for path in shipped())
        raise InvalidValue(f"name either an experiment (a .toml file, or one of {known}) or architectures with --arch")
    if parsed.experiment is not None and (parsed.size != CompareArguments.size or not parsed.tune):
        raise InvalidValue("--size and --no-tune need --arch; an experiment file has fields for both options")
    if parsed.experiment is not None:
        if Path(parsed.experiment).is_file() and Path(parsed.experiment).suffix != ".toml":
            raise InvalidValue(
                f"EXPERIMENT is {parsed.experiment!r}, which is not a .toml file; to compare architectures on a text:"
                f" timemix compare --arch NAME NAME --data {shlex.quote(parsed.experiment)}"
            )
        path = find_experiment(parsed.experiment)
        name, experiment = path.stem, read_experiment(path)
    else:
        name, experiment = "-".join(parsed.arch), _of_architectures(parsed)
    if isinstance(experiment, SyntheticExperiment) and (parsed.data or parsed.valid or parsed.tokens):
        raise InvalidValue(f"the experiment {name} generates its sequences; leave out --data, --valid and --tokens")
    if not isinstance(experiment, Experiment) and (parsed.reuse or parsed.results):
        raise InvalidValue(f"the experiment {name} trains no variants on a text; leave out --reuse and --results")
    if isinstance(experiment, SpeedExperiment) and (parsed.data or parsed.valid):
        raise InvalidValue(f"the experiment {name} measures random tokens; leave out --data and --valid")
    experiment = with_data(experiment, parsed.data, parsed.valid)
    changes: dict[str, Any] = {}
    if parsed.tasks is not None and not isinstance(experiment, SyntheticExperiment):
        raise InvalidValue(f"the experiment {name} has no tasks; leave out --tasks")
    if parsed.seeds is not None:
        if parsed.seeds < 1:
            raise InvalidValue(f"--seeds is {parsed.seeds}; it must be at least 1")
        changes["seeds"] = tuple(range(1, parsed.seeds + 1))
    if parsed.tokens is not None:
        changes |= {"tokens": read_count(parsed.tokens), "seconds": None}
    if changes and not isinstance(experiment, Experiment | SyntheticExperiment):
        raise InvalidValue(f"the experiment {name} trains no variants; leave out --seeds and --tokens")
    return name, replace(experiment, **changes)


def _of_architectures(parsed: CompareArguments) -> Experiment:
    found = {arch: find_architecture(arch) for arch in parsed.arch}
    tune: dict[str, Any] = {"train": {"lr": LRS}}
    if any("initial" in each.config.__dataclass_fields__ for each in found.values()):
        tune["model"] = {"initial": INITIAL}
    # Validate only at the start and at the end: more validations would cost more than 2 % of the time.
    steps = preset(parsed.size).train.steps
    return Experiment(
        title=" against ".join(parsed.arch),
        variants=tuple(Variant(a, {"model": {"arch": a}}, color=found[a].colour) for a in parsed.arch),
        tokens=1_500_000,
        preset=parsed.size,
        base={"train": {"valid_every": steps, "save_every": 500}},
        tune=tune if parsed.tune else {},
    )


def _own_device(device: str) -> str:
    """Return the device: for `auto` under torchrun, the GPU of the local rank, or the CPU without a GPU."""
    local_rank = os.environ.get("LOCAL_RANK")
    if device != "auto" or local_rank is None:
        return device
    import torch

    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _watching(job: "Job", config: RunConfig) -> "Iterator[Watch]":
    """Show a progress bar for the run if stderr is a terminal, otherwise nothing."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from timemix.cli.watch import watching

    print(job.name, file=sys.stderr)
    with watching(0, config.train.steps) as watch:
        yield watch
