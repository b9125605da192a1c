"""The command-line verb bench: time the op, a training step or generation against other implementations."""

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
from timemix.storage.settings import check_range, nearest_divisors


@dataclass(frozen=True)
class BenchOpArguments:
    """Time the op wkv1 alone, forward and backward, in each backend, against a naive version and fused attention.

    Examples:
        timemix bench op
        timemix bench op --ctx-lens 256 1024 --heads 4 --channels 256 --seconds 0.5
    """

    ctx_lens: tuple[int, ...] = (256, 512, 1024, 2048)
    """Sequence lengths in tokens, each at least 1."""
    batch_size: int = 2
    """Number of sequences in a batch, at least 1."""
    heads: int = 8
    """Number of heads, at least 1; the number must divide --channels."""
    channels: int = 512
    """Width of the model, at least 1."""
    seconds: float = 2.0
    """Seconds for each implementation at each length, above 0; each implementation runs at least three rounds."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; `auto` is cuda if available, otherwise cpu."""
    out: Path | None = None
    """New folder for bench.json and bench.md. Default: output on stdout only."""
    json: bool = False
    """Output as one JSON object on stdout."""

    def __post_init__(self) -> None:
        if not self.ctx_lens or min(self.ctx_lens) < 1:
            raise InvalidValue(f"--ctx-lens is {list(self.ctx_lens)}; it must be one or more numbers, each at least 1")
        for name in ("batch_size", "heads", "channels"):
            check_range(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        if self.channels % self.heads:
            raise InvalidValue(
                f"--heads {self.heads} does not divide --channels {self.channels};"
                f" nearest divisors: {nearest_divisors(self.heads, self.channels)}"
            )


@dataclass(frozen=True)
class BenchTrainArguments:
    """Time a training step on random tokens, against a naive implementation and attention.

    Examples:
        timemix bench train seed
        timemix bench train cpu-small --model.ctx-len 256 --seconds 5 --out bench/train
    """

    preset: PresetName = None
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seconds: float = 10.0
    """Seconds for each implementation, above 0; each implementation runs at least three rounds."""
    out: Path | None = None
    """New folder for bench.json and bench.md. Default: output on stdout only."""
    json: bool = False
    """Output as one JSON object on stdout."""


@dataclass(frozen=True)
class BenchSampleArguments:
    """Time generation with random weights, against recomputation, a Llama model and the memory bandwidth.

    Examples:
        timemix bench sample seed
        timemix bench sample cpu-small --batches 1 8 --out bench/sample
    """

    preset: PresetName = None
    model: ModelConfig = field(default_factory=ModelConfig)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Batch sizes, each at least 1."""
    seconds: float = 2.0
    """Seconds for each implementation, above 0; each implementation runs at least three rounds."""
    out: Path | None = None
    """New folder for bench.json, bench.md and batches.png. Default: output on stdout only."""
    json: bool = False
    """Output as one JSON object on stdout."""

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise InvalidValue(f"--batches is {list(self.batches)}; it must be one or more numbers, each at least 1")


VERBS = {
    "op": "time the op wkv1 alone, forward and backward",
    "train": "time a training step",
    "sample": "time generation",
}


def usage() -> str:
    verbs = "\n".join(f"  {verb:<9}{text}" for verb, text in VERBS.items())
    return (
        f"usage: timemix bench VERB [options]\n\n"
        f"Time a part of timemix against other implementations.\n\n{verbs}\n\n"
        "examples:\n  timemix bench train seed\n  timemix bench sample seed\n\n"
        "timemix bench VERB --help lists the options of VERB."
    )


def _parse(verb: str, arguments: list[str]) -> BenchOpArguments | BenchTrainArguments | BenchSampleArguments:
    if verb == "op":
        return parse(BenchOpArguments, arguments, "bench op")
    choice = first_parse(arguments)
    config = choice.preset_config()
    # The character vocabulary of a small text has about 65 entries.
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
        raise InvalidValue(f"--seconds is {asked.seconds}; it must be above 0 and finite")
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
