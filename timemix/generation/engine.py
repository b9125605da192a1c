"""Generation of many texts at once: requests join and leave at any step, without an effect on other texts."""

import itertools
import threading
from collections import deque
from copy import copy
from dataclasses import replace
from functools import partial

import torch

from timemix.errors import InvalidValue, TooManyRequests
from timemix.generation.batch import Batch
from timemix.generation.decode import Step, build_step
from timemix.generation.drawer import Drawer, Drawn
from timemix.generation.prefix_cache import PrefixCache, new_prefix
from timemix.generation.request import Event, Finished, Request, is_integer
from timemix.generation.row import TOKENS_KEPT, Row, new_emitter, new_row
from timemix.generation.sampler import numbers
from timemix.generation.session import Session
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import Weights
from timemix.models.state import State
from timemix.tokenizers.base import Tokenizer

PIECE = 64
"""Largest number of prompt tokens that one step processes. A prompt is cut at positions divisible by `PIECE`.

A step that also generates tokens processes at most half a piece, so that prompts delay these tokens less.
"""


class Engine:
    """Generate text for many requests at once; a request joins and leaves at any step.

    Requests do not influence one another: a slot's state holds nothing of other slots or of earlier requests. With
    compiled code, the logits of a request are bit-identical for any other requests and any number of threads. With the
    model's own forward pass, the logits of a request agree to 1e-5 for any other requests.

    While one thread calls `step` in a loop, any thread may call `add`, `cancel`, `progress` and `session`. Concurrent
    calls of `step` run one after another. If engines in several threads share one model, call `model.eval()` first:
    each forward pass of the model turns dropout off, and restores the mode of the model afterwards.

    Args:
        model: The model.
        tokenizer: Tokenizer that decodes the text of events; None: events have no text.
        slots: Largest number of active samples, at least 1; further samples are pending.
        weights: Format to which the linear weights are rounded: "float32", "bfloat16", "int8" or "int4".
        step: Decode step to use; None: the fastest step that the model supports.
        max_pending: Largest number of pending requests beyond the free slots, at least 1; None: any number.
        cache: Cache of states after prefixes of prompts, for this engine alone; None: each prompt is processed as a
            whole. With and without a cache, texts are bit-identical, except for requests with `reuse_decoded`.

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
        cache: PrefixCache | None = None,
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
        self.advance, self.cache = step or build_step(model, weights), cache
        self._ids, self._clock = itertools.count(), itertools.count(1)
        self._pending: deque[Row] = deque()
        self._rows: list[Row] = []
        # The state begins with no rows and grows with the active requests, because the state of a long context is
        # large.
        self._state = model.init_state(0)
        self._free: list[int] = []
        self._drawer = Drawer()
        # Number of newest tokens of a text to store. The model processes these tokens again at the end of the context,
        # and a conversation looks in these tokens for a stop string.
        self._tokens_kept = max(model.max_position or 0, TOKENS_KEPT)
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
                tokenizer, or the session of the request has states of other shapes.
            TooManyRequests: `max_pending` requests are pending beyond the free slots.
        """
        vocab_size, ids = self.model.config.vocab_size, request.token_ids()
        for token in (min(ids), max(ids)):
            if not 0 <= token < vocab_size:
                raise InvalidValue(f"token {token} is outside the vocabulary of {vocab_size}; ids start at 0")
        if request.stop and self.tokenizer is None:
            raise InvalidValue("stop strings need a tokenizer; pass one to Engine, or use stop_tokens")
        if request.start is not None and request.start.state.shapes != self._state.shapes:
            raise InvalidValue("start is a session of another model; pass a session of this model")
        row = new_row(-1, request, self.tokenizer, self.model.max_position)
        if self.cache is not None and request.start is None and not request.prompt_log_probabilities:
            unread = row.tokens[-row.unread :]
            row.prefix = new_prefix(request.scope, unread, PIECE, allows_decoded=request.reuse_decoded)
        with self._changed:
            pending = {each.id for each in self._pending if not each.is_cancelled}
            # Requests that get a free slot at the next step do not count as pending.
            free = self.slots - len(self._rows)
            if self.max_pending is not None and len(pending) - free >= self.max_pending:
                raise TooManyRequests(
                    f"the queue is full, as max_pending is {self.max_pending}; add this request again later"
                )
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
        """Number of samples that wait for a slot. A request whose prompt is not processed counts as one sample."""
        with self._changed:
            return len(self._pending)

    def progress(self, id: int) -> tuple[int, int]:
        """Return how much of a request's prompt is processed, without waiting for the step in progress.

        Args:
            id: Id of the request.

        Returns:
            Number of processed prompt tokens, which includes tokens from the cache, and number of prompt tokens. Of a
            prompt that exceeds the context, only the tokens that the model uses count. Tokens that a continued session
            has not processed count as prompt tokens. (0, 0) if the request is neither active nor pending.
        """
        with self._changed:
            for row in (*self._rows, *self._pending):
                if row.id == id and not row.is_cancelled:
                    return row.progress
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

        One step processes at most `PIECE` prompt tokens, half of them if it also generates tokens, and the requests
        take turns. A request has no event before its prompt is processed. If a step raises an error, or Ctrl-C
        interrupts a step, all active requests end. Pending requests can still run.

        Returns:
            The events, in the order in which the requests were added.
        """
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
                        # The states may already hold tokens that the texts lack, or lack tokens that they should hold.
                        for row in list(self._rows):
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
            self._state.put(torch.tensor([row.slot], device=self.model.device), self._first_state(row))
            row.state = None
            self._fork(row)
        return [
            self._end(row, row.event(None, row.last_text(), "length"))
            for row in list(self._rows)
            if row.request.tokens == 0 and row.has_read
        ]

    def _fork(self, row: Row) -> None:
        """Put the other samples of a request first in the queue when its row has one unprocessed prompt token left."""
        if not (row.forks and row.has_read):
            return
        state = self._copy(row)
        forks = [
            replace(
                row,
                sample=row.sample + number,
                tokens=row.tokens[-self._tokens_kept :],
                seen=set(row.seen),
                counts=dict(row.counts),
                prefix=copy(row.prefix),
                emitter=new_emitter(row.request, row.tokens, self.tokenizer),
                state=state,
                forks=0,
            )
            for number in range(1, row.forks + 1)
        ]
        row.forks = 0
        self._pending.extendleft(reversed(forks))

    def _first_state(self, row: Row) -> State:
        """Return the state from which a row begins: its own, the state of its longest cached prefix, or a new state."""
        if row.state is not None:
            return row.state
        if self.cache is not None and row.prefix is not None and (found := self.cache.find(row.prefix)):
            row.cached = row.position = found[0]
            row.unread -= row.cached
            return found[1]
        return self.model.init_state(1)

    def _copy(self, row: Row) -> State:
        """Return a copy of the state of an active row."""
        return self._state.select(torch.tensor([row.slot], device=self.model.device))

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
            # At least all unread tokens are kept, as those of a prompt that follows a session.
            kept = limit if row.request.context == "exact" else max(row.unread, int(row.request.keep * limit))
            row.position, row.unread, row.prefix = 0, min(kept, limit, len(row.tokens)), None
            row.is_restarted = row.request.context == "reanchor"
            if row.written == row.first:
                row.total = row.unread
        if full:
            slots = torch.tensor([row.slot for row in full], device=self.model.device)
            self._state.put(slots, self.model.init_state(len(slots)))

    def _compute(self, rows: list[Row]) -> list[tuple[Row, Drawn | str]]:
        """Compute a step; return the drawn token, or the reason of an error, for each row without unread tokens."""
        self._make_room(rows)
        batch = Batch(self._pieces(rows))
        if not batch.pieces:
            return []
        found, self._state = self.advance(batch.tokens, self._state, batch.slots, *batch.counts_and_wanted())
        readers, logits = batch.note_processed(numbers(found))
        if self.cache is not None:
            for row, _ in batch.pieces:
                if row.prefix is not None and row.position % PIECE == 0:
                    self.cache.store(row.prefix, row.tokens, row.position, partial(self._copy, row))
        return list(zip(readers, self._drawer.draw(readers, logits), strict=True))

    def _pieces(self, rows: list[Row]) -> list[tuple[Row, int]]:
        """Return the rows of a step with their numbers of tokens: the next piece of a prompt, or one token."""
        counts = {row: 1 for row in rows if row.unread == 1}
        left = size = PIECE // 2 if counts else PIECE
        for row in sorted((row for row in rows if row.unread > 1), key=lambda row: row.last_read):
            count = row.piece(size)
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
            return row.event(None, "", "error", reason=drawn)
        token, log_probability, top = drawn
        row.tokens.append(token)
        row.seen.add(token)
        row.counts[token] = row.counts.get(token, 0) + 1
        row.unread = 1
        row.written += 1
        if len(row.tokens) > 2 * self._tokens_kept:
            del row.tokens[: -self._tokens_kept]
        last = row.written - row.first >= row.request.tokens
        text, is_stopped = row.text(token, last)
        finished: Finished | None = "stop" if is_stopped else "length" if last else None
        event = row.event(token, text, finished, log_probability=log_probability, top_log_probabilities=top)
        return event if finished is None else self._end(row, event)

    def _end(self, row: Row, event: Event) -> Event:
        """Remove a row and return its last event, with its session if the request keeps the session."""
        session = self._session_of(row) if row.request.keep_session else None
        self._leave(row)
        return event if session is None else event._replace(session=session)

    def _session_of(self, row: Row) -> Session:
        """Return a copy of a row as a session."""
        tokens = tuple(row.tokens[-max(row.unread, self._tokens_kept) :])
        held = "" if row.emitter is None else row.emitter.held
        return Session(self._copy(row), tokens, row.unread, row.written, frozenset(row.seen), held, dict(row.counts))
