"""The way from events of the engine to an answer, whole or as a stream, in the form of one endpoint."""

import asyncio
import json
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from timemix.generation.request import Event, Request
from timemix.generation.session import Session
from timemix.server.engine_thread import EngineThread, Served, Stream
from timemix.server.errors import ApiError
from timemix.server.fields import checked
from timemix.tokenizers.base import Tokenizer

KEEP_ALIVE = 5.0
"""A stream without an event gets a comment after 1 to 2 times these seconds, so that no proxy closes it."""

LONG = 1000
"""Number of scores of prompts from which another thread formats them, so that other calls continue meanwhile."""

_MARK = "\0text\0"
"""Text that is replaced by the text of a chunk."""

_Value = TypeVar("_Value")


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
            self.served.metrics.cached_tokens += event.cached
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


async def respond(request: HttpRequest, call: Call, thread: EngineThread) -> Response:
    """Answer a call: at once as a stream, or with the whole answer. A client that leaves frees its slots.

    Args:
        request: The HTTP request, whose body has been read.
        call: The call.
        thread: The thread that steps the engine.

    Raises:
        ApiError: The call cannot be answered.
    """
    stream = checked("prompt", lambda: thread.submit(call.served, call.requests))
    if call.is_stream:
        return EventStream(call, stream)
    return await while_connected(request.receive, stream, _whole(call, stream))


async def while_connected(receive: Receive, stream: Stream, answer: Coroutine[Any, Any, Response]) -> Response:
    """Wait for an answer. A client that leaves frees its slots.

    Args:
        receive: The messages of the HTTP request, whose body has been read.
        stream: The events from which the answer is made.
        answer: The answer.
    """
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_until_disconnected(receive))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=499)
    finally:
        await _end(stream, answering, leaving)


async def _whole(call: Call, stream: Stream) -> Response:
    """Return the whole answer."""
    pieces = [Piece(index) for index in range(call.size)]
    while not stream.has_ended:
        events = await stream.take()
        await call.store(events)
        for piece in await _formatted(lambda given: [call.piece(*each) for each in given], events):
            pieces[piece.index].add(piece)

    def answer() -> Response:
        choices = [call.form.choice(piece, call.served.tokenizer, is_part=False) for piece in pieces]
        return JSONResponse(call.head(call.form.whole) | {"choices": choices, "usage": call.usage()})

    return await run_in_threadpool(answer) if call.scored else answer()


async def _formatted(
    format: Callable[[Sequence[tuple[int, Event]]], _Value], events: Sequence[tuple[int, Event]]
) -> _Value:
    """Call a function that formats events: in another thread if they hold the scores of long prompts."""
    scores = sum(len(event.prompt_log_probabilities or ()) for _, event in events)
    return format(events) if scores < LONG else await run_in_threadpool(format, events)


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(stream: Stream, *tasks: asyncio.Future[Any]) -> None:
    """Cancel the requests and the tasks of a call."""
    stream.cancel()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """A stream of server-sent events.

    Args:
        call: The call.
        stream: The events of the engine.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, stream: Stream) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._call, self._stream = call, stream
        head = call.head(call.form.part)
        self._head = f"data: {json.dumps(head)[:-1]}, "
        self._parts_sent = 0
        self._frames: dict[int, tuple[str, str]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, until its end or until the client leaves."""
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_until_disconnected(receive))
        reminding = asyncio.ensure_future(self._ask_for_comments())
        try:
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            await _end(self._stream, writing, leaving, reminding)

    async def _ask_for_comments(self) -> None:
        """Wake the stream whenever nothing has been sent for a while."""
        # One timer for the whole stream costs less than a timer for each token.
        before = -1
        while True:
            await asyncio.sleep(KEEP_ALIVE)
            if self._parts_sent == before:
                self._stream.wake()
            before = self._parts_sent

    async def _write(self, send: Send) -> None:
        call, stream = self._call, self._stream
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        openings = [call.form.opening(index) for index in range(call.size)]
        data = "".join(self._chunk(opening) for opening in openings if opening)
        try:
            while not stream.has_ended:
                if data:
                    await self._send(send, data)
                events = await stream.take()
                await call.store(events)
                data = await _formatted(self._chunks, events)
            if call.includes_usage:
                data += self._chunk(None, call.usage())
            data += "data: [DONE]\n\n"
        except ApiError as error:
            data = f"data: {json.dumps(error.body())}\n\n"
        await self._send(send, data, more=False)

    async def _send(self, send: Send, data: str, *, more: bool = True) -> None:
        """Send a part of the stream."""
        await send({"type": "http.response.body", "body": data.encode(), "more_body": more})
        self._parts_sent += 1

    def _chunks(self, events: Sequence[tuple[int, Event]]) -> str:
        """Return the chunks of new events, or a comment if there are none."""
        if not events:
            processed, total = self._stream.progress()
            return f": reading {processed}/{total}\n\n"
        call = self._call
        found: list[str] = []
        for place, event in events:
            piece = call.piece(place, event)
            if piece.text and piece.is_text_only and not call.repeats_usage:
                begin, end = self._frame(piece.index)
                found += begin, json.dumps(piece.text), end
            elif piece.text or piece.finish or piece.scores or any(piece.extras.values()):
                found.append(self._choice_chunk(piece))
        return "".join(found)

    def _frame(self, index: int) -> tuple[str, str]:
        """Return the beginning and the end of each chunk of a choice that holds text alone: the frame of the text."""
        # Most chunks differ in their text alone. To encode each chunk as a whole takes three times as long.
        frame = self._frames.get(index)
        if frame is None:
            begin, _, end = self._choice_chunk(Piece(index, _MARK)).partition(json.dumps(_MARK))
            frame = self._frames[index] = begin, end
        return frame

    def _choice_chunk(self, piece: Piece) -> str:
        """Return the chunk of a piece."""
        return self._chunk(self._call.form.choice(piece, self._call.served.tokenizer, is_part=True))

    def _chunk(self, choice: dict[str, Any] | None, usage: dict[str, Any] | None = None) -> str:
        """Return one chunk of the stream: with a choice, or without choices and with the usage of the whole call."""
        call = self._call
        if usage is None and call.repeats_usage:
            usage = call.usage()
        known = f', "usage": {json.dumps(usage)}' if call.includes_usage or call.repeats_usage else ""
        choices = "" if choice is None else json.dumps(choice)
        return f'{self._head}"choices": [{choices}]{known}}}\n\n'
