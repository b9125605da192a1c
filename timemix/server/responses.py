"""Answers of calls: whole, or as a stream of server-sent events, until the client leaves."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from timemix.generation.request import Event
from timemix.server.answers import Call, Piece
from timemix.server.engine_thread import EngineThread, Stream
from timemix.server.errors import ApiError
from timemix.server.fields import checked

KEEP_ALIVE = 5.0
"""A stream without an event gets a comment after 1 to 2 times these seconds, so that no proxy closes it."""

LONG = 1000
"""Number of scores of prompts from which another thread formats them, so that other calls continue meanwhile."""

_MARK = "\0text\0"
"""Text that is replaced by the text of a chunk."""

_Value = TypeVar("_Value")


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
