"""The generation part of benchmarks/rwkv7.py."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from other_programs import LlamaCpp, RwkvPackage, differs
from rwkv7_common import CPU, Record, random_model, rwkv7, say, square_product
from torch import Tensor, nn

from timemix.bench.race import Contender, Heat, race
from timemix.generation.decode import build_step
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import WEIGHTS, Weights, linear_weights, rounded
from timemix.runtime.machine import free_memory, keep_freed_memory, ones_in_huge_pages, resident_memory

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1, "int4": 0.5}
"""Largest difference of logits between two programs, relative to the largest logit."""


PROMPT = 33
"""Number of tokens of the prompt before the decoded tokens."""

STEPS = 16
"""Number of consecutive tokens that a contender generates in each call."""

GGUF: dict[Weights, tuple[str, ...]] = {
    "float32": ("f32",),
    "bfloat16": ("bf16", "f16"),
    "int8": ("q8_0",),
    "int4": ("q4_0",),
}
"""Files of llama.cpp with about as many bits as each format of timemix."""


def prompt(length: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


class Prepared:
    """A model whose weights are in one format, with the logits that other programs must reach.

    Args:
        model: The model in float32.
        weights: Format of the weights.
        lengths: Lengths of the prompts whose logits are needed.
    """

    def __init__(self, model: LanguageModel, weights: Weights, lengths: Sequence[int]) -> None:
        self.model, self.weights = model, weights
        whole = rounded(model, weights)
        self.expected = {length: last_logits(whole, length) for length in lengths}
        del whole
        self.stepper = build_step(model, weights)

    def fault(self, logits: Tensor, length: int) -> str | None:
        """Return a message if the compiled step is not available, or its logits are wrong."""
        if not self.stepper.compiled:
            return self.stepper.reason
        return differs(logits, self.expected[length], TOLERANCE[self.weights])


def last_logits(model: LanguageModel, length: int) -> Tensor:
    """Return the logits after a prompt from the model's own forward pass."""
    with torch.no_grad():
        return model(torch.tensor([prompt(length, model.config.vocab_size)]), logits="last")[0][0]


def decoding(prepared: Prepared, rows: int) -> Contender:
    """Return a contender of timemix that decodes STEPS tokens of each row, after a comparison of logits."""
    stepper, state = prepared.stepper, prepared.model.init_state(rows)
    places = torch.arange(rows)
    tokens = torch.tensor(prompt(PROMPT, prepared.model.config.vocab_size)).repeat(rows)
    logits, state = stepper(tokens, state, places, torch.full((rows,), PROMPT))

    def call() -> None:
        nonlocal state
        for _ in range(STEPS):
            _, state = stepper(tokens[:rows], state, places)

    return Contender(f"timemix {prepared.weights}", call, rows * STEPS, prepared.fault(logits[-1], PROMPT))


def llama_decoding(runner: LlamaCpp, weights: Weights, expected: Tensor) -> Contender:
    """Return a contender of llama.cpp that decodes STEPS tokens of each row, after a comparison of logits."""
    rows = runner.rows
    runner([prompt(PROMPT, len(expected))] * rows)
    fault = differs(runner.logits(len(expected)), expected, TOLERANCE[weights])

    def call() -> None:
        for _ in range(STEPS):
            runner([[5]] * rows)

    return Contender(f"llama.cpp {runner.name}", call, rows * STEPS, fault)


def files_of(folder: Path | None, weights: Weights) -> Iterator[Path]:
    """Yield the GGUF files in a folder with about as many bits as a format of timemix."""
    if folder is None:
        return
    for name in GGUF[weights]:
        if (file := folder / f"{name}.gguf").exists():
            yield file


def moved_bytes(model: LanguageModel, weights: Weights, rows: int) -> float:
    """Return the least number of bytes that a step reads and writes: weights once, the state of each row twice."""
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.5}
    linear = list(linear_weights(model, weights))
    rest = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    rest -= sum(w.numel() for w, _ in linear)
    return sum(w.numel() * bits[own] / 8 for w, own in linear) + rest * 4 + 2 * model.init_state(rows).nbytes


def decode(prepared: Prepared, rows: int, threads: int, folder: Path | None, seconds: float) -> Heat:
    """Time decoding beside llama.cpp with about as many bits, and beside the time to read the weights and the state."""
    torch.set_num_threads(threads)
    model, weights, expected = prepared.model, prepared.weights, prepared.expected[PROMPT]
    contenders = [decoding(prepared, rows)]
    with ExitStack() as opened:
        for file in files_of(folder, weights):
            runner = opened.enter_context(closing(LlamaCpp(file, rows, threads)))
            contenders.append(llama_decoding(runner, weights, expected))
        if weights == "float32" and rows == 1:
            contenders += rwkv_package(prepared, PROMPT, decodes=True)
        memory = ones_in_huge_pages(2**26)
        contenders.append(Contender("reading memory", memory.sum, 1))
        *paths, reading = race(contenders, seconds, CPU, say)
    bandwidth = 4 * memory.numel() / (reading.seconds or 1)
    floor = moved_bytes(model, weights, rows) / bandwidth
    paths = [replace(row, share_of_floor=row.seconds and floor / (row.seconds / STEPS)) for row in paths]
    title = f"{rows} rows, {threads} threads, memory bandwidth {bandwidth / 1e9:.1f} GB/s in the same rounds"
    return Heat(title=title, bandwidth=bandwidth, paths=paths)


def rwkv_package(prepared: Prepared, length: int, *, decodes: bool) -> list[Contender]:
    """Return a contender of the package rwkv that decodes STEPS tokens or reads a prompt; [] where it cannot run."""
    model = prepared.model
    # The package converts its own copy of the weights.
    if free_memory(CPU) < 3 * sum(p.nbytes for p in model.parameters()):
        say("there is too little memory for the package rwkv: it is skipped")
        return []
    try:
        runner = RwkvPackage(model)
    except ImportError:
        say("the package rwkv is not installed: it is skipped")
        return []
    tokens = prompt(length, model.config.vocab_size)
    fault = differs(runner(tokens), prepared.expected[length], 1e-3)

    def call() -> None:
        if decodes:
            for _ in range(STEPS):
                runner([5])
        else:
            runner.clear()
            runner(tokens)

    return [Contender("rwkv float32", call, STEPS if decodes else length, fault)]


def prefill(prepared: Prepared, length: int, folder: Path | None, seconds: float) -> Heat:
    """Time reading a prompt, beside llama.cpp and the package rwkv. Only the last token gets logits."""
    model, weights, stepper = prepared.model, prepared.weights, prepared.stepper
    tokens, threads, expected = (
        prompt(length, model.config.vocab_size),
        torch.get_num_threads(),
        prepared.expected[length],
    )

    def call() -> None:
        engine = Engine(model, step=stepper)
        engine.add(Request(tokens, 1, Sampler(temperature=0)))
        while engine.busy:
            engine.step()

    logits, _ = stepper(
        torch.tensor(tokens), model.init_state(1), torch.zeros(1, dtype=torch.int64), torch.tensor([length])
    )
    contenders = [Contender(f"timemix {weights}", call, length, prepared.fault(logits[0], length))]
    with ExitStack() as opened:
        for file in files_of(folder, weights):
            runner = opened.enter_context(closing(LlamaCpp(file, 1, threads)))

            def read(runner: LlamaCpp = runner) -> None:
                runner.clear()
                runner([tokens])

            read()
            fault = differs(runner.logits(len(expected)), expected, TOLERANCE[weights])
            contenders.append(Contender(f"llama.cpp {runner.name}", read, length, fault))
        if weights == "float32" and length <= 1024:
            contenders += rwkv_package(prepared, length, decodes=False)
        size = 2048 if model.config.channels > 64 else 64
        *paths, product = race([*contenders, square_product(size, "float32")], seconds, CPU, say)
    peak = 2 * size**3 / (product.seconds or 1)
    # The head computes logits of one token only.
    inside = 2 * sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear))
    paths = [replace(row, share_of_peak=row.seconds and inside * length / row.seconds / peak) for row in paths]
    return Heat(
        title=f"prompt of {length} tokens, {threads} threads; float32 peak {peak / 1e9:.0f} GFLOP/s", paths=paths
    )


def far_position(seconds: float, far: int) -> Heat:
    """Time decoding at position 100 and at a far position, which is really decoded, with the memory of the process."""
    model = random_model(rwkv7(4, 128, 65))
    stepper, token, place = build_step(model), torch.tensor([5]), torch.zeros(1, dtype=torch.int64)
    memory: dict[str, int] = {}

    def at(position: int) -> Contender:
        state = model.init_state(1)
        for _ in range(position):
            _, state = stepper(token, state, place)

        def call() -> None:
            nonlocal state
            for _ in range(STEPS):
                _, state = stepper(token, state, place)

        memory[f"position {position:,}"] = resident_memory()
        return Contender(f"position {position:,}", call, STEPS)

    paths = race([at(100), at(far)], seconds, CPU, say)
    return Heat(title=f"4 x 128; {stepper.reason}", paths=[replace(row, peak_memory=memory[row.name]) for row in paths])


PUBLISHED = {"0.19 B": (12, 768), "0.4 B": (24, 1024), "1.5 B": (24, 2048)}
"""Layers and channels of published sizes with the World vocabulary of 65,536 tokens."""


def published_size(name: str, toy: bool) -> LanguageModel:
    layers, channels = (2, 64) if toy else PUBLISHED[name]
    return random_model(rwkv7(layers, channels, 96 if toy else 65536)).eval()


def generation(record: Record, name: str, folder: Path | None, toy: bool, seconds: float, longest: int) -> None:
    keep_freed_memory()
    model, threads = published_size(name, toy), torch.get_num_threads()
    seconds = 0.01 if toy else seconds
    lengths = tuple(length for length in ((8, 24) if toy else (512, 4096)) if length <= longest)
    for weights in WEIGHTS:
        prompts = lengths if weights in ("float32", "bfloat16") else ()
        parts: dict[str, Callable[[Prepared], Heat]] = {}
        for count in sorted({1, threads}):
            parts[f"decode in {weights}, {count} threads"] = partial(
                decode, rows=1, threads=count, folder=folder, seconds=seconds
            )
        for rows in (8, 32):
            parts[f"decode in {weights}, {rows} rows"] = partial(
                decode, rows=rows, threads=threads, folder=folder, seconds=seconds
            )
        for length in prompts:
            parts[f"prefill of {length} tokens in {weights}"] = partial(
                prefill, length=length, folder=folder, seconds=seconds
            )
        wanted = {part: work for part, work in parts.items() if f"{name}: {part}" not in record.parts}
        if not wanted:
            continue
        # The weights are rounded and packed once for all parts, which takes minutes for a large model.
        prepared = Prepared(model, weights, (PROMPT, *prompts))
        for part, work in wanted.items():
            record.part(f"{name}: {part}", partial(work, prepared))
            torch.set_num_threads(threads)
    if name == "0.19 B":
        record.part("far position", lambda: far_position(seconds, 1000 if toy else 10**6))
