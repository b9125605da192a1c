"""Generation with one call: prompts in, tokens or text out, all through the engine."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.generation.engine import Engine
from timemix.generation.request import Context, Event, Request
from timemix.generation.sampler import Sampler
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import Weights
from timemix.runs.load import Loaded, load


def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampler: Sampler,
    *,
    seed: int = 0,
    context: Context = "reanchor",
    keep: float = 0.5,
    weights: Weights = "float32",
) -> Iterator[Tensor]:
    """Yields `tokens` times the next token of every row, (B,) int64; prompts may differ in length.

    Row i draws from (seed, i, number of the token), so that it does not depend on the other rows. The rest as in
    `engine.Request`, whose errors it raises too.
    """
    if not prompts:
        raise InvalidValue("the prompt is empty; give at least one token")
    engine = Engine(model, slots=len(prompts), weights=weights)
    for i, prompt in enumerate(prompts):
        engine.add(Request(list(prompt), tokens, sampler.row(i), seed, i, context=context, keep=keep))
    for _ in range(tokens):
        yield torch.tensor([event.token for event in engine.step()])


def stream(
    run: str | Path | Loaded,
    prompt: str,
    *,
    tokens: int = 200,
    seed: int = 0,
    context: Context = "reanchor",
    sampler: Sampler | None = None,
    stop: str | Sequence[str] = (),
    weights: Weights = "float32",
) -> Iterator[str]:
    """Generate one text, piece by piece: `for piece in stream(run, "The "): print(piece, end="")`.

    Args:
        run: Run folder, checkpoint folder, or what `load` returned.
        prompt: Text to continue, not empty.
        tokens: Largest number of tokens to generate, at least 0.
        seed: 0 to 2^64 - 1; the same seed gives the same text.
        context: "reanchor" or "exact", see `Request`.
        sampler: How tokens are drawn; None: temperature 1, no filter.
        stop: String, or strings, before the first of which the text ends.
        weights: "float32", "bfloat16" or "int8": rounding of the weights; fewer bytes are faster.

    Returns:
        Iterator over pieces of the text after the prompt, of whole characters; a piece may be empty.

    Raises:
        InvalidValue: The prompt is empty or has characters outside the vocabulary, or a number is out of its range.
        FileError: The run cannot be loaded.
    """
    engine = _engine(run, prompt, 1, tokens, sampler, seed, context, stop, weights)
    return (event.text for event in _events(engine))


def _engine(
    run: str | Path | Loaded,
    prompt: str,
    count: int,
    tokens: int,
    sampler: Sampler | None,
    seed: int,
    context: Context,
    stop: str | Sequence[str],
    weights: Weights,
) -> Engine:
    """Create an engine with `count` requests, whose ids are 0 to count - 1."""
    loaded = run if isinstance(run, Loaded) else load(run)
    ids = loaded.tokenizer.encode(prompt).tolist()
    engine = Engine(loaded.model, loaded.tokenizer, slots=count, weights=weights)
    stop = stop if isinstance(stop, str) else tuple(stop)
    for i in range(count):
        engine.add(Request(ids, tokens, sampler or Sampler(), seed, i, stop, context=context))
    return engine


def _events(engine: Engine) -> Iterator[Event]:
    while engine.busy:
        yield from engine.step()


def generate(
    run: str | Path | Loaded,
    prompt: str,
    *,
    tokens: int = 200,
    count: int = 1,
    seed: int = 0,
    context: Context = "reanchor",
    sampler: Sampler | None = None,
    stop: str | Sequence[str] = (),
    weights: Weights = "float32",
) -> list[str]:
    """Generate texts that continue a prompt.

    Args:
        run: Run folder, checkpoint folder, or what `load` returned.
        prompt: Text to continue, not empty.
        tokens: Largest number of tokens of each text, at least 0.
        count: Number of texts, at least 1.
        seed: 0 to 2^64 - 1; the same seed gives the same texts.
        context: "reanchor" or "exact", see `Request`.
        sampler: How tokens are drawn; None: temperature 1, no filter.
        stop: String, or strings, before the first of which a text ends.
        weights: "float32", "bfloat16" or "int8": rounding of the weights; fewer bytes are faster.

    Returns:
        `count` texts, without the prompt.

    Raises:
        InvalidValue: The prompt is empty or has characters outside the vocabulary, or a number is out of its range.
        FileError: The run cannot be loaded.
    """
    engine = _engine(run, prompt, count, tokens, sampler, seed, context, stop, weights)
    texts = [""] * count
    for event in _events(engine):
        texts[event.id] += event.text
    return texts
