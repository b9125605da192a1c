"""Compare the speed of generation with a cached Llama and with the memory bandwidth, for `timemix bench sample`.

The least possible time of a step (the floor) is the time to read its weights and its state from memory, at the memory
bandwidth that the benchmark measures. A step can be faster than the floor if the weights fit in the cache of the
processor.
"""

import copy
import math
import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from timemix.bench.baselines import LIBRARY, WITHOUT_LIBRARY, library_like
from timemix.bench.race import Contender, Heat, Path, Report, Say, machine_now, race
from timemix.errors import InvalidValue
from timemix.generation.decode import Step, build_step
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import GROUP, WEIGHTS, Weights, linear_weights, rounded
from timemix.models.state import State
from timemix.reporting.plots import save_picture
from timemix.runtime.machine import largest_cache, ones_in_huge_pages, peak_memory
from timemix.training.compiling import choose_compile

STEPS = 16
"""Number of consecutive tokens that a contender generates in each call."""

Steps = dict[Weights, tuple[Step, LanguageModel]]
"""For each format of the weights, a step and the model whose logits the step must reproduce."""

POSITIONS = (1, 100, 1_000, 10_000, 100_000, 1_000_000)
_BYTES: dict[Weights, float] = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5 + 2 / GROUP}


def bench_sample(model: ModelConfig, *, batches: Sequence[int], seconds: float, say: Say) -> Report:
    """Time generation with random weights: one text, batches of texts, late positions, and the first token of a prompt.

    Args:
        model: Config of the model.
        batches: Batch sizes: numbers of texts that are generated together.
        seconds: Mean time to spend on each implementation, in seconds.
        say: Function that prints a progress line.

    Raises:
        InvalidValue: The context is too short for the timed tokens.
    """
    if model.ctx_len < 2 * STEPS:
        raise InvalidValue(
            f"model.ctx_len is {model.ctx_len}, but bench sample generates {STEPS} tokens per call; give at least"
            f" {2 * STEPS}"
        )
    device = torch.device("cpu")
    torch.manual_seed(0)
    ours = LanguageModel(model).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    steps = _steps(ours)
    step = steps["float32"][0]
    results = [
        _alone(ours, steps, seconds, say),
        _in_batches(ours, steps, batches, seconds, say),
        _by_position(ours, step, seconds, say),
        _first_token(ours, step, seconds, say),
    ]
    cache = largest_cache()
    fits = [w for w in WEIGHTS if cache is not None and _weight_bytes(ours, w) < cache]
    work = (
        f"generation: {model.arch}, {sum(p.numel() for p in ours.parameters()):,} parameters, "
        f"{model.size_words()}; {step.reason}"
    )
    if fits:
        work += f"; weights in {' and '.join(fits)} fit the largest cache, {cast(int, cache) / 2**20:.0f} MiB"
    return Report(work, machine_now(device), results)


@torch.no_grad()
def _alone(model: LanguageModel, steps: Steps, seconds: float, say: Say) -> Heat:
    """Time the generation of one text by each contender, from the middle of the context."""
    position = _middle(model)
    tokens = torch.randint(model.config.vocab_size, (1, model.config.ctx_len))

    def recompute() -> None:
        for _ in range(2):
            model(tokens, logits="last")

    contenders = [Contender("recomputing the context float32", torch.no_grad()(recompute), 2)]
    forward = build_step(model, backend="model")
    contenders.append(_stepping("the model's forward float32", forward, model, 1, position, model))
    if steps["float32"][0].compiled:
        for weights, (step, expected) in steps.items():
            contenders.append(_stepping(f"step {weights}", step, model, 1, position, expected))
    contenders += _library_models(model, position, say)
    memory = ones_in_huge_pages(2**26)
    contenders.append(Contender("reading memory", memory.sum, 1))
    *rows, reading = race(contenders, seconds, torch.device("cpu"), say)
    # The bandwidth is measured in alternation with the steps, since other programs on the machine change the bandwidth.
    assert reading.seconds is not None
    bandwidth = 4 * memory.numel() / reading.seconds
    paths = []
    for row in rows:
        if row.name.startswith("step") and row.seconds is not None:
            weights = cast(Weights, row.name.split()[-1])
            moved = _weight_bytes(model, weights) + _state_bytes(model, steps[weights][0], position)
            row = replace(row, share_of_floor=moved / bandwidth / (row.seconds / STEPS))
        paths.append(row)
    title = f"one text, position {position}, memory bandwidth {bandwidth / 1e9:.0f} GB/s in the same rounds"
    return Heat(title=title, bandwidth=bandwidth, paths=_per_token(paths))


def _steps(model: LanguageModel) -> Steps:
    """Return the compiled step for each format of the weights, or the model's own forward if no step is compiled."""
    step = build_step(model)
    if not step.compiled:
        return {"float32": (step, model)}
    return {weights: (build_step(model, weights), rounded(model, weights)) for weights in WEIGHTS}


def _stepping(
    name: str, step: Step, model: LanguageModel, rows: int, position: int, expected: LanguageModel
) -> Contender:
    """Return a contender of STEPS steps from a position, with a fault if the first logits differ from `expected`.

    Args:
        name: Name of the contender.
        step: The generation step.
        model: Model that creates the state.
        rows: Number of texts.
        position: First position.
        expected: Model that computes the expected logits.
    """
    state = standing(model, rows, position)
    places, tokens = torch.arange(rows), torch.randint(model.config.vocab_size, (rows,))
    found, _ = step(tokens, state.clone(), places)
    with torch.no_grad():
        theirs, _ = expected(tokens[:, None], state.clone(), logits="last")
    worst = float((found - theirs).abs().max() / theirs.abs().max())
    # With bfloat16 weights, a step can round the inputs of linear maps too.
    tolerance = 0.05 if name.endswith("bfloat16") else 1e-4
    fault = None if worst <= tolerance else f"parity failed: the logit error is {worst:.1e} times the largest logit"

    # Sums over the past are computed once per block of positions. If a row returned to an earlier position, the step
    # would recompute these sums.
    drifts = step.compiled and model.max_position is not None
    limit = model.max_position or 2**62

    def call() -> None:
        nonlocal state
        if not drifts or int(state.position[0]) + STEPS > limit:
            state.position.fill_(position)
        for _ in range(STEPS):
            _, state = step(tokens, state, places)

    return Contender(name, call, rows * STEPS, fault)


def standing(model: LanguageModel, rows: int, position: int) -> State:
    """Return a state with random content, as after some tokens of each text.

    Args:
        model: Model that creates the state.
        rows: Number of texts.
        position: Number of tokens of each text.

    Returns:
        The state.
    """
    state = model.init_state(rows)
    for layer in state.layers:
        for name, x in layer.items():
            x.copy_(torch.rand_like(x) if name == "denominators" else torch.randn_like(x))
    state.position.fill_(position)
    return state


def _library_models(model: LanguageModel, position: int, say: Say) -> list[Contender]:
    """Return contenders of a Llama with `position` cached tokens, or [] if `transformers` is not installed."""
    library = library_like(model.config, torch.device("cpu"))
    if library is None:
        say(WITHOUT_LIBRARY)
        return []
    models = {"float32": library.eval(), "bfloat16": copy.deepcopy(library).bfloat16()}
    found = [_library_step(each, weights, position) for weights, each in models.items()]
    wanted, why = choose_compile("auto", math.inf, torch.device("cpu"))
    if not wanted:
        say(f"{LIBRARY} is not compiled: {why}")
        return found
    return found + [_library_compiled(each, weights, model.config.ctx_len) for weights, each in models.items()]


def _library_step(library: nn.Module, weights: str, position: int) -> Contender:
    from transformers import DynamicCache

    vocab_size = cast(Any, library.config).vocab_size
    cache, token = DynamicCache(), torch.zeros(1, 1, dtype=torch.int64)
    library(torch.randint(vocab_size, (1, position)), cache=cache, use_cache=True)

    @torch.no_grad()
    def call() -> None:
        for _ in range(STEPS):
            library(token, cache=cache, use_cache=True)
        cache.crop(-STEPS)

    return Contender(f"{LIBRARY} with its cache {weights}", call, STEPS)


def _library_compiled(library: nn.Module, weights: str, ctx_len: int) -> Contender:
    """Return a compiled step of the Llama with a fixed-size cache. Each token attends to the whole cache."""
    from transformers import StaticCache

    cache, token = StaticCache(config=library.config, max_cache_len=ctx_len), torch.zeros(1, 1, dtype=torch.int64)
    compiled = torch.compile(library, dynamic=False)

    @torch.no_grad()
    def call() -> None:
        cache.reset()
        for _ in range(STEPS):
            compiled(token, cache=cache, use_cache=True)

    return Contender(f"{LIBRARY} with its fixed-size cache, compiled {weights}", call, STEPS)


def _in_batches(model: LanguageModel, steps: Steps, batches: Sequence[int], seconds: float, say: Say) -> Heat:
    """Time the generation of several texts together, with each format of the weights."""
    position = _middle(model)
    contenders = [
        _stepping(f"{rows} x step {weights}", step, model, rows, position, expected)
        for weights, (step, expected) in steps.items()
        for rows in batches
    ]
    rows = race(contenders, seconds, torch.device("cpu"), say)
    return Heat(title=f"batches of texts, position {position}", paths=_per_token(rows))


def _by_position(model: LanguageModel, step: Step, seconds: float, say: Say) -> Heat:
    """Time a generated token at each position of POSITIONS, with the mean cost of re-reading a bounded context."""
    limit = model.max_position
    kept = None if limit is None else max(1, limit // 2)
    places = {p: p if limit is None or p < limit else kept + (p - limit) % (limit - kept) for p in POSITIONS}  # type: ignore[operator]
    contenders = [
        _stepping(f"position {p:,}", step, model, 1, min(place, (limit or place + STEPS) - STEPS), model)
        for p, place in places.items()
    ]
    rows = race(contenders, seconds, torch.device("cpu"), say)
    again = 0.0
    if limit is not None and kept is not None:
        (reading,) = race([_reading(f"{kept}", model, kept, step)], seconds, torch.device("cpu"), say)
        again = (reading.seconds or 0.0) / (limit - kept)
    paths = []
    for position, row, contender in zip(POSITIONS, rows, contenders, strict=True):
        if row.seconds is not None:
            if limit is not None and position >= limit:
                seconds_here = row.seconds + again * STEPS
                row = replace(row, seconds=seconds_here, tokens_per_second=STEPS / seconds_here)
            contender.call()
            # The peak memory of a process never falls. A position that needs more memory raises the peak.
            peak = peak_memory(torch.device("cpu"))
            row = replace(row, state_bytes=model.init_state(1).nbytes, peak_memory=peak)
        paths.append(row)
    title = "time of a token at each position"
    if limit is not None:
        title += f", re-reading {kept} tokens every {limit - cast(int, kept)}"
    return Heat(title=title, paths=_per_token(paths))


def _first_token(model: LanguageModel, step: Step, seconds: float, say: Say) -> Heat:
    """Compare the time to the first token after a prompt with the forward pass of training."""
    ctx_len = model.config.ctx_len
    rows = torch.randint(model.config.vocab_size, (16, ctx_len))

    def forward() -> None:
        model(rows)

    contenders = [Contender(f"forward as in training, 16 x {ctx_len}", forward, rows.numel())]
    lengths = {1, 16, ctx_len // 4, ctx_len} | ({4 * ctx_len} if model.max_position is None else set())
    contenders += [_reading(f"prompt of {n}", model, n, step) for n in sorted(lengths)]
    return Heat(title="time to the first token", paths=race(contenders, seconds, torch.device("cpu"), say))


def _reading(name: str, model: LanguageModel, length: int, step: Step) -> Contender:
    prompt = torch.randint(model.config.vocab_size, (length,)).tolist()

    def call() -> None:
        engine = Engine(model, step=step)
        engine.add(Request(prompt, 1, Sampler(temperature=0)))
        while engine.busy:
            engine.step()

    return Contender(name, call, length)


def _per_token(rows: list[Path]) -> list[Path]:
    """Return rows in which `seconds` is the time per token of each text, not the time per call."""
    return [
        row
        if row.seconds is None
        else replace(row, seconds=row.seconds / (2 if row.name.startswith("recomputing") else STEPS))
        for row in rows
    ]


def _middle(model: LanguageModel) -> int:
    return max(1, model.config.ctx_len // 2 - STEPS // 2)


def _weight_bytes(model: LanguageModel, weights: Weights) -> int:
    """Return the size in bytes of the weights that a step reads: all weights but the embedding."""
    linear = list(linear_weights(model, weights))
    rest = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    rest -= sum(w.numel() for w, _ in linear)
    return int(sum(w.numel() * _BYTES[own] for w, own in linear)) + rest * 4


def _state_bytes(model: LanguageModel, step: Step, position: int) -> int:
    """Return the size in bytes of the part of a text's state that a step reads at a position."""
    state = model.init_state(1)
    ends = model.max_position is not None
    total = 0
    read = step.looks_back(position)
    for layer in state.layers:
        for x in layer.values():
            part = read / x.shape[2] if ends and x.ndim == 4 and x.shape[2] == model.max_position else 1
            total += int(part * x.numel() * x.element_size())
    return total


def draw_batches(report: Report, path: pathlib.Path) -> None:
    """Plot the tokens per second of a batch against the number of texts in the batch.

    Args:
        report: Report of `bench_sample`.
        path: Path of the picture, .png or .svg.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in report.results[1].paths:
        if row.tokens_per_second is not None:
            rows, _, name = row.name.partition(" x ")
            lines.setdefault(name, []).append((int(rows), row.tokens_per_second))
    for name, points in lines.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=name.removeprefix("step "))
    batches = sorted({rows for points in lines.values() for rows, _ in points})
    axes.set_xticks(batches, [str(rows) for rows in batches])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("number of texts in a batch")
    axes.set_ylabel("tokens/s of all texts of the batch")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_picture(figure, path)
