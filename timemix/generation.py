"""Writing text: a prompt is read in one piece, then every token costs one step, at any length."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from timemix.checkpoint import Loaded, load
from timemix.errors import UserError
from timemix.models import LanguageModel, State
from timemix.sampling import Sampler, draw

Context = Literal["reanchor", "exact"]


@torch.inference_mode()
def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampler: Sampler,
    *,
    seed: int = 0,
    context: Context = "reanchor",
    keep: float = 0.5,
) -> Iterator[Tensor]:
    """Yields `tokens` times the next token of every row, (B,) int64; prompts may differ in length.

    Past the model's `max_position`: "reanchor" keeps the newest share `keep` of the context, prefills it at
    position 0 and goes on, so that the cost per token stays constant; "exact" recomputes the newest
    max_position tokens for every token, as the original code did. A longer prompt is cut to its end. Row i
    draws from (seed, i, number of the token), so that it does not depend on the other rows.

    Raises UserError for an empty prompt or `keep` outside (0, 1].
    """
    if not prompts or any(len(p) == 0 for p in prompts):
        raise UserError("the prompt is empty; give at least one token to go on from")
    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep}; it is a share of the context, above 0 and at most 1")
    limit = model.max_position
    kept = None if limit is None else limit if context == "exact" else max(1, int(keep * limit))
    texts = [list(p) for p in prompts]
    seen = torch.zeros(len(texts), model.config.vocab_size, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, text] = True

    state, logits = _prefill(model, [t if limit is None else t[-limit:] for t in texts])
    for number in range(tokens):
        probabilities = sampler.probabilities(logits, seen)
        new = draw(probabilities, seed=seed, sample=range(len(texts)), position=[number] * len(texts))
        for row, token in enumerate(new.tolist()):
            texts[row].append(token)
            seen[row, token] = True
        yield new
        if number == tokens - 1:
            return
        full = [] if limit is None else (state.position >= limit).nonzero().flatten().tolist()
        if not full:
            logits, state = model(new[:, None].to(model.device), state, logits="last")
            continue
        assert limit is not None
        assert kept is not None
        fresh = {row: texts[row][-kept:] for row in full}
        stepped = [row for row in range(len(texts)) if row not in fresh]
        parts = [(full, *_prefill(model, list(fresh.values())))]
        if stepped:
            rows = torch.tensor(stepped, device=model.device)
            stepped_logits, rest = model(new[stepped, None].to(model.device), state.select(rows), logits="last")
            parts.append((stepped, rest, stepped_logits))
        state, logits = _in_row_order(parts)
        for text in texts:
            del text[:-limit]


def _prefill(model: LanguageModel, texts: list[list[int]]) -> tuple[State, Tensor]:
    """State after texts of any lengths, and the logits after the last token of each (B, V)."""
    lengths = torch.tensor([len(t) for t in texts], device=model.device)
    longest = int(lengths.max())
    padded = torch.tensor([t + [0] * (longest - len(t)) for t in texts], device=model.device)
    same = bool((lengths == longest).all())
    logits, state = model(padded, model.init_state(len(texts)), lengths=None if same else lengths, logits="last")
    assert state is not None
    return state, logits


def _in_row_order(parts: list[tuple[list[int], State, Tensor]]) -> tuple[State, Tensor]:
    """State and logits of parts of a batch, joined; each part comes with its row numbers."""
    states = [state for _, state, _ in parts]
    joined = State(
        torch.cat([s.position for s in states]),
        [
            {n: torch.cat([layer[n] for layer in layers]) for n in layers[0]}
            for layers in zip(*(s.layers for s in states), strict=True)
        ],
    )
    rows = torch.tensor([row for numbers, _, _ in parts for row in numbers])
    order = rows.argsort().to(joined.position.device)
    return joined.select(order), torch.cat([logits for _, _, logits in parts])[order]


def stream_text(
    loaded: Loaded,
    prompt: str,
    *,
    tokens: int = 200,
    sampler: Sampler | None = None,
    seed: int = 0,
    count: int = 1,
    context: Context = "reanchor",
) -> Iterator[list[str]]:
    """Yields, token by token, the new text of each of `count` samples; never half a character.

    Raises UserError for a prompt that is empty or has characters outside the vocabulary.
    """
    ids = loaded.tokenizer.encode(prompt).tolist()
    streams = [loaded.tokenizer.stream() for _ in range(count)]
    # A word tokenizer puts a space before a word that follows another.
    for stream in streams:
        for token in ids:
            stream.push(token)
    for new in generate_tokens(loaded.model, [ids] * count, tokens, sampler or Sampler(), seed=seed, context=context):
        yield [stream.push(token) for stream, token in zip(streams, new.tolist(), strict=True)]
    yield [stream.flush() for stream in streams]


def generate(
    run: str | Path | Loaded,
    prompt: str,
    *,
    tokens: int = 200,
    count: int = 1,
    seed: int = 0,
    context: Context = "reanchor",
    sampler: Sampler | None = None,
) -> list[str]:
    """`count` texts that go on from `prompt` (not included), `tokens` tokens each.

    `run`: a run folder, or what `load` gave. Raises UserError as `load` and `stream_text` do.
    """
    loaded = run if isinstance(run, Loaded) else load(run)
    pieces = list(stream_text(loaded, prompt, tokens=tokens, sampler=sampler, seed=seed, count=count, context=context))
    return ["".join(parts) for parts in zip(*pieces, strict=True)]
