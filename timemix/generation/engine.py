"""Generation of many texts at once: requests join and leave at any step, without an effect on other texts."""

import itertools
import threading
from collections import deque
from dataclasses import replace
from typing import Literal

import torch

from timemix.errors import InvalidValue, TooManyRequests
from timemix.generation.decode import Step, build_step
from timemix.generation.drawer import Drawer, Drawn, scores_of
from timemix.generation.request import Event, Request, is_integer
from timemix.generation.row import UNFINISHED, Row, new_emitter, new_row
from timemix.generation.sampler import numbers
from timemix.generation.session import Session
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import Weights
from timemix.models.state import State
from timemix.tokenizers.base import Tokenizer

PIECE = 32
"""Largest number of prompt tokens that one step processes. A prompt is cut at positions divisible by `PIECE`."""


class Engine:
    """Generate text for many requests at once; a request joins and leaves at any step.

    Requests do not influence one another: a slot's state holds nothing of other slots or of earlier requests. With
    compiled code, the logits of a request are bit-identical for any other requests and any number of threads. With the
    model's own forward pass, the logits of a request agree to 1e-5 for any other requests.

    While one thread calls `step` in a loop, any thread may call `add`, `cancel` and `session`. Concurrent calls of
    `step` run one after another.

    Args:
        model: The model.
        tokenizer: Tokenizer that decodes the text of events; None: events have no text.
        slots: Largest number of active samples, at least 1; further samples are pending.
        weights: Format to which the linear weights are rounded: "float32", "bfloat16", "int8" or "int4".
        step: Decode step to use; None: the fastest step that the model supports.
        max_pending: Largest number of pending requests, at least 1; None: any number.

    Raises:
        InvalidValue: `slots` or `max_pending` is below 1, `weights` is unknown, `model` is not a language model, or
            `tokenizer` has fewer entries than the model's vocabulary.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 32,
        weights: Weights = "float32",
        step: Step | None = None,
        max_pending: int | None = None,
    ) -> None:
        if not isinstance(model, LanguageModel):
            raise InvalidValue(f"model is a {type(model).__name__}; pass the model of a loaded run: load(...).model")
        for name, value in (("slots", slots), ("max_pending", max_pending)):
            if not (is_integer(value) and value >= 1) and (name, value) != ("max_pending", None):
                raise InvalidValue(f"{name} is {value!r}; it must be a whole number, at least 1")
        if tokenizer is not None and tokenizer.vocab_size < model.config.vocab_size:
            raise InvalidValue(
                f"tokenizer has {tokenizer.vocab_size} entries, but model has a vocabulary of"
                f" {model.config.vocab_size}; pass the tokenizer of the model"
            )
        self.model, self.tokenizer, self.slots, self.max_pending = model, tokenizer, slots, max_pending
        self.advance = step or build_step(model, weights)
        self._ids, self._clock = itertools.count(), itertools.count(1)
        self._pending: deque[Row] = deque()
        self._rows: list[Row] = []
        # The state begins with no rows and grows with the active requests, because the state of a long context is
        # large.
        self._state = model.init_state(0)
        self._free: list[int] = []
        self._drawer = Drawer()
        # Number of newest tokens of a text to store: the model processes these tokens again at the end of the context,
        # or these tokens form an unfinished character.
        self._tokens_kept = max(model.max_position or 0, UNFINISHED)
        # `_changed` guards all fields above. `_stepping` is True while a step computes without the lock.
        # `_copying` is the number of calls of `session` that wait for the end of the step.
        self._changed = threading.Condition()
        self._stepping, self._copying = False, 0

    def add(self, request: Request) -> int:
        """Add a request, which begins at one of the next steps.

        Args:
            request: The request.

        Returns:
            Id of the request; its events have the same id.

        Raises:
            InvalidValue: A token is outside the vocabulary, the request has stop strings but the engine has no
                tokenizer, or the session of the request belongs to another model.
            TooManyRequests: `max_pending` requests are pending.
        """
        vocab_size = self.model.config.vocab_size
        outside = next((t for t in request.token_ids() if not 0 <= t < vocab_size), None)
        if outside is not None:
            raise InvalidValue(f"token {outside} is outside the vocabulary of {vocab_size}; ids start at 0")
        if request.stop and self.tokenizer is None:
            raise InvalidValue("stop strings need a tokenizer; pass one to Engine, or use stop_tokens")
        if request.start is not None and _shapes(request.start.state) != _shapes(self._state):
            raise InvalidValue("start is a session of another model; pass a session of this model")
        row = new_row(-1, request, self.tokenizer, self.model.max_position)
        with self._changed:
            pending = {each.id for each in self._pending if not each.is_cancelled}
            # Requests that get a free slot at the next step do not count as pending.
            free = self.slots - len(self._rows)
            if self.max_pending is not None and len(pending) - free >= self.max_pending:
                raise TooManyRequests(f"{self.max_pending} requests are pending; add this request again later")
            row.id = next(self._ids)
            self._pending.append(row)
        return row.id

    def cancel(self, id: int) -> bool:
        """End a request at once: neither the step in progress nor a later step reports an event of the request.

        Args:
            id: Id of the request.

        Returns:
            Whether the request was active or pending.
        """
        with self._changed:
            found = [row for row in (*self._rows, *self._pending) if row.id == id and not row.is_cancelled]
            for row in found:
                row.is_cancelled = True
            if not self._stepping:
                self._remove_cancelled()
        return bool(found)

    def _remove_cancelled(self) -> None:
        for row in [row for row in self._rows if row.is_cancelled]:
            self._leave(row)
        self._pending = deque(row for row in self._pending if not row.is_cancelled)

    @property
    def busy(self) -> bool:
        """Whether a request is active or pending."""
        with self._changed:
            return any(not row.is_cancelled for row in (*self._rows, *self._pending))

    @property
    def active(self) -> int:
        """Number of samples that have a slot."""
        with self._changed:
            return len(self._rows)

    @property
    def pending(self) -> int:
        """Number of samples that wait for a slot."""
        with self._changed:
            return len(self._pending)

    def progress(self, id: int) -> tuple[int, int]:
        """Return how much of a request's prompt is processed.

        Args:
            id: Id of the request.

        Returns:
            Number of processed tokens, and number of all tokens of the prompt; (0, 0) if the request is not active.
        """
        with self._changed:
            for row in self._rows:
                if row.id == id:
                    return len(row.request.prompt) - min(row.unread, len(row.request.prompt)), len(row.request.prompt)
        return 0, 0

    def session(self, id: int, sample: int | None = None) -> Session:
        """Wait for the step in progress, then return a copy of the session of an active request.

        Args:
            id: Id of the request.
            sample: Number of the sample; None: the first active sample.

        Returns:
            The session, which `Request(start=...)` continues.

        Raises:
            KeyError: The request, or the sample of the request, is not active.
        """
        with self._changed:
            self._copying += 1
            try:
                self._changed.wait_for(lambda: not self._stepping)
                found = (row for row in self._rows if row.id == id and sample in (None, row.sample))
                row = next(found, None)
                if row is None:
                    raise KeyError(id)
                return self._session_of(row)
            finally:
                self._copying -= 1
                self._changed.notify_all()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Activate pending requests, then generate one token of each active request whose prompt is processed.

        One step processes at most `PIECE` prompt tokens, and the requests take turns. A request has no event before its
        prompt is processed. If a step raises an error, or Ctrl-C interrupts a step, all active requests end. Pending
        requests can still run.

        Returns:
            The events, in the order in which the requests were added.
        """
        rows: list[Row] = []
        is_done = begun = False
        try:
            with self._changed:
                # A waiting call of `session` gets its copy before the step begins.
                self._changed.wait_for(lambda: not (self._stepping or self._copying))
                begun = self._stepping = True
                events = self._join()
                rows = list(self._rows)
            drawn = self._compute(rows)
            with self._changed:
                events += [self._take(row, each) for row, each in drawn if not row.is_cancelled]
                is_done = True
        finally:
            # This clean-up must run even if Ctrl-C interrupts the step.
            if begun:
                with self._changed:
                    if not is_done:
                        # The states may already hold tokens that the texts lack.
                        for row in [row for row in rows if row in self._rows]:
                            self._leave(row)
                    self._remove_cancelled()
                    self._stepping = False
                    self._changed.notify_all()
        return events

    def _join(self) -> list[Event]:
        """Give slots to pending rows and forked samples; return the events of requests that end without a token."""
        for row in list(self._rows):
            self._fork(row)
        while self._pending and len(self._rows) < self.slots:
            self._grow(min(self.slots, len(self._rows) + len(self._pending)))
            row = self._pending.popleft()
            row.slot = self._free.pop()
            self._rows.append(row)
            slot, state = torch.tensor([row.slot], device=self.model.device), row.state or self.model.init_state(1)
            self._state.put(slot, state)
            row.state = None
            self._fork(row)
        return [
            self._end(row, Event(row.id, None, self._last_text(row), sample=row.sample), "length")
            for row in list(self._rows)
            if row.request.tokens == 0 and row.has_read
        ]

    def _fork(self, row: Row) -> None:
        """Put the other samples of a request first in the queue when its row has one unprocessed prompt token left."""
        if not (row.forks and row.has_read):
            return
        state = self._state.select(torch.tensor([row.slot], device=self.model.device)) if row.position else None
        forks = [
            replace(
                row,
                sample=row.sample + number,
                tokens=list(row.tokens),
                seen=set(row.seen),
                emitter=new_emitter(row.request, row.tokens, self.tokenizer),
                state=state,
                forks=0,
                prompt_scores=None,
            )
            for number in range(1, row.forks + 1)
        ]
        row.forks = 0
        self._pending.extendleft(reversed(forks))

    def _grow(self, slots: int) -> None:
        """Enlarge the state to at least `slots` rows."""
        have = len(self._state.position)
        if slots > have:
            self._state = State.cat([self._state, self.model.init_state(slots - have)])
            self._free += range(have, slots)

    def _leave(self, row: Row) -> None:
        """Remove an active row and free its slot."""
        self._rows.remove(row)
        self._free.append(row.slot)

    def _make_room(self, rows: list[Row]) -> None:
        """Restart each row that would exceed its context, from the newest tokens of that context."""
        limit = self.model.max_position
        if limit is None:
            return
        full = [row for row in rows if row.position + row.unread > limit]
        for row in full:
            kept = limit if row.request.context == "exact" else max(1, int(row.request.keep * limit))
            row.position, row.unread = 0, min(kept, len(row.tokens))
        if full:
            slots = torch.tensor([row.slot for row in full], device=self.model.device)
            self._state.put(slots, self.model.init_state(len(slots)))

    def _compute(self, rows: list[Row]) -> list[tuple[Row, Drawn | str]]:
        """Compute a step; return the drawn token, or the reason of an error, for each row without unread tokens."""
        self._make_room(rows)
        pieces = self._pieces(rows)
        if not pieces:
            return []
        tokens: list[int] = []
        # `wanted` holds the indices into `tokens` whose logits are needed. `done` holds the rows that draw a token,
        # each with an index into `wanted`. `scored` holds the prompt tokens that get a log-probability, each with an
        # index into `wanted`.
        wanted: list[int] = []
        done: list[tuple[int, Row]] = []
        scored: list[tuple[int, Row, int]] = []
        for row, count in pieces:
            for offset, index in row.scored(count):
                scored.append((len(wanted), row, index))
                wanted.append(len(tokens) + offset)
            begin = len(row.tokens) - row.unread
            tokens += row.tokens[begin : begin + count]
            if count == row.unread:
                done.append((len(wanted), row))
                wanted.append(len(tokens) - 1)
        slots, counts = torch.tensor([(row.slot, count) for row, count in pieces]).unbind(1)
        if len(tokens) == len(pieces) == len(wanted):
            found, self._state = self.advance(torch.tensor(tokens), self._state, slots)
        else:
            given = torch.tensor(wanted, dtype=torch.int64)
            found, self._state = self.advance(torch.tensor(tokens), self._state, slots, counts, given)
        logits = numbers(found)
        for row, count in pieces:
            row.position, row.unread = row.position + count, row.unread - count
        for i, row, index in scored:
            assert row.prompt_scores is not None
            row.prompt_scores[index] = scores_of(
                logits[i], row.request.prompt[index], row.request.top_log_probabilities
            )
        readers = [row for _, row in done]
        last = logits if len(done) == len(wanted) else logits[[i for i, _ in done]]
        return list(zip(readers, self._drawer.draw(readers, last), strict=True))

    def _pieces(self, rows: list[Row]) -> list[tuple[Row, int]]:
        """Return the rows of a step with their numbers of tokens: the next piece of a prompt, or one token."""
        counts = {row: 1 for row in rows if row.unread == 1}
        left = PIECE
        for row in sorted((row for row in rows if row.unread > 1), key=lambda row: row.last_read):
            count = row.piece(PIECE)
            if count > left:
                break
            left -= count
            counts[row] = count
            row.last_read = next(self._clock)
        return [(row, counts[row]) for row in rows if row in counts]

    def _take(self, row: Row, drawn: Drawn | str) -> Event:
        """Append a drawn token to a row and return the event of the token; remove the row if its text has ended."""
        if isinstance(drawn, str):
            self._leave(row)
            return Event(row.id, None, "", finished="error", sample=row.sample, reason=drawn)
        token, log_probability, top = drawn
        row.tokens.append(token)
        row.seen.add(token)
        row.unread = 1
        row.written += 1
        if len(row.tokens) > 2 * self._tokens_kept:
            del row.tokens[: -self._tokens_kept]
        last = row.written - row.first >= row.request.tokens
        text, is_stopped = self._text(row, token, last)
        event = Event(row.id, token, text, log_probability, sample=row.sample, top_log_probabilities=top)
        if is_stopped or last:
            return self._end(row, event, "stop" if is_stopped else "length")
        return self._scored(row, event)

    def _text(self, row: Row, token: int, last: bool) -> tuple[str, bool]:
        """Return the text that can be emitted now, and whether a stop string or a stop token ended the text."""
        is_stop = token in row.request.stop_tokens
        if row.emitter is None:
            return "", is_stop
        if is_stop:
            return row.emitter.end(), True
        text, is_stopped = row.emitter.push(token)
        return text + (self._last_text(row) if last and not is_stopped else ""), is_stopped

    def _last_text(self, row: Row) -> str:
        """Return the text that a row still holds back at its end; empty if its session keeps that text."""
        return "" if row.emitter is None or row.request.keep_session else row.emitter.end()

    def _end(self, row: Row, event: Event, finished: Literal["length", "stop"]) -> Event:
        """Remove a row and return its last event, with the session and the scores of the prompt."""
        session = self._session_of(row) if row.request.keep_session else None
        self._leave(row)
        return self._scored(row, replace(event, finished=finished, session=session))

    def _scored(self, row: Row, event: Event) -> Event:
        """Add the log-probabilities of the prompt to a row's first event."""
        scores, row.prompt_scores = row.prompt_scores, None
        if scores is None:
            return event
        found, top = zip(*scores, strict=True)
        return replace(event, prompt_log_probabilities=found, prompt_top_log_probabilities=top)

    def _session_of(self, row: Row) -> Session:
        """Return a copy of a row as a session."""
        slot = torch.tensor([row.slot], device=self.model.device)
        state = self._state.select(slot) if row.position else self.model.init_state(1)
        tokens = tuple(row.tokens[-max(row.unread, self._tokens_kept) :])
        held = "" if row.emitter is None else row.emitter.held
        return Session(state, tokens, row.unread, row.written, frozenset(row.seen), held)


def _shapes(state: State) -> list[dict[str, torch.Size]]:
    """Return the shapes of one row of a state, by layer and name."""
    return [{name: x.shape[1:] for name, x in layer.items()} for layer in state.layers]
