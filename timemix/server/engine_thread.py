"""The thread that steps the engines, and the way of events from this thread to the coroutines of requests."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from timemix.data.templates import ChatTemplate, template_of
from timemix.errors import TooManyRequests
from timemix.generation.engine import Engine
from timemix.generation.request import Event, Request
from timemix.server.errors import ApiError
from timemix.server.metrics import Metrics
from timemix.tokenizers.base import Tokenizer

MOST_UNREAD = 2048
"""Largest number of events of a sample that wait for a client. A client that reads more slowly loses its request."""


@dataclass(eq=False)
class Served:
    """A model that the server offers.

    Args:
        name: Name of the model in the API.
        engine: Engine of the model, with a tokenizer.
        weights: Number format of the weights.
        created: Time of the checkpoint, in seconds since 1970.
        trained: Name of the chat template of the model's training, if it was trained on conversations.
        metrics: Counts since the start.
    """

    name: str
    engine: Engine
    weights: str
    created: int
    trained: str | None = None
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model."""
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """Chat template of the model."""
        return template_of(self.tokenizer, self.trained)


class Stream:
    """Events of the engine's requests of one call of the API, for one coroutine.

    Args:
        served: The model.
        requests: The requests.
        thread: The thread that steps the engine.
    """

    def __init__(self, served: Served, requests: Sequence[Request], thread: "EngineThread") -> None:
        self.served, self._thread = served, thread
        self.fault: ApiError | None = None
        self._started = time.monotonic()
        self._last: dict[tuple[int, int], float] = {}
        self._unread: list[tuple[int, Event]] = []
        self._ready = asyncio.Event()
        # Number of samples that have not ended, by id of the request, and the place of each request in the call.
        self._requests = requests
        self._open: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self._most_unread = MOST_UNREAD * sum(request.samples for request in requests)
        try:
            for place, request in enumerate(requests):
                id = served.engine.add(request)
                self._open[id], self._places[id] = request.samples, place
        except BaseException:
            # The call as a whole is refused, so no sample of it counts as cancelled.
            for id in self._open:
                served.engine.cancel(id)
            raise

    @property
    def ids(self) -> list[int]:
        """Ids of the engine's requests that have not ended."""
        return list(self._open)

    @property
    def has_ended(self) -> bool:
        """Whether all samples have ended and all events have been taken. A stream with a fault never ends."""
        return self.fault is None and not (self._open or self._unread)

    async def take(self) -> list[tuple[int, Event]]:
        """Wait for events.

        Returns:
            All unread events, each with the place of its request in the call; [] after a call of `wake`.

        Raises:
            ApiError: The server had to end the requests.
        """
        await self._ready.wait()
        if self.fault is not None:
            raise self.fault
        events, self._unread = self._unread, []
        self._ready.clear()
        return events

    def wake(self) -> None:
        """End the wait of `take`."""
        self._ready.set()

    def progress(self) -> tuple[int, int]:
        """Return the number of prompt tokens that have been processed, and the number of all prompt tokens."""
        processed = total = 0
        for id in self.ids:
            found = self.served.engine.progress(id)
            processed, total = processed + found[0], total + found[1]
        return processed, total

    def put(self, event: Event, now: float) -> None:
        """Add an event, and count it."""
        metrics, sample = self.served.metrics, (event.id, event.sample)
        if event.sample == self._requests[self._places[event.id]].sample:
            # The other samples share the prompt of the first sample.
            metrics.cached_tokens += event.cached
        if event.token is not None:
            metrics.generated_tokens += 1
            if (last := self._last.get(sample)) is None:
                metrics.first_token.add(now - self._started)
            else:
                metrics.between_tokens.add(now - last)
            self._last[sample] = now
        if event.finished is not None:
            metrics.finished[event.finished] += 1
            self._open[event.id] -= 1
            if not self._open[event.id]:
                self._thread.forget(self, event.id)
                del self._open[event.id]
        self._unread.append((self._places[event.id], event))
        self._ready.set()
        if len(self._unread) > self._most_unread:
            self.fail(ApiError(400, "the client reads too slowly; read the stream while it is generated"))

    def fail(self, fault: ApiError) -> None:
        """End the requests with an error."""
        self.fault = fault
        self._unread.clear()
        self._ready.set()
        self.cancel()

    def cancel(self) -> None:
        """End the requests, which frees their slots. A stream that has ended does not change."""
        for id, samples in self._open.items():
            self.served.engine.cancel(id)
            self._thread.forget(self, id)
            self.served.metrics.finished["cancelled"] += samples
        self._open.clear()


class EngineThread:
    """One thread that steps the engines of all models in turn.

    All methods belong to the thread of the event loop.

    Args:
        models: The models.
        on_death: Function that is called in the event loop when a step has failed, with the exception.
    """

    def __init__(self, models: Sequence[Served], on_death: Callable[[BaseException], None]) -> None:
        self.models = list(models)
        self.fault: BaseException | None = None
        self.is_closing, self._end, self._is_hurried = False, 0.0, False
        self._on_death = on_death
        self._streams: dict[tuple[Served, int], Stream] = {}
        self._work, self._is_stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread. The running event loop receives the events."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, served: Served, requests: Sequence[Request]) -> Stream:
        """Add requests to the engine of a model: all of them, or none.

        Args:
            served: The model.
            requests: The requests.

        Returns:
            The stream of their events.

        Raises:
            ApiError: The queue is full (429), the server is closing or broken (503), or the requests never fit into
                the queue (400).
            InvalidValue: A request does not fit the model.
        """
        self.refuse_if_closing()
        engine = served.engine
        if engine.max_pending is not None and len(requests) > (most := engine.slots + engine.max_pending):
            raise ApiError(400, f"prompt holds {len(requests)} prompts; the server takes at most {most}", "prompt")
        try:
            stream = Stream(served, requests, self)
        except TooManyRequests:
            raise ApiError(
                429,
                "too many requests are waiting; send the request again later",
                None,
                "queue_full",
                {"Retry-After": "1"},
            ) from None
        for id in stream.ids:
            self._streams[served, id] = stream
        served.metrics.prompt_tokens += sum(len(request.prompt) for request in requests)
        self._work.set()
        return stream

    def refuse_if_closing(self) -> None:
        """Raise ApiError if the server is closing or broken."""
        if self.is_closing or self.fault is not None:
            raise ApiError(503, "the server is closing; send the request again later", headers={"Retry-After": "5"})

    def forget(self, stream: Stream, id: int) -> None:
        """Stop the delivery of a request's events."""
        self._streams.pop((stream.served, id), None)

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        return not self._streams

    async def close(self, seconds: float) -> None:
        """Refuse new requests, wait for all others, cancel those that last longer, then end the thread.

        Args:
            seconds: Longest time to wait.
        """
        # `hurry` may have been called before.
        self.is_closing, self._end = True, 0.0 if self._is_hurried else time.monotonic() + seconds
        while not self.is_idle and self.fault is None and time.monotonic() < self._end:
            await asyncio.sleep(0.02)
        for stream in set(self._streams.values()):
            stream.fail(ApiError(503, "the server has closed; send the request again", headers={"Retry-After": "5"}))
        self._is_stopping = True
        self._work.set()
        await asyncio.to_thread(self._thread.join)

    def hurry(self) -> None:
        """Make `close` wait no longer."""
        self._is_hurried, self._end = True, 0.0

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while not self._is_stopping:
                self._work.wait()
                # Clear before the look at the engines: a request that comes after the look sets it again.
                self._work.clear()
                while not self._is_stopping and sum(self._step(served) for served in self.models):
                    pass
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._die, error)

    def _step(self, served: Served) -> bool:
        """Step an engine that has work; return whether it had work."""
        if not served.engine.busy:
            return False
        try:
            events = served.engine.step()
        except BaseException as error:
            error.add_note(f"timemix: the engine of the model {served.name!r} has failed; the server ends")
            raise
        if events:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._deliver, served, events)
        return True

    def _deliver(self, served: Served, events: list[Event]) -> None:
        now = time.monotonic()
        for event in events:
            stream = self._streams.get((served, event.id))
            if stream is not None:
                stream.put(event, now)

    def _die(self, error: BaseException) -> None:
        self.fault = error
        for stream in set(self._streams.values()):
            stream.fail(ApiError(500, "the engine has failed; the server ends"))
        self._on_death(error)
