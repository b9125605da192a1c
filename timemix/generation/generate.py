"""Writing text with one call: prompts in, tokens or text out. It all goes through the engine."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.generation.engine import Context, Engine, Request
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
        raise InvalidValue("the prompt is empty; give at least one token to go on from")
    engine = Engine(model, places=len(prompts), weights=weights)
    for i, prompt in enumerate(prompts):
        engine.add(Request(list(prompt), tokens, sampler.row(i), seed, i, context=context, keep=keep))
    for _ in range(tokens):
        yield torch.tensor([event.token for event in engine.step()])


def stream_text(
    loaded: Loaded,
    prompt: str,
    *,
    tokens: int = 200,
    sampler: Sampler | None = None,
    seed: int = 0,
    count: int = 1,
    context: Context = "reanchor",
    stop: str | Sequence[str] = (),
    weights: Weights = "float32",
) -> Iterator[list[str]]:
    """Yields, token by token, the new text of each of `count` samples; never half a character.

    A sample ends at the first of the `stop` strings. Raises TimemixError for a prompt that is empty or has characters
    outside the vocabulary.
    """
    ids = loaded.tokenizer.encode(prompt).tolist()
    engine = Engine(loaded.model, loaded.tokenizer, places=count, weights=weights)
    stop = stop if isinstance(stop, str) else tuple(stop)
    for i in range(count):
        engine.add(Request(ids, tokens, sampler or Sampler(), seed, i, stop, context=context))
    while engine.busy:
        pieces = {event.id: event.text for event in engine.step()}
        yield [pieces.get(i, "") for i in range(count)]


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
    """`count` texts that go on from `prompt` (not included), at most `tokens` tokens each.

    `run`: a run folder, or what `load` gave. `weights`: float32, bfloat16 or int8, what the model's are rounded to for
    speed. Raises TimemixError as `load` and `stream_text` do.
    """
    loaded = run if isinstance(run, Loaded) else load(run)
    pieces = stream_text(
        loaded,
        prompt,
        tokens=tokens,
        sampler=sampler,
        seed=seed,
        count=count,
        context=context,
        stop=stop,
        weights=weights,
    )
    return ["".join(parts) for parts in zip(*pieces, strict=True)]
