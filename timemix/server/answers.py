"""From events of the engine to the choices of an answer, in the form of one endpoint."""

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from timemix.generation.request import Event, Request
from timemix.generation.row import UNFINISHED
from timemix.generation.session import Session
from timemix.server.engine_thread import Served
from timemix.server.errors import ApiError
from timemix.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Score:
    """The log-probability of one token.

    Args:
        token: Token id.
        log_probability: Log-probability in nats; None for the first token of a text.
        top: (token id, log-probability) of the most probable tokens.
        offset: Number of characters of the text before this token.
    """

    token: int
    log_probability: float | None
    top: Sequence[tuple[int, float]]
    offset: int


@dataclass
class Piece:
    """New content of one choice.

    Args:
        index: Index of the choice.
        text: New text.
        scores: New scores; None if the call asks for none.
        finish: Reason of the end, in the last piece.
        extras: Further fields of the choice.
    """

    index: int
    text: str = ""
    scores: list[Score] | None = None
    finish: str | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def is_text_only(self) -> bool:
        """Whether the piece holds nothing but text."""
        return self.scores is None and self.finish is None and not self.extras

    def add(self, other: "Piece") -> None:
        """Append a later piece."""
        # Python appends to a local string in place. To `self.text`, it would copy the whole text for each token.
        text, self.text = self.text, ""
        text += other.text
        self.text = text
        if other.scores is not None:
            self.scores = self.scores or []
            self.scores += other.scores
        self.finish = other.finish or self.finish
        for name, value in other.extras.items():
            if isinstance(value, list):
                self.extras.setdefault(name, []).extend(value)
            else:
                self.extras[name] = value


class Form(ABC):
    """The form of the answers of an endpoint.

    Attributes:
        prefix: Prefix of the ids of answers.
        whole: Value of "object" in a whole answer.
        part: Value of "object" in a chunk of a stream.
        space: Text with which the model begins, and which the answer leaves out.
    """

    prefix: str
    whole: str
    part: str
    space: str = ""

    @abstractmethod
    def choice(self, piece: Piece, tokenizer: Tokenizer, *, is_part: bool) -> dict[str, Any]:
        """Return a choice of an answer, or of a chunk of a stream if `is_part`."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the choice of the first chunk of a stream, or None if the first chunk holds text."""
        return None


@dataclass
class Call:
    """A call of the API for text.

    Args:
        served: The model.
        form: Form of the answer.
        requests: Request to the engine for each prompt.
        echo: Text of each prompt to repeat; [] without echo.
        scored: Whether the answer reports log-probabilities.
        returns_ids: Whether the answer reports token ids.
        is_stream: Whether the answer is a stream.
        includes_usage: Whether the last chunk of a stream reports the usage.
        repeats_usage: Whether each chunk of a stream reports the usage so far.
        keep: Function that stores the session of a choice and returns its description; None: no session is kept.
    """

    served: Served
    form: Form
    requests: list[Request]
    echo: list[str]
    scored: bool
    returns_ids: bool
    is_stream: bool
    includes_usage: bool = False
    repeats_usage: bool = False
    keep: Callable[[Session], Awaitable[dict[str, Any]]] | None = None

    def __post_init__(self) -> None:
        self.id, self.created = f"{self.form.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._generated = self._cached = 0
        self._choices: dict[int, _Choice] = {}
        # Description of each stored session by the identity of the session, until `piece` reports it.
        self._stored: dict[int, dict[str, Any]] = {}

    def head(self, kind: str) -> dict[str, Any]:
        """Return the first fields of an answer or a chunk."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens so far."""
        prompt = sum(len(request.prompt) for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    @property
    def size(self) -> int:
        """Number of choices."""
        return sum(request.samples for request in self.requests)

    async def store(self, events: Sequence[tuple[int, Event]]) -> None:
        """Store the sessions of events, so that `piece` can describe them.

        Raises:
            ApiError: A session cannot be stored.
        """
        if self.keep is not None:
            for _, event in events:
                if event.session is not None:
                    self._stored[id(event.session)] = await self.keep(event.session)

    def piece(self, place: int, event: Event) -> Piece:
        """Return the new content that an event of the request at `place` gives.

        Raises:
            ApiError: The choice cannot continue, or its state cannot be stored.
        """
        request = self.requests[place]
        check_event(event, request)
        index = sum(each.samples for each in self.requests[:place]) + event.sample - request.sample
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(self, index, place)
        self._generated += event.token is not None
        if event.sample == request.sample:
            # The other samples share the prompt of the first sample.
            self._cached += event.cached
        return choice.piece(event)

    def stored(self, session: Session) -> dict[str, Any]:
        """Return the description of a session that `store` has stored."""
        return self._stored.pop(id(session))


def check_event(event: Event, request: Request) -> None:
    """Raise ApiError if an event of a request reports an error, or has log-probabilities that JSON cannot express."""
    scores = event.prompt_log_probabilities if request.start is not None else None
    if event.finished != "error" and all(x is None or math.isfinite(x) for x in scores or ()):
        return
    reason = event.reason or "the log-probabilities of the prompt are not finite"
    param = "logit_bias" if "logit_bias" in reason else "state" if request.start is not None else None
    raise ApiError(500 if param is None else 400, reason, param)


class _Choice:
    """One choice of an answer.

    Args:
        call: The call.
        index: Index of the choice.
        place: Index of the prompt.
    """

    def __init__(self, call: Call, index: int, place: int) -> None:
        self._call, self._index, self._request = call, index, call.requests[place]
        self._echo = call.echo[place] if call.echo else None
        self._decoder = call.served.tokenizer.stream()
        if self._echo is None:
            # The text of a token depends on earlier tokens.
            before = [*(() if self._request.start is None else self._request.start.tokens), *self._request.prompt]
            self._decoder.push_all(np.array(before[-UNFINISHED:], np.int64))
        self._offset = self._written = 0
        self._is_new, self._space = True, call.form.space

    def piece(self, event: Event) -> Piece:
        """Return the new content that an event gives."""
        text = event.text.removeprefix(self._space)
        if event.text:
            self._space = ""
        call, piece = self._call, Piece(self._index, text, finish=event.finished)
        if call.scored:
            piece.scores = []
        if call.returns_ids:
            piece.extras["token_ids"] = [] if event.token is None else [event.token]
        if event.restarted:
            piece.extras["restarts"] = [self._written]
        if self._is_new:
            self._is_new = False
            self._begin(piece, event)
        if call.scored and event.token is not None:
            assert piece.scores is not None
            score = self._score(event.token, event.log_probability, event.top_log_probabilities)
            piece.scores.append(score)
        self._written += 1
        if event.session is not None and call.keep is not None:
            piece.extras["state"] = call.stored(event.session)
        return piece

    def _begin(self, piece: Piece, event: Event) -> None:
        """Add the prompt to the first piece, as far as the call asks for it."""
        prompt = self._request.prompt
        if self._call.returns_ids:
            piece.extras["prompt_token_ids"] = list(prompt)
        if self._echo is None:
            return
        piece.text = self._echo + piece.text
        if piece.scores is not None:
            scores = event.prompt_log_probabilities or (None,) * len(prompt)
            tops = event.prompt_top_log_probabilities or ((),) * len(prompt)
            piece.scores += map(self._score, prompt, scores, tops)

    def _score(self, token: int, log_probability: float | None, top: Sequence[tuple[int, float]]) -> Score:
        offset = self._offset
        self._offset += len(self._decoder.push(token))
        return Score(token, log_probability, top, offset)
