"""The verb bench: the op, a training step or generation, timed beside other ways."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from timemix.cli.compare import _say
from timemix.cli.options import parse, preset_of
from timemix.config.run import TrainConfig
from timemix.errors import UserError
from timemix.models.config import ModelConfig
from timemix.storage.files import write_text
from timemix.storage.json_files import to_json


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
    from timemix.bench.op import bench_op
    from timemix.bench.race import to_markdown
    from timemix.bench.train import bench_train

    if isinstance(asked, BenchOpArguments):
        options = {n: getattr(asked, n) for n in ("ctx_lens", "batch_size", "heads", "channels", "seconds", "device")}
        report = bench_op(**options, say=_say)
    elif isinstance(asked, BenchSampleArguments):
        from timemix.bench.sample import bench_sample, draw_batches

        report = bench_sample(asked.model, batches=asked.batches, seconds=asked.seconds, say=_say)
        if asked.out is not None:
            draw_batches(report, asked.out / "batches.png")
    else:
        report = bench_train(asked.model, asked.train, seconds=asked.seconds, say=_say)
    words = to_markdown(report)
    if asked.out is not None:
        write_text(asked.out / "bench.json", json.dumps(to_json(report), indent=1) + "\n")
        write_text(asked.out / "bench.md", words)
    print(json.dumps(to_json(report)) if asked.json else words, end="\n" if asked.json else "")
    return 0
