"""Many texts written at once: requests join and leave at any step, and each gets what it would get alone."""

import itertools
from collections import deque
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.generation.decode import Step, build_step
from timemix.generation.request import Event, Request
from timemix.generation.sampler import Sampler, draw
from timemix.generation.session import Session
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import Weights
from timemix.models.state import State
from timemix.tokenizers.base import StreamDecoder, Tokenizer

READ_AT_ONCE = 2048
"""Tokens that one call of the model reads of all prompts together, so that its memory is bounded."""

STEPS_FOR = 4e7
"""By a model's parameters: the tokens that compiled steps read sooner than a call of the model does."""


@dataclass
class _Row:
    """A request in its place of the batch."""

    id: int
    request: Request
    place: int
    position: int
    """Tokens in its state; 0 also where it is to begin again."""
    unread: int
    tokens: list[int]
    seen: set[int]
    written: int
    first: int
    decoder: StreamDecoder | None
    held: str = ""


class Engine:
    """Generate text for many requests at once; a request joins and leaves at any step.

    A row's state holds nothing of other rows, nor of those that had its slot before.

    Args:
        model: The model, in eval mode.
        tokenizer: Decodes the text of events; None: events have no text.
        slots: Active requests at most, at least 1; the others are pending.
        weights: "float32", "bfloat16" or "int8": rounding of the weights of decode steps; long prompts use float32.
        step: Decode step to use, None for the fastest that the model has.

    Raises:
        InvalidValue: `slots` is below 1, `weights` is unknown, or `model` is no language model.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 32,
        weights: Weights = "float32",
        step: Step | None = None,
    ) -> None:
        if not isinstance(model, LanguageModel):
            raise InvalidValue(f"model is a {type(model).__name__}; pass the model of a loaded run: load(...).model")
        if slots < 1:
            raise InvalidValue(f"slots is {slots}; it must be at least 1")
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.advance = step or build_step(model, weights)
        parameters = sum(p.numel() for p in model.parameters())
        # Measured at 0.8, 17 and 100 M parameters: the call takes long for what it does, the step is bound by memory.
        few = max(6, min(64, int(STEPS_FOR / parameters)))
        self._few = few if self.advance.compiled else 0
        self._ids = itertools.count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: list[_Row] = []
        # It grows with the rows: that of long contexts is large.
        self._state = model.init_state(0)
        self._free: list[int] = []
        self._sampler: Sampler | None = None

    def add(self, request: Request) -> int:
        """Add a request.

        Args:
            request: The request.

        Returns:
            Its id, which its events carry.

        Raises:
            InvalidValue: A token outside the vocabulary, stop strings without a tokenizer, or a session of another
                model.
        """
        start = request.start
        old = () if start is None else (*start.tokens, *start.seen)
        outside = next((t for t in (*request.prompt, *old) if not 0 <= t < self.model.config.vocab_size), None)
        if outside is not None:
            raise InvalidValue(f"token {outside} is outside the vocabulary of {self.model.config.vocab_size}")
        if request.stop and self.tokenizer is None:
            raise InvalidValue("stop strings need a tokenizer")
        if start is not None and _shapes(start.state) != _shapes(self._state):
            raise InvalidValue("the session to continue is of another model")
        number = next(self._ids)
        self._waiting.append((number, request))
        return number

    def cancel(self, id: int) -> bool:
        """End a request at once.

        Args:
            id: Id of the request.

        Returns:
            False where it has ended already.
        """
        for row in self._rows:
            if row.id == id:
                self._leave(row)
                return True
        before = len(self._waiting)
        self._waiting = deque(each for each in self._waiting if each[0] != id)
        return len(self._waiting) < before

    @property
    def busy(self) -> bool:
        """Whether a request is active or pending."""
        return bool(self._rows or self._waiting)

    def session(self, id: int) -> Session:
        """Return a copy of an active request's session.

        Args:
            id: Id of the request.

        Returns:
            The session, which `Request(start=...)` continues.

        Raises:
            KeyError: The request is not active.
        """
        row = next((row for row in self._rows if row.id == id), None)
        if row is None:
            raise KeyError(id)
        return self._session_of(row)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Generate one token of every active request; pending requests join first.

        Returns:
            One event per active request, in the order in which they came.

        Raises:
            ValueError: The logits are not finite; all active requests end.
        """
        events = []
        self._grow(min(self.slots, len(self._rows) + len(self._waiting)))
        while self._waiting and len(self._rows) < self.slots:
            number, request = self._waiting.popleft()
            row = self._enter(number, request)
            if request.tokens == 0:
                events.append(Event(number, None, "", None, "length", self._kept(row)))
                self._leave(row)
        if not self._rows:
            return events
        rows = list(self._rows)
        logits = self._read(rows)
        try:
            tokens = self._draw(rows, logits)
        except ValueError:
            # Their states are a token ahead of their texts.
            for row in rows:
                self._leave(row)
            raise
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            told = None
            if row.request.log_probabilities:
                told = float(logits[i].double().log_softmax(-1)[token])
            events.append(self._take(row, token, told))
        return events

    def _grow(self, places: int) -> None:
        """Makes room for so many rows."""
        have = len(self._state.position)
        if places > have:
            self._state = State.cat([self._state, self.model.init_state(places - have)])
            self._free += range(have, places)

    def _enter(self, number: int, request: Request) -> _Row:
        start, limit = request.start, self.model.max_position
        place = self._free.pop()
        old = [] if start is None else list(start.tokens)
        decoder = None
        if self.tokenizer is not None:
            decoder = self.tokenizer.stream()
            # Of the text before: a word tokenizer puts a space before a word that follows another.
            decoder.push_all(np.array([*old, *request.prompt], np.int64))
        written = 0 if start is None else start.written
        row = _Row(
            number,
            request,
            place,
            position=0 if start is None else int(start.state.position),
            unread=len(request.prompt) + (0 if start is None else start.unread),
            tokens=[*old, *request.prompt],
            seen=set(request.prompt) | (start.seen if start is not None else set()),
            written=written,
            first=written,
            decoder=decoder,
            held="" if start is None or len(request.prompt) else start.held,
        )
        if start is not None:
            self._state.put(torch.tensor([place]), start.state)
        if limit is not None and row.position == 0:
            row.unread = min(row.unread, limit)
        self._rows.append(row)
        self._sampler = None
        return row

    def _leave(self, row: _Row) -> None:
        self._rows.remove(row)
        self._free.append(row.place)
        self._sampler = None

    def _read(self, rows: list[_Row]) -> Tensor:
        """Reads what is unread; logits (R, V) after each row's last token."""
        self._make_room(rows)
        groups: dict[tuple[bool, int], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault((row.position > 0, row.unread), []).append(i)
        parts = []
        for (begun, unread), members in groups.items():
            tokens = torch.tensor([rows[i].tokens[-unread:] for i in members])
            places = torch.tensor([rows[i].place for i in members])
            if (begun and unread == 1) or unread * len(members) <= self._few:
                if not begun:
                    self._state.put(places, self.model.init_state(len(places)))
                for column in tokens.unbind(1):
                    found, self._state = self.advance(column.contiguous(), self._state, places)
            else:
                found = self._prefill(tokens, places, begun)
            parts.append(found)
        for row in rows:
            row.position, row.unread = row.position + row.unread, 0
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([i for members in groups.values() for i in members]).argsort()
        return torch.cat(parts)[order.to(parts[0].device)]

    def _make_room(self, rows: list[_Row]) -> None:
        """Has the rows that would pass the end of their context begin again with the newest of it."""
        limit = self.model.max_position
        if limit is None:
            return
        for row in rows:
            if row.position + row.unread > limit:
                kept = limit if row.request.context == "exact" else max(1, int(row.request.keep * limit))
                row.position, row.unread = 0, min(kept, len(row.tokens))

    def _prefill(self, tokens: Tensor, places: Tensor, begun: bool) -> Tensor:
        """Has rows read tokens (R, T), in pieces, from their state or from the beginning; logits (R, V) after them."""
        found = []
        for some, where in zip(tokens.split(READ_AT_ONCE), places.split(READ_AT_ONCE), strict=True):
            where = where.to(self.model.device)
            state = self._state.select(where) if begun else self.model.init_state(len(where))
            for piece in some.to(self.model.device).split(max(1, READ_AT_ONCE // len(where)), dim=1):
                logits, after = self.model(piece, state, logits="last")
                state = cast(State, after)
            self._state.put(where, state)
            found.append(logits)
        return torch.cat(found)

    def _draw(self, rows: list[_Row], logits: Tensor) -> list[int]:
        if self._sampler is None:
            self._sampler = Sampler.joined([row.request.sampler for row in rows])
        return draw(
            self._sampler.probabilities(logits, self._seen(rows)),
            seed=[row.request.seed for row in rows],
            sample=[row.request.sample for row in rows],
            position=[row.written for row in rows],
        ).tolist()

    def _seen(self, rows: list[_Row]) -> Tensor | None:
        if all(row.request.sampler.repetition_penalty == 1 for row in rows):
            return None
        seen = torch.zeros(len(rows), self.model.config.vocab_size, dtype=torch.bool)
        for i, row in enumerate(rows):
            seen[i, list(row.seen)] = True
        return seen

    def _take(self, row: _Row, token: int, log_probability: float | None) -> Event:
        """The event of a row's new token."""
        row.tokens.append(token)
        row.seen.add(token)
        row.unread = 1
        row.written += 1
        limit = self.model.max_position
        if len(row.tokens) > 2 * (limit or 1):
            del row.tokens[: -(limit or 1)]
        last = row.written - row.first >= row.request.tokens
        text, stopped = self._text(row, token, last)
        if not stopped and not last:
            return Event(row.id, token, text, log_probability)
        event = Event(row.id, token, text, log_probability, "stop" if stopped else "length", self._kept(row))
        self._leave(row)
        return event

    def _text(self, row: _Row, token: int, last: bool) -> tuple[str, bool]:
        """Return the text that can be emitted now, and whether a stop string ended it."""
        if row.decoder is None:
            return "", False
        text = row.held + row.decoder.push(token)
        if last:
            text += row.decoder.flush()
        stop = row.request.stop
        assert not isinstance(stop, str)
        found = [at for at in map(text.find, stop) if at >= 0]
        if found:
            return text[: min(found)], True
        held = 0 if last else max((_begun(text, each) for each in stop), default=0)
        row.held = text[len(text) - held :]
        return text[: len(text) - held], False

    def _kept(self, row: _Row) -> Session | None:
        return self._session_of(row) if row.request.keep_session else None

    def _session_of(self, row: _Row) -> Session:
        limit = self.model.max_position
        kept = max(row.unread, limit or 1)
        state = self._state.select(torch.tensor([row.place])) if row.position else self.model.init_state(1)
        return Session(state, tuple(row.tokens[-kept:]), row.unread, row.written, frozenset(row.seen), row.held)


def _shapes(state: State) -> list[dict[str, torch.Size]]:
    """Those of one row."""
    return [{name: x.shape[1:] for name, x in layer.items()} for layer in state.layers]


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that begin a stop string, the most."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
