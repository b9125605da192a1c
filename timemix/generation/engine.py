"""Many texts generated at once: requests join and leave at any step, and each gets what it would get alone."""

import itertools
import threading
from collections import deque
from dataclasses import replace
from typing import Literal

import torch

from timemix.errors import InvalidValue, TooManyRequests
from timemix.generation.decode import Step, build_step
from timemix.generation.drawer import Drawer, Drawn, log_softmax
from timemix.generation.request import Event, Request, is_integer
from timemix.generation.row import UNFINISHED, Row, new_emitter, new_row
from timemix.generation.session import Session
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import Weights
from timemix.models.state import State
from timemix.tokenizers.base import Tokenizer

PIECE = 64
"""Tokens of prompts that one step reads at most; a prompt is cut where its position is a multiple of it."""


class Engine:
    """Generate text for many requests at once; a request joins and leaves at any step.

    A row's state holds nothing of other rows, nor of those that had its slot before. With compiled code the logits of a
    row are bit-identical whatever else is generated, at any number of threads; with the model's own forward they agree
    to 1e-5.

    One thread calls `step` in a loop. `add`, `cancel` and `session` may be called by any thread meanwhile; further
    calls of `step` wait for their turn.

    Args:
        model: The model.
        tokenizer: Decodes the text of events; None: events have no text.
        slots: Active samples at most, at least 1; the others are pending.
        weights: "float32", "bfloat16" or "int8": rounding of the linear weights.
        step: Step to use, None for the fastest that the model has.
        max_pending: Pending requests at most; None: any number.

    Raises:
        InvalidValue: `slots` or `max_pending` is below 1, `weights` is unknown, `model` is no language model, or
            `tokenizer` is that of another.
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
                f"tokenizer has {tokenizer.vocab_size} entries, model has {model.config.vocab_size}; pass its own"
            )
        self.model, self.tokenizer, self.slots, self.max_pending = model, tokenizer, slots, max_pending
        self.advance = step or build_step(model, weights)
        self._ids, self._clock = itertools.count(), itertools.count(1)
        self._pending: deque[Row] = deque()
        self._rows: list[Row] = []
        # It grows with the rows: that of long contexts is large.
        self._state = model.init_state(0)
        self._free: list[int] = []
        self._drawer = Drawer()
        # Tokens of a text that are read again, or finish a character.
        self._tokens_kept = max(model.max_position or 0, UNFINISHED)
        # Guards all above; _stepping: a step computes, without the lock; _copying: sessions that wait for its end.
        self._changed = threading.Condition()
        self._stepping, self._copying = False, 0

    def add(self, request: Request) -> int:
        """Add a request.

        Args:
            request: The request.

        Returns:
            Its id, which its events carry.

        Raises:
            InvalidValue: A token outside the vocabulary, stop strings without a tokenizer, or a session of another
                model.
            TooManyRequests: `max_pending` requests are pending.
        """
        vocab_size = self.model.config.vocab_size
        outside = next((t for t in request.token_ids() if not 0 <= t < vocab_size), None)
        if outside is not None:
            raise InvalidValue(f"token {outside} is outside the vocabulary of {vocab_size}")
        if request.stop and self.tokenizer is None:
            raise InvalidValue("stop strings need a tokenizer")
        if request.start is not None and _shapes(request.start.state) != _shapes(self._state):
            raise InvalidValue("the session to continue is of another model")
        row = new_row(-1, request, self.tokenizer, self.model.max_position)
        with self._changed:
            pending = {each.id for each in self._pending if not each.is_cancelled}
            # Those that a free slot takes at the next step do not count.
            free = self.slots - len(self._rows)
            if self.max_pending is not None and len(pending) - free >= self.max_pending:
                raise TooManyRequests(f"{self.max_pending} requests are pending; add this one again later")
            row.id = next(self._ids)
            self._pending.append(row)
        return row.id

    def cancel(self, id: int) -> bool:
        """End a request at once; no event of it comes from a step that ends later.

        Args:
            id: Id of the request.

        Returns:
            False where it has ended already.
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

    def session(self, id: int, sample: int | None = None) -> Session:
        """Return a copy of an active request's session, after the step in progress if there is one.

        Args:
            id: Id of the request.
            sample: Number of the sample, None for the first active one.

        Returns:
            The session, which `Request(start=...)` continues.

        Raises:
            KeyError: The request is not active.
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
        """Generate one token of every active request that has read its prompt; pending requests join first.

        A step reads at most `PIECE` tokens of prompts, in turn. A request that still reads has no event.

        Returns:
            The events, in the order in which their requests came.

        If a step raises, or Ctrl-C ends it, all active requests have ended, and pending ones can still run.
        """
        rows: list[Row] = []
        is_done = begun = False
        try:
            with self._changed:
                # A session that waits is copied first.
                self._changed.wait_for(lambda: not (self._stepping or self._copying))
                begun = self._stepping = True
                events = self._join()
                rows = list(self._rows)
            drawn = self._compute(rows)
            with self._changed:
                events += [self._take(row, each) for row, each in drawn if not row.is_cancelled]
                is_done = True
        finally:
            # Ctrl-C can come anywhere: what follows must not be left out for it.
            if begun:
                with self._changed:
                    if not is_done:
                        # Their states may be ahead of their texts.
                        for row in [row for row in rows if row in self._rows]:
                            self._leave(row)
                    self._remove_cancelled()
                    self._stepping = False
                    self._changed.notify_all()
        return events

    def _join(self) -> list[Event]:
        """Give slots to pending rows and to samples that fork; return the events of those that end without a token."""
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
        """Put the further samples of a row whose prompt is read but for its last token before all pending ones."""
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
        """Make room for so many rows."""
        have = len(self._state.position)
        if slots > have:
            self._state = State.cat([self._state, self.model.init_state(slots - have)])
            self._free += range(have, slots)

    def _leave(self, row: Row) -> None:
        self._rows.remove(row)
        self._free.append(row.slot)

    def _make_room(self, rows: list[Row]) -> None:
        """Have the rows that would pass the end of their context begin again with the newest of it."""
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
        """Read a step's tokens; return what was drawn, or the reason of an error, of each row that has read all."""
        self._make_room(rows)
        pieces = self._pieces(rows)
        if not pieces:
            return []
        tokens: list[int] = []
        # Indices of tokens whose logits are wanted; the rows that draw from them, and the prompts that they score.
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
        logits = found.cpu().double().numpy()
        for row, count in pieces:
            row.position, row.unread = row.position + count, row.unread - count
        for i, row, index in scored:
            assert row.prompt_scores is not None
            row.prompt_scores[index] = float(log_softmax(logits[i])[row.request.prompt[index]])
        readers = [row for _, row in done]
        return list(zip(readers, self._drawer.draw(readers, logits[[i for i, _ in done]]), strict=True))

    def _pieces(self, rows: list[Row]) -> list[tuple[Row, int]]:
        """Return the rows of a step with the number of tokens that each reads: prompts in turn, one token of others."""
        counts = {row: 1 for row in rows if row.unread == 1}
        left = PIECE
        for row in sorted((row for row in rows if row.unread > 1), key=lambda row: row.served):
            count = row.piece(PIECE)
            if count > left:
                break
            left -= count
            counts[row] = count
            row.served = next(self._clock)
        return [(row, counts[row]) for row in rows if row in counts]

    def _take(self, row: Row, drawn: Drawn | str) -> Event:
        """Return the event of what was drawn for a row, which leaves if it ends."""
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
        """Return the text that can be emitted now, and whether a stop string or token ended it."""
        is_stop = token in row.request.stop_tokens
        if row.emitter is None:
            return "", is_stop
        if is_stop:
            return row.emitter.end(), True
        text, is_stopped = row.emitter.push(token)
        return text + (self._last_text(row) if last and not is_stopped else ""), is_stopped

    def _last_text(self, row: Row) -> str:
        """Return what a row holds back at its end; a session keeps it for the text that continues."""
        return "" if row.emitter is None or row.request.keep_session else row.emitter.end()

    def _end(self, row: Row, event: Event, finished: Literal["length", "stop"]) -> Event:
        """Have a row leave; return its last event, complete."""
        session = self._session_of(row) if row.request.keep_session else None
        self._leave(row)
        return self._scored(row, replace(event, finished=finished, session=session))

    def _scored(self, row: Row, event: Event) -> Event:
        """Add the log-probabilities of the prompt to a row's first event."""
        scores, row.prompt_scores = row.prompt_scores, None
        return event if scores is None else replace(event, prompt_log_probabilities=tuple(scores))

    def _session_of(self, row: Row) -> Session:
        slot = torch.tensor([row.slot], device=self.model.device)
        state = self._state.select(slot) if row.position else self.model.init_state(1)
        tokens = tuple(row.tokens[-max(row.unread, self._tokens_kept) :])
        held = "" if row.emitter is None else row.emitter.held
        return Session(state, tokens, row.unread, row.written, frozenset(row.seen), held)


def _shapes(state: State) -> list[dict[str, torch.Size]]:
    """Those of one row."""
    return [{name: x.shape[1:] for name, x in layer.items()} for layer in state.layers]
