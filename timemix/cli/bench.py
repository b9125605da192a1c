"""The verb bench: the op, a training step or generation, timed beside other ways."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from timemix.cli.compare import _say
from timemix.cli.options import PresetName, first_parse, parse
from timemix.config.run import TrainConfig
from timemix.errors import InvalidValue, nearest
from timemix.models.config import ModelConfig
from timemix.storage.files import write_text
from timemix.storage.json_files import to_json


@dataclass(frozen=True)
class BenchOpArguments:
    """Time the op alone, forward and backward, in each backend, beside a naive implementation and fused attention."""

    ctx_lens: tuple[int, ...] = (256, 512, 1024, 2048)
    """Sequence lengths in tokens."""
    batch_size: int = 2
    """Sequences in a batch."""
    heads: int = 8
    """Number of heads; divides channels."""
    channels: int = 512
    """Width of the model."""
    seconds: float = 2.0
    """Seconds for each implementation at each length; at least three rounds."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; auto: cuda if available."""
    out: Path | None = None
    """New folder for bench.json and bench.md."""
    json: bool = False
    """One JSON object on stdout instead of text."""


@dataclass(frozen=True)
class BenchTrainArguments:
    """Time a training step on random tokens, beside a naive implementation and attention.

    timemix bench train seed
    """

    preset: PresetName = None
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seconds: float = 10.0
    """Seconds for each implementation; at least three rounds."""
    out: Path | None = None
    """New folder for bench.json and bench.md."""
    json: bool = False
    """One JSON object on stdout instead of text."""


@dataclass(frozen=True)
class BenchSampleArguments:
    """Time generation with random weights, beside recomputation, a Llama and the memory bandwidth.

    timemix bench sample seed
    """

    preset: PresetName = None
    model: ModelConfig = field(default_factory=ModelConfig)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Batch sizes."""
    seconds: float = 2.0
    """Seconds for each implementation; at least three rounds."""
    out: Path | None = None
    """New folder for bench.json, bench.md and batches.png."""
    json: bool = False
    """One JSON object on stdout instead of text."""

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise InvalidValue(f"--batches {list(self.batches)}: each must be at least 1")


VERBS = {
    "op": "speed of the op alone, forward and backward",
    "train": "speed of a training step",
    "sample": "speed of generation",
}


def usage() -> str:
    verbs = "\n".join(f"  {verb:<9}{text}" for verb, text in VERBS.items())
    return (
        f"usage: timemix bench VERB [options]\n\n{verbs}\n\n"
        "Each is timed beside other implementations. timemix bench VERB --help lists the options of a verb."
    )


def _parse(verb: str, arguments: list[str]) -> BenchOpArguments | BenchTrainArguments | BenchSampleArguments:
    if verb == "op":
        return parse(BenchOpArguments, arguments, "bench op")
    choice = first_parse(arguments)
    config = choice.preset_config()
    # Not the vocabulary of a text: that of characters.
    model = replace(config.model, vocab_size=65)
    if verb == "sample":
        return parse(BenchSampleArguments, arguments, "bench sample", BenchSampleArguments(model=model), choice)
    default = BenchTrainArguments(model=model, train=config.train)
    return parse(BenchTrainArguments, arguments, "bench train", default, choice)


def bench(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else ""
    if verb in ("", "-h", "--help", "help"):
        print(usage())
        return 0
    if verb not in VERBS:
        raise InvalidValue(f"unknown verb {f'bench {verb}'!r}{nearest(verb, VERBS)}")
    asked = _parse(verb, arguments[1:])
    if not 0 < asked.seconds < math.inf:
        raise InvalidValue(f"--seconds is {asked.seconds}; it must be above 0, and finite")
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
