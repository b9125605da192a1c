"""A text in progress inside the engine, and the part of it that may be emitted."""

from dataclasses import dataclass, field

import numpy as np

from timemix.generation.request import Request
from timemix.models.state import State
from timemix.tokenizers.base import Tokenizer

UNFINISHED = 4
"""Tokens that hold the bytes of an unfinished character, at most three, and one more."""


class Emitter:
    """Turns tokens into text that can be emitted: whole characters that begin no stop string.

    Args:
        tokenizer: Decodes the tokens.
        before: Tokens of the text before, which decide how the next one begins.
        held: Text that is held back from before.
        stop: Stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int], held: str, stop: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream()
        # A word tokenizer puts a space before a word that follows another; bytes continue an unfinished character.
        self._decoder.push_all(np.array(before, np.int64))
        self.held, self._stop = held, stop

    def push(self, token: int) -> tuple[str, bool]:
        """Return the text that can be emitted after a token, and whether a stop string ended it."""
        text = self.held + self._decoder.push(token)
        # The first to begin; of those the shortest, which streams find first.
        found = min(((at, len(each)) for each in self._stop if (at := text.find(each)) >= 0), default=None)
        if found is not None:
            self.held = text[sum(found) :]
            return text[: found[0]], True
        held = max((_begun(text, each) for each in self._stop), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held], False

    def end(self) -> str:
        """Return all that was held back, and U+FFFD for an unfinished character."""
        text, self.held = self.held + self._decoder.flush(), ""
        return text


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that begin a stop string, the most."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Row:
    """One sample of a request.

    Args:
        id: Id of the request.
        request: The request.
        sample: Number of the sample.
        tokens: Newest tokens of the text, all unread ones included.
        unread: Tokens at their end that are not in the state.
        position: Tokens in the state; 0 also where it begins again.
        written: Tokens generated, those of the session that it continues included.
        seen: Tokens that occurred in the text.
        emitter: None without a tokenizer.
        state: State to begin from, until the row has a slot; None for that before the first token.
        forks: Samples that begin where this one has read its prompt.
        slot: Row of the engine's state.
        served: When it read a piece of its prompt the last time.
        is_cancelled: Whether it is to leave after the step in progress.
        prompt_scores: Log-probabilities of the prompt's tokens, where they are to be reported.
    """

    id: int
    request: Request
    sample: int
    tokens: list[int]
    unread: int
    position: int
    written: int
    seen: set[int]
    emitter: Emitter | None
    state: State | None
    forks: int = 0
    slot: int = -1
    served: int = 0
    is_cancelled: bool = False
    prompt_scores: list[float | None] | None = None
    first: int = field(init=False)
    """`written` at the beginning."""

    def __post_init__(self) -> None:
        self.first = self.written

    @property
    def has_read(self) -> bool:
        """Whether all is read that is to be read before the first token is drawn: all but the last token."""
        return self.unread == 1 or (self.request.tokens == 0 and self.prompt_scores is None)

    def piece(self, size: int) -> int:
        """Return the number of tokens to read next, up to the next multiple of `size`."""
        # The last token is read by each sample for itself.
        wanted = self.unread - int(self.forks > 0 or self.request.tokens == 0)
        return min(wanted, size - self.position % size)

    def scored(self, count: int) -> list[tuple[int, int]]:
        """Return the tokens of the prompt that the next `count` tokens predict: (offset among them, index)."""
        if self.prompt_scores is None:
            return []
        # Index into the prompt of the token after the first unread one.
        after = len(self.prompt_scores) - self.unread + 1
        return [(i, after + i) for i in range(count) if 0 <= after + i < len(self.prompt_scores)]


def new_row(id: int, request: Request, tokenizer: Tokenizer | None, limit: int | None) -> Row:
    """Return the first sample of a request.

    Args:
        id: Id of the request.
        request: The request.
        tokenizer: Decodes its text, if any.
        limit: The model's `max_position`.
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
        emitter=new_emitter(request, tokens, tokenizer),
        state=None if start is None else start.state,
        forks=request.samples - 1,
        prompt_scores=[None] * len(prompt) if request.prompt_log_probabilities else None,
    )
    if limit is not None and row.position == 0:
        row.unread = min(row.unread, limit)
    return row


def new_emitter(request: Request, tokens: list[int], tokenizer: Tokenizer | None) -> Emitter | None:
    """Return the emitter of a sample of a request, before its first token."""
    if tokenizer is None:
        return None
    held = "" if request.start is None or len(request.prompt) else request.start.held
    return Emitter(tokenizer, tokens, held, tuple(request.stop))
