"""Functions that generate tokens or text from prompts with one call, through the engine."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from timemix.errors import InvalidValue, NotFinite
from timemix.generation.engine import Engine
from timemix.generation.prompts import prompt_ids
from timemix.generation.request import Context, Event, Request, is_integer
from timemix.generation.sampler import Sampler
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import Weights
from timemix.runs.load import Loaded, load


def events_of(engine: Engine) -> Iterator[Event]:
    """Yield the events of an engine until no request is left.

    Args:
        engine: The engine; this function calls its `step`.

    Yields:
        The events, in the order of generation.

    Raises:
        NotFinite: The logits of a text are not finite.
    """
    while engine.busy:
        for event in engine.step():
            if event.finished == "error":
                raise NotFinite(f"sample {event.sample} cannot continue: {event.reason}")
            yield event


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
) -> list[list[int]]:
    """Generate `tokens` tokens after each of several prompts, which may differ in length.

    The draws of row i depend on (seed, i, number of the token) alone, not on the other rows.

    Args:
        model: The model.
        prompts: Token ids of each prompt, at least one prompt of at least one token.
        tokens: Number of tokens to generate for each prompt, at least 0.
        sampler: Sampler of the tokens; a field with several numbers has one number per prompt.
        seed: Random seed, 0 to 2^64 - 1.
        context: Rule for a full context: "reanchor" or "exact", see `Request`.
        keep: Share of the context that "reanchor" processes again, above 0 and at most 1.
        weights: Format to which the linear weights are rounded: "float32", "bfloat16", "int8" or "int4".

    Returns:
        The generated token ids of each prompt, without the prompt.

    Raises:
        InvalidValue: There is no prompt, or `Request` or `Engine` rejects an argument.
        NotFinite: The logits of a text are not finite.
    """
    if not prompts:
        raise InvalidValue("prompts is empty; give at least one prompt")
    for name, value in vars(sampler).items():
        if isinstance(value, tuple) and len(value) != len(prompts):
            raise InvalidValue(
                f"{name} has {len(value)} numbers for {len(prompts)} prompts; give one, or one per prompt"
            )
    engine = Engine(model, slots=len(prompts), weights=weights)
    for i, prompt in enumerate(prompts):
        engine.add(Request(prompt, tokens, sampler.row(i), seed, i, context=context, keep=keep))
    texts: list[list[int]] = [[] for _ in prompts]
    for event in events_of(engine):
        if event.token is not None:
            texts[event.id].append(event.token)
    return texts


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
    """Generate one text that continues a prompt, piece by piece.

        for piece in timemix.stream(run, "The "):
            print(piece, end="")

    Args:
        run: Run folder, checkpoint folder, or the result of `load`.
        prompt: Text to continue. Empty: the beginning of a document, if the tokenizer has an end of text.
        tokens: Largest number of tokens to generate, at least 0.
        seed: Random seed, 0 to 2^64 - 1; the same seed gives the same text.
        context: Rule for a full context: "reanchor" or "exact", see `Request`.
        sampler: Sampler of the tokens; None: temperature 1 without filters.
        stop: One stop string or several; the text ends before the first stop string that occurs.
        weights: Format to which the linear weights are rounded, "float32", "bfloat16", "int8" or "int4"; a format with
            fewer bits is faster.

    Returns:
        Iterator over pieces of the text after the prompt. A piece has at least one character.

    Raises:
        InvalidValue: The prompt has no tokens or unknown characters, or a number is out of its range.
        FileError: The run cannot be loaded.
        NotFinite: The logits of the model are not finite.
    """
    engine = _engine(run, prompt, 1, tokens, sampler, seed, context, stop, weights)
    return (event.text for event in events_of(engine) if event.text)


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
    """Create an engine with one request for `count` samples."""
    if not (is_integer(count) and count >= 1):
        raise InvalidValue(f"count is {count!r}; it must be a whole number, at least 1")
    loaded = run if isinstance(run, Loaded) else load(run)
    tokenizer = loaded.tokenizer
    engine = Engine(loaded.model, tokenizer, slots=count, weights=weights)
    ends = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    ids = prompt_ids(tokenizer, prompt)
    request = Request(
        ids, tokens, sampler or Sampler(), seed, stop=stop, context=context, samples=count, stop_tokens=ends
    )
    engine.add(request)
    return engine


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
        run: Run folder, checkpoint folder, or the result of `load`.
        prompt: Text to continue. Empty: the beginning of a document, if the tokenizer has an end of text.
        tokens: Largest number of tokens of each text, at least 0.
        count: Number of texts, at least 1.
        seed: Random seed, 0 to 2^64 - 1; the same seed gives the same texts.
        context: Rule for a full context: "reanchor" or "exact", see `Request`.
        sampler: Sampler of the tokens; None: temperature 1 without filters.
        stop: One stop string or several; a text ends before the first stop string that occurs.
        weights: Format to which the linear weights are rounded, "float32", "bfloat16", "int8" or "int4"; a format with
            fewer bits is faster.

    Returns:
        `count` texts, without the prompt.

    Raises:
        InvalidValue: The prompt has no tokens or unknown characters, or a number is out of its range.
        FileError: The run cannot be loaded.
        NotFinite: The logits of the model are not finite.
    """
    engine = _engine(run, prompt, count, tokens, sampler, seed, context, stop, weights)
    texts = [""] * count
    for event in events_of(engine):
        texts[event.sample] += event.text
    return texts
