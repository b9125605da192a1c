"""What each verb of the command line does, and its options (those of a run come from `config`)."""

import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from timemix.arguments import parse, preset_of, print_report
from timemix.config.presets import preset
from timemix.config.run import RunConfig, TrainConfig, read_toml
from timemix.data.config import DataConfig
from timemix.errors import UserError
from timemix.models.config import ModelConfig
from timemix.storage.files import cannot_write

if TYPE_CHECKING:
    from timemix.generation.engine import Engine, Event
    from timemix.generation.session import Stream
    from timemix.runs.load import Loaded
    from timemix.runtime.distributed import World
    from timemix.tokenizers.base import Tokenizer
    from timemix.training.hooks import Hook
    from timemix.training.trainer import Trainer, TrainingProgress, Watch


DEMO_PROMPT = "The "


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; see timemix.sampling.Sampler."""

    tokens: int = 300
    """Tokens to write."""
    count: int = 1
    """Samples to write, in one batch."""
    seed: int = 0
    """Same seed, same text."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 is off."""
    top_p: float = 1.0
    """Keep the most probable tokens up to this total; 1 is off."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the largest probability; 0 is off."""
    top_a: float = 0.02
    """Remove tokens below top_a * p_max ^ top_a_power; 0 is off."""
    top_a_power: float = 2.0
    """See top_a."""
    repetition_penalty: float = 1.0
    """Makes tokens of the context less likely; 1 is off."""
    context: Literal["reanchor", "exact"] = "reanchor"
    """Past ctx_len: go on from the newest half (constant cost), or recompute the whole window for each token."""
    stop: tuple[str, ...] = ()
    """Texts at the first of which a sample ends, before it."""

    def __post_init__(self) -> None:
        for name in ("tokens", "count"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Tracking:
    """Where the lines of metrics.jsonl go besides."""

    tensorboard: bool = False
    """Write them for TensorBoard too, to the run folder's tensorboard/."""
    hook: str | None = None
    """A function, as module:function, that gets each of them as a dictionary; for tracking services."""


@dataclass(frozen=True)
class TrainArguments:
    """Train a model. Name a preset first to start from its values: timemix train cpu-small --data FILE --out DIR"""

    out: Path
    """Folder to make for the run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Begin with the weights and the tokenizer of this run, or of one of its checkpoints."""
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = field(default_factory=Tracking)


@dataclass(frozen=True)
class ResumeArguments:
    """Go on with a run from its newest checkpoint."""

    resume: Path
    """Run folder."""
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = field(default_factory=Tracking)


@dataclass(frozen=True)
class SampleArguments:
    """Write text with a trained model."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one of its checkpoints."""
    prompt: str | None = None
    """Text to go on from; None: none with --load-state, else a line end, or the first token of the vocabulary."""
    checkpoint: str = "best"
    """best, newest, or a step."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Round the weights to this: the fewer bytes, the faster."""
    load_state: Path | None = None
    """Go on with the text whose state is in this file."""
    save_state: Path | None = None
    """Write the state after the text, and after a stop string that ended it, to this file, to go on; also on Ctrl-C."""
    log_probabilities: bool = False
    """With --json: the log-probability of each token in nats, at temperature 1 and before any filter."""
    device: str = "auto"
    """cpu, cuda ...; auto: cuda where there is one."""
    json: bool = False
    """Print one JSON object."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=Sampling)


@dataclass(frozen=True)
class EvalArguments:
    """Loss of a trained model on a text: nats per token, bits per character, bits per byte."""

    run: tyro.conf.Positional[Path]
    """Run folder, or one of its checkpoints."""
    data: str | None = None
    """A file, folder, glob, `builtin`, or a named download; None: the text that the run held out."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = "utf-8"
    """Encoding of the text files."""
    stride: int | None = None
    """Move the window by this many tokens, so that each has context; None: windows side by side."""
    checkpoint: str = "best"
    """best, newest, or a step."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of the matrix products."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """Round the weights to this, as `timemix sample --weights` does."""
    device: str = "auto"
    """cpu, cuda ...; auto: cuda where there is one."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class DataArguments:
    """Describe a text, named first: timemix data FILE. With --out, write its tokens for `train --data` instead.

    A source is a file, a folder or a glob of files (.gz, .xz and .bz2 are read as they are), `builtin`, or a
    download: simplebooks-92, simplebooks-2, tinyshakespeare, enwik8, text8.
    """

    out: Path | None = None
    """Folder to make."""
    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class InfoArguments:
    """Versions, devices and backends; parameters, FLOPs and memory of a preset: timemix info seed"""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class DemoArguments:
    """Train a small rwkv1 on the built-in text for two to six minutes, with samples and a picture."""

    out: Path = Path("runs/demo")
    """Folder to make for the run."""
    steps: int | None = None
    """Fewer steps, to try it out; None: those of the preset."""


def _defaults(arguments: list[str]) -> tuple[RunConfig, list[str]]:
    """What flags change: the config of the run after --from, else of a preset; and the arguments but its name."""
    start = next((a.partition("=")[2] or b for a, b in pairwise([*arguments, ""]) if re.match("--from(=|$)", a)), None)
    if start is None:
        return preset_of(arguments, "cpu-small")
    if not arguments[0].startswith("-"):
        raise UserError(f"--from {start} brings its own settings: leave out the preset {arguments[0]!r}")
    from timemix.runs.folder import find

    config = read_toml(find(start) / "config.toml")
    # The text may be another one; where it lies, and what is held out of it, are not.
    data = DataConfig(source=config.data.source, order=config.data.order)
    return replace(config, data=data, train=replace(config.train, device="auto")), arguments


def train(arguments: list[str]) -> int:
    # Options first: under torchrun, what is wrong with them needs no other process.
    if any(a == "--resume" or a.startswith("--resume=") for a in arguments):
        asked: ResumeArguments | TrainArguments = parse(ResumeArguments, arguments, "train")
    else:
        config, arguments = _defaults(arguments)
        # --data is short for --data.source.
        arguments = [re.sub(r"^--data(?==|$)", "--data.source", a) for a in arguments]
        asked = parse(
            TrainArguments, arguments, "train", TrainArguments(tyro.MISSING, config.model, config.data, config.train)
        )
    from timemix.runtime.distributed import Elsewhere, joined
    from timemix.training.hooks import load_hook

    hook = None if asked.tracking.hook is None else load_hook(asked.tracking.hook)
    with joined() as world:
        try:
            return _train(asked, hook, world)
        except Elsewhere:
            return 2
        except UserError:
            # What is wrong in one process is most often wrong in all.
            if world.says_first():
                raise
            return 2


def _train(asked: "ResumeArguments | TrainArguments", hook: "Hook | None", world: "World") -> int:
    from timemix.training.hooks import tensorboard
    from timemix.training.start import new_run, resume_run

    if isinstance(asked, ResumeArguments):
        out = asked.resume
        trainer = resume_run(out, world)
        if world.first and trainer.lock.taken_over:
            print(f"{trainer.lock.taken_over} held {out} and ended without letting go", file=sys.stderr)
        if trainer.step >= trainer.config.train.steps:
            if world.first:
                print(f"{out} is complete: {trainer.step} steps")
            return 0
        if world.first:
            print(f"going on with {out} after step {trainer.step}", file=sys.stderr)
    else:
        out = asked.out
        start = None if asked.from_ is None else str(asked.from_)
        trainer = new_run(RunConfig(asked.model, asked.data, asked.train, start), out, world)
    hooks = [hook] if hook is not None else []
    if asked.tracking.tensorboard and world.first:
        hooks.append(tensorboard(out / "tensorboard", trainer.step))
    status = run_trainer(trainer, hooks=hooks)
    if status == 0 and world.first:
        write_sample(trainer)
        print(f"the run is in {out}: loss.png, samples.txt, metrics.jsonl, checkpoints", file=sys.stderr)
    return status


def run_trainer(trainer: "Trainer", during: "Watch | None" = None, hooks: "Sequence[Hook]" = ()) -> int:
    """Trains with progress on stderr and draws the loss curve; returns the exit status."""
    from timemix.progress import watching
    from timemix.reporting.plots import plot_loss
    from timemix.runtime.machine import keep_freed_memory
    from timemix.training.signals import Interrupted

    keep_freed_memory()

    config, world = trainer.config, trainer.world
    if world.first:
        _introduce(trainer)
    try:
        with watching(trainer.step, config.train.steps) if world.first else nullcontext(_ignore) as watch:

            def both(progress: "TrainingProgress") -> None:
                watch(progress)
                if during is not None:
                    during(progress)

            def hook(line: dict[str, Any]) -> None:
                for each in hooks:
                    each(line)

            trainer.run(both, hook)
    except Interrupted as stop:
        if world.first:
            print(f"timemix: {stop}; go on with: timemix train --resume {trainer.out}", file=sys.stderr)
        return 128 + stop.number
    if not world.first:
        return 0
    plot_loss([trainer.out], trainer.out / "loss.png")
    if trainer.valid_loss is not None:
        print(
            f"validation loss {trainer.valid_loss:.4f} nats per token (best {trainer.best_loss:.4f})"
            f" after {trainer.seconds:.0f} s of training",
            file=sys.stderr,
        )
    return 0


def _ignore(progress: "TrainingProgress") -> None:
    """For the processes that do not speak."""


def _introduce(trainer: "Trainer") -> None:
    from timemix.models.size import wkv1_backend

    config, world = trainer.config, trainer.world
    processes = "" if world.size == 1 else f", {world.size} processes ({config.train.strategy})"
    print(
        f"{config.model.arch}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters,"
        f" vocabulary {config.model.vocab_size};"
        f" {len(trainer.corpus.train):,} training tokens, {len(trainer.corpus.valid):,} held out\n"
        f"{trainer.device} ({trainer.device_reason}), {trainer.precision} ({trainer.precision_reason}){processes}"
        + (f", wkv1 {wkv1_backend(config.model, trainer.precision)}" if config.model.arch.startswith("rwkv1") else "")
        + f", {'compiled' if trainer.compiled else 'not compiled'} ({trainer.compile_reason})",
        file=sys.stderr,
    )


def write_sample(trainer: "Trainer", prompt: str | None = None, tokens: int = 300) -> str:
    """Appends what the model writes now to samples.txt and returns it; without a prompt it goes on from a line end."""
    from timemix.generation.generate import generate
    from timemix.generation.sampler import Sampler
    from timemix.runs.load import Loaded, load

    tokenizer = trainer.corpus.tokenizer
    if prompt is None:
        prompt = default_prompt(tokenizer)
    # A model that is cut up over processes can write in none of them alone.
    alone = trainer.world.size == 1
    model = trainer.model if alone else load(trainer.out, checkpoint="newest").model
    model.eval()
    loaded = Loaded(model, tokenizer, trainer.config, trainer.out)
    text = prompt + generate(loaded, prompt, tokens=tokens, sampler=Sampler(top_a=0.02))[0]
    model.train()
    path = trainer.out / "samples.txt"
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(f"--- step {trainer.step}\n{text}\n\n")
    except OSError as error:
        raise UserError(cannot_write(path, error)) from error
    return text


def default_prompt(tokenizer: "Tokenizer") -> str:
    """A line end, or the first token where the vocabulary has none."""
    ids, _ = tokenizer.encode_lenient("\n")
    return "\n" if len(ids) else tokenizer.decode([0])


def sample(arguments: list[str]) -> int:
    parsed = parse(SampleArguments, arguments, "sample")
    settings = parsed.sampling
    if parsed.save_state is not None and settings.count > 1:
        raise UserError(f"--save-state takes the state of one text; leave --count {settings.count} out")
    from timemix.generation.decode import ModelStep
    from timemix.generation.engine import Engine, Request
    from timemix.generation.sampler import Sampler
    from timemix.generation.session import load_stream, save_stream
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device

    sampler = Sampler(**{f.name: getattr(settings, f.name) for f in fields(Sampler)})
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(choose_device(parsed.device)[0]))
    start = None if parsed.load_state is None else load_stream(parsed.load_state, loaded.model)
    prompt = parsed.prompt
    if prompt is None:
        prompt = default_prompt(loaded.tokenizer) if start is None else ""
    _note_long_prompt(prompt, loaded)
    engine = Engine(loaded.model, loaded.tokenizer, places=settings.count, weights=parsed.weights)
    if isinstance(engine.advance, ModelStep):
        print(f"timemix: tokens are written step by step by the model itself: {engine.advance.reason}", file=sys.stderr)
    ids = loaded.tokenizer.encode(prompt).tolist()
    for number in range(settings.count):
        engine.add(
            Request(
                ids,
                tokens=settings.tokens,
                sampler=sampler,
                seed=settings.seed,
                sample=number,
                stop=settings.stop,
                log_probabilities=parsed.log_probabilities,
                start=start,
                keep_stream=parsed.save_state is not None,
                context=settings.context,
            )
        )
    saving = parsed.save_state
    noted: AbstractContextManager[list[int]] = _interrupts_noted() if saving else nullcontext([])
    with noted as interrupts:
        streams: list[Stream] = []
        gone: BrokenPipeError | None = None
        try:
            for _ in _written(engine, prompt, parsed, streams):
                if interrupts:
                    break
        except BrokenPipeError as error:
            gone = error
        if saving:
            save_stream(streams[0] if streams else engine.stream(0), saving, loaded.model)
    if gone is not None:
        raise gone
    if interrupts:
        raise KeyboardInterrupt
    return 0


@contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Ctrl-C goes into the list, rather than stop what is going on in its midst."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _written(engine: "Engine", prompt: str, parsed: SampleArguments, streams: "list[Stream]") -> Iterator["Event"]:
    """Prints the texts of an engine, one as it comes, several when all have ended; gives their events.

    The stream of a text that has ended goes into the list before its end is printed.
    """
    count = parsed.sampling.count
    streaming = count == 1 and not parsed.json
    texts = [""] * count
    told: list[list[float | None]] = [[] for _ in range(count)]
    if streaming:
        sys.stdout.write(prompt)
    while engine.busy:
        for event in engine.step():
            if event.stream is not None:
                streams.append(event.stream)
            texts[event.id] += event.text
            told[event.id].append(event.log_probability)
            if streaming:
                sys.stdout.write(event.text)
                sys.stdout.flush()
            # Last: a stop here loses nothing of what the state holds.
            yield event
    if parsed.json:
        asked = {"log_probabilities": told} if parsed.log_probabilities else {}
        print(json.dumps({"prompt": prompt, "texts": texts} | asked))
    elif streaming:
        sys.stdout.write("\n")
    else:
        for number, text in enumerate(texts, 1):
            print(f"--- sample {number}\n{prompt}{text}")


def _note_long_prompt(prompt: str, loaded: "Loaded") -> None:
    tokens = len(loaded.tokenizer.encode(prompt))
    limit = loaded.model.max_position
    if limit is not None and tokens > limit:
        print(
            f"timemix: the prompt has {tokens} tokens, the context {limit}: the model sees the last {limit}",
            file=sys.stderr,
        )


def eval(arguments: list[str]) -> int:
    parsed = parse(EvalArguments, arguments, "eval")
    from timemix.data.sources import read_source
    from timemix.evaluation.loss import evaluate, evaluate_held_out
    from timemix.models.quantize import rounded
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device, choose_precision

    device, _ = choose_device(parsed.device)
    precision, _ = choose_precision(parsed.precision, device)
    loaded = load(parsed.run, checkpoint=parsed.checkpoint, device=str(device))
    loaded = replace(loaded, model=rounded(loaded.model, parsed.weights))
    options: dict[str, Any] = {"precision": precision, "stride": parsed.stride}
    if parsed.data is None:
        name, result = "the held-out text", evaluate_held_out(loaded.model, loaded.corpus(), **options)
    else:
        text = read_source(parsed.data, encoding=parsed.encoding, progress=True).text
        name, result = parsed.data, evaluate(loaded.model, loaded.tokenizer, text, **options)
    if parsed.json:
        print(json.dumps({"checkpoint": str(loaded.folder), "data": name, "weights": parsed.weights, **result}))
        return 0
    print(
        f"{result['nats_per_token']:.4f} nats per token, {result['bits_per_character']:.4f} bits per character,"
        f" {result['bits_per_byte']:.4f} bits per byte\n"
        f"{result['tokens']:,} tokens, {result['characters']:,} characters, {result['bytes']:,} bytes"
        f" of {name}, {loaded.folder}"
    )
    if result["unknown"]:
        what = "words" if loaded.tokenizer.kind == "word" else "characters"
        print(f"{result['unknown']:,} unknown {what} {_unknown_fate(loaded)}")
    return 0


def _unknown_fate(loaded: "Loaded") -> str:
    fates = {"unk": "read as <unk>", "byte": "read as their bytes"}
    return fates.get(loaded.tokenizer.unknown, "left out: the vocabulary has no <unk>")


def data(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data.source", *arguments]
    parsed = parse(DataArguments, arguments, "data")
    from timemix.data.prepare import describe, prepare

    if parsed.out is None:
        report = describe(parsed.data, progress=True)
    else:
        report = prepare(parsed.out, parsed.data, progress=True).info | {"folder": str(parsed.out)}
    if parsed.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0


def info(arguments: list[str]) -> int:
    config, rest = preset_of(arguments, "cpu-small")
    asked = rest != arguments or any(a.startswith(("--model.", "--train.")) for a in arguments)
    parsed = parse(InfoArguments, rest, "info", InfoArguments(config.model, config.train))
    from timemix.cli.info import describe_machine, describe_model

    report: dict[str, Any] = describe_machine()
    if asked:
        report |= describe_model(parsed.model, parsed.train)
    if parsed.json:
        print(json.dumps(report))
        return 0
    print_report(report)
    return 0


def demo(arguments: list[str]) -> int:
    parsed = parse(DemoArguments, arguments, "demo")
    from timemix.training.start import new_run

    config = preset("demo")
    if parsed.steps is not None:
        config = replace(config, train=replace(config.train, steps=parsed.steps))
    out = parsed.out
    print("Training a small RWKV on the Python language reference, two to six minutes on two cores.")
    trainer = new_run(config, out)
    half = max(1, trainer.config.train.steps // 2)

    def during(progress: "TrainingProgress") -> None:
        if progress.step == half:
            print(f"\nHalf way, it writes:\n\n{write_sample(trainer, DEMO_PROMPT)}\n")

    print(f"Before training it writes:\n\n{write_sample(trainer, DEMO_PROMPT)}\n")
    status = run_trainer(trainer, during)
    if status == 0:
        print(f"\nNow it writes:\n\n{write_sample(trainer, DEMO_PROMPT)}\n")
        print(
            f"The run is in {out}; its loss curve is {out / 'loss.png'}. Next:\n\n"
            f"  timemix sample {out} --prompt 'The ' --tokens 500\n"
            f"  timemix eval {out}\n"
            f"  timemix train cpu-small --data YOUR.txt --out runs/mine"
        )
    return status
