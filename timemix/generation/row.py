"""A text in progress inside the engine, and the decoder that emits this text."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from timemix.generation.prefix_cache import Prefix
from timemix.generation.random_draws import Uniforms
from timemix.generation.request import Event, Finished, Request
from timemix.models.state import State
from timemix.tokenizers.base import Tokenizer

UNFINISHED = 4
"""Number of tokens to store for an unfinished character: three tokens for its bytes, and one more token."""


TOKENS_KEPT = 64
"""Number of newest tokens of a text that a session keeps at least, enough for every stop string of a chat template."""


class Emitter:
    """A decoder that emits whole characters, and holds back text that may begin a stop string.

    Args:
        tokenizer: Tokenizer that decodes the tokens.
        before: Tokens of the text so far, on which the text of the next token depends.
        held: Text that the continued session holds back.
        stop: Stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int], held: str, stop: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream()
        # The text of a token depends on earlier tokens: words need a space between them, and bytes complete a
        # character.
        self._decoder.push_all(np.array(before, np.int64))
        self.held, self._stop = held, stop

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text that can be emitted after a token, and whether a stop string ended the text."""
        text = self.held + self._decoder.push(token)
        # Find the stop string that is complete first. If one stop string ends with another, it begins first.
        found = min(((at + len(each), at) for each in self._stop if (at := text.find(each)) >= 0), default=None)
        if found is not None:
            end, at = found
            self.held = text[end:]
            return text[:at], True
        held = max((_begun(text, each) for each in self._stop), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held], False

    def end(self) -> str:
        """Return all text that was held back, and U+FFFD for an unfinished character."""
        text, self.held = self.held + self._decoder.flush(), ""
        return text


def _begun(text: str, stop: str) -> int:
    """Return the largest number of characters at the end of a text that begin a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Row:
    """One sample of a request.

    Args:
        id: Id of the request.
        request: The request.
        sample: Number of the sample.
        tokens: Newest token ids of the text, including all unread tokens.
        unread: Number of tokens at the end of `tokens` that are not in the state yet.
        position: Number of tokens in the state; 0 again after a restart.
        written: Number of tokens generated so far, including the tokens of a continued session.
        seen: Token ids that occurred in the text.
        counts: Number of times that the generated text contains each of its tokens.
        emitter: Emitter that decodes the tokens; None without a tokenizer.
        state: State from which a pending row begins; None: the state before the first token.
        forks: Number of further samples that begin once this sample has processed the prompt.
        slot: Index of a row of the engine's state; -1 while pending.
        last_read: Count of the engine's clock when the row last processed a piece of its prompt.
        is_cancelled: Whether the row must leave the engine after the step in progress.
        prompt_scores: Log-probability of each prompt token, and (token, log-probability) of the most probable tokens;
            None unless the request asks for them.
        total: Number of prompt tokens: the value of `unread` when the request began, or when its context restarted.
        prefix: Prefixes of the text, for the cache; None if the row does not use the cache.
        cached: Number of prompt tokens whose state came from the cache.
        is_restarted: Whether the context was re-anchored since the newest event.
    """

    id: int
    request: Request
    sample: int
    tokens: list[int]
    unread: int
    position: int
    written: int
    seen: set[int]
    counts: dict[int, int]
    emitter: Emitter | None
    state: State | None
    forks: int = 0
    slot: int = -1
    last_read: int = 0
    is_cancelled: bool = False
    prompt_scores: list[tuple[float | None, tuple[tuple[int, float], ...]]] | None = None
    total: int = 0
    prefix: Prefix | None = None
    cached: int = 0
    is_restarted: bool = False
    first: int = field(init=False)
    """Value of `written` when the request began."""
    uniforms: Uniforms = field(init=False)
    """Random numbers of the sample."""

    def __post_init__(self) -> None:
        self.first, self.uniforms = self.written, Uniforms(int(self.request.seed), int(self.sample))

    @property
    def has_read(self) -> bool:
        """Whether all prompt tokens but the last are processed. Each sample processes the last prompt token itself."""
        request = self.request
        return self.unread == 1 or not (request.tokens or request.keep_session or self.prompt_scores is not None)

    @property
    def progress(self) -> tuple[int, int]:
        """Number of processed prompt tokens, and number of prompt tokens."""
        is_complete = self.written > self.first
        return self.total if is_complete else max(0, self.total - self.unread), self.total

    def piece(self, size: int) -> int:
        """Return the number of tokens to process next, up to the next position that is a multiple of `size`."""
        # Each sample processes the last prompt token itself.
        wanted = self.unread - int(self.forks > 0 or self.request.tokens == 0)
        return min(wanted, size - self.position % size)

    def scored(self, count: int) -> list[tuple[int, int]]:
        """Return (offset i, prompt index) of each prompt token that token i of the next `count` tokens predicts."""
        if self.prompt_scores is None:
            return []
        # Index into the prompt of the token after the first unread token.
        after = len(self.prompt_scores) - self.unread + 1
        return [(i, after + i) for i in range(count) if 0 <= after + i < len(self.prompt_scores)]

    def text(self, token: int, last: bool) -> tuple[str, bool]:
        """Return the text that can be emitted after a token, and whether the token ended the text."""
        is_stop = token in self.request.stop_tokens
        if self.emitter is None:
            return "", is_stop
        if is_stop:
            return self.emitter.end(), True
        text, is_stopped = self.emitter.push(token)
        return text + (self.last_text() if last and not is_stopped else ""), is_stopped

    def last_text(self) -> str:
        """Return the text that the row still holds back at its end; empty if its session keeps that text."""
        return "" if self.emitter is None or self.request.keep_session else self.emitter.end()

    def event(self, token: int | None, text: str, finished: Finished | None, **fields: Any) -> Event:
        """Return the next event of the row. Only the first event has scores of the prompt and counts cached tokens."""
        if self.prompt_scores is not None:
            fields["prompt_log_probabilities"] = tuple(score for score, _ in self.prompt_scores)
            fields["prompt_top_log_probabilities"] = tuple(top for _, top in self.prompt_scores)
        event = Event(
            self.id,
            token,
            text,
            finished=finished,
            sample=self.sample,
            cached=self.cached,
            restarted=self.is_restarted,
            **fields,
        )
        self.prompt_scores, self.cached, self.is_restarted = None, 0, False
        return event


def new_row(id: int, request: Request, tokenizer: Tokenizer | None, limit: int | None) -> Row:
    """Return the first sample of a request.

    Args:
        id: Id of the request.
        request: The request.
        tokenizer: Tokenizer that decodes the text; None: events have no text.
        limit: The model's `max_position`.

    Returns:
        The row, without a slot.
    """
    start, prompt = request.start, list(request.prompt)
    old = [] if start is None else list(start.tokens)
    tokens = [*old, *prompt]
    row = Row(
        id=id,
        request=request,
        sample=request.sample,
        tokens=tokens,
        unread=len(prompt) + (0 if start is None else start.unread),
        position=0 if start is None else int(start.state.position),
        written=0 if start is None else start.written,
        seen=set(prompt) | (set() if start is None else start.seen),
        counts={} if start is None else dict(start.counts),
        emitter=new_emitter(request, tokens, tokenizer),
        state=None if start is None else start.state,
        forks=request.samples - 1,
        prompt_scores=[(None, ())] * len(prompt) if request.prompt_log_probabilities else None,
    )
    if limit is not None and row.position == 0:
        row.unread = min(row.unread, limit)
    row.total = row.unread
    return row


def new_emitter(request: Request, tokens: list[int], tokenizer: Tokenizer | None) -> Emitter | None:
    """Return the emitter of a sample before its first token; None without a tokenizer."""
    if tokenizer is None:
        return None
    held = "" if request.start is None or len(request.prompt) else request.start.held
    return Emitter(tokenizer, tokens[-UNFINISHED:], held, tuple(request.stop))
