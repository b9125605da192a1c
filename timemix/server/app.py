"""The app of the server: its routes, and its run from start to end."""

import asyncio
import logging
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from timemix.generation.prefix_cache import PrefixCache
from timemix.server.chat import chat
from timemix.server.completions import complete
from timemix.server.engine_thread import EngineThread, Served
from timemix.server.errors import ApiError, answer_error
from timemix.server.metrics import Series, to_text
from timemix.server.next_token import next_token
from timemix.server.page import show_page
from timemix.server.security import LOCAL, Guard
from timemix.server.service import Service, service_of
from timemix.server.state_store import StateStore
from timemix.server.states import AllStates, OneState, fork_state
from timemix.server.tokens import detokenize, tokenize, tokenizer_info

SEND_BUFFER = 2**16
"""Size in bytes of the kernel's buffer of each connection. By default, it grows to megabytes for a slow client."""

LONGEST_SEND = 60
"""Seconds after which a client that reads nothing loses its connection, and so its request."""


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Args:
        host: Address on which the server listens.
        keys: API keys; empty: no key is needed.
        origins: Origins of foreign pages that may send requests.
        drain_seconds: Longest time in seconds that running requests get when the server ends.
        state_bytes: Largest size in bytes of all states that clients store.
        state_dir: Folder of the files of these states; None: memory.
    """

    host: str = "127.0.0.1"
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    drain_seconds: float = 30.0
    state_bytes: int = 10**9
    state_dir: Path | None = None

    @property
    def hosts(self) -> Sequence[str]:
        """Host names that a request may name; empty: every name."""
        if self.host in ("127.0.0.1", "localhost", "::1"):
            return LOCAL
        with suppress(ValueError):
            if ip_address(self.host).is_loopback:
                return (*LOCAL, self.host, f"[{self.host}]")
        return ()


def create_app(models: Sequence[Served], settings: Settings, on_death: Callable[[BaseException], None]) -> Starlette:
    """Create the app.

    Args:
        models: The models, at least one, with different names.
        settings: The settings.
        on_death: Function that is called in the event loop when a step of an engine has failed.

    Returns:
        The app. It starts the thread of the engines with its lifespan.
    """
    thread = EngineThread(models, on_death)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        thread.start()
        yield
        await thread.close(0)

    middleware = [Middleware(Guard, keys=settings.keys, origins=settings.origins, hosts=settings.hosts)]
    if settings.origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=_routes(),
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={ApiError: answer_error, HTTPException: _answer_http, Exception: _answer_bug},
    )
    app.state.service = Service(models, thread, StateStore(settings.state_bytes, settings.state_dir))
    return app


def _routes() -> list[Route]:
    return [
        Route("/", show_page, methods=["GET"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/next_token", next_token, methods=["POST"]),
        Route("/v1/states", AllStates, methods=["GET", "POST"]),
        Route("/v1/states/{id}", OneState, methods=["GET", "PUT", "DELETE"]),
        Route("/v1/states/{id}/fork", fork_state, methods=["POST"]),
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", show_model, methods=["GET"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", describe, methods=["GET"]),
    ]


async def describe(_: HttpRequest) -> Response:
    """Answer GET /openapi.json with the description of the API."""
    return FileResponse(Path(__file__).with_name("openapi.json"), media_type="application/json")


async def health(request: HttpRequest) -> Response:
    """Answer GET /health: 200 while the server takes requests, otherwise 503."""
    thread = service_of(request).thread
    if thread.fault is None and not thread.is_closing:
        return JSONResponse({"status": "ok"})
    status = "closing" if thread.fault is None else "failed"
    return JSONResponse({"status": status}, 503, headers={"Retry-After": "5"})


def _describe(served: Served) -> dict[str, Any]:
    model, template = served.engine.model, served.template
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "timemix",
        "architecture": model.config.arch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": model.config.vocab_size,
        "max_position": model.max_position,
        "state_bytes": model.init_state(1).nbytes,
        "tokenizer": served.tokenizer.kind,
        "weights": served.weights,
        "chat_template": template.name if template.has_labels else None,
    }


async def list_models(request: HttpRequest) -> Response:
    """Answer GET /v1/models."""
    return JSONResponse({"object": "list", "data": [_describe(each) for each in service_of(request).models]})


async def show_model(request: HttpRequest) -> Response:
    """Answer GET /v1/models/NAME."""
    name = request.path_params["name"]
    return JSONResponse(_describe(service_of(request).model(name))) if name else await list_models(request)


async def metrics(request: HttpRequest) -> Response:
    """Answer GET /metrics in the text format of Prometheus."""
    models = service_of(request).models

    def series(name: str, kind: str, help: str, value: Callable[[Served], Any]) -> Series:
        return Series(name, kind, help, [({"model": each.name}, value(each)) for each in models])

    finished = [
        ({"model": each.name, "reason": reason}, float(count))
        for each in models
        for reason, count in each.metrics.finished.items()
    ]
    found = [
        series("requests_running", "gauge", "Samples that have a slot.", lambda m: m.engine.active),
        series("requests_waiting", "gauge", "Samples that wait for a slot.", lambda m: m.engine.pending),
        series("prompt_tokens_total", "counter", "Tokens of prompts.", lambda m: m.metrics.prompt_tokens),
        series("cached_tokens_total", "counter", "Prompt tokens from the cache.", lambda m: m.metrics.cached_tokens),
        series("generated_tokens_total", "counter", "Generated tokens.", lambda m: m.metrics.generated_tokens),
        Series("samples_finished_total", "counter", "Samples that have ended, by reason.", finished),
        series("time_to_first_token_seconds", "histogram", "Time to the first token.", lambda m: m.metrics.first_token),
        series("time_between_tokens_seconds", "histogram", "Time between tokens.", lambda m: m.metrics.between_tokens),
        *_state_series(service_of(request)),
    ]
    return PlainTextResponse(to_text(found), media_type="text/plain; version=0.0.4")


def _state_series(service: Service) -> list[Series]:
    """Return the metrics of cached and stored states."""
    caches = [({"model": each.name}, each.engine.cache) for each in service.models]

    def cached(name: str, kind: str, help: str, value: Callable[[PrefixCache], int]) -> Series:
        return Series(name, kind, help, [(labels, value(cache)) for labels, cache in caches if cache is not None])

    states = service.states
    return [
        cached("state_cache_hits_total", "counter", "Prompts that began with a cached state.", lambda c: c.hits),
        cached("state_cache_misses_total", "counter", "Prompts that found no cached state.", lambda c: c.misses),
        cached("state_cache_bytes", "gauge", "Size of the cached states.", lambda c: c.nbytes),
        cached("state_cache_entries", "gauge", "Number of cached states.", len),
        Series("states_stored", "gauge", "Number of states that clients store.", [({}, len(states))]),
        Series("states_bytes", "gauge", "Size of the states that clients store.", [({}, states.nbytes)]),
    ]


async def _answer_http(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "this path does not exist; GET /openapi.json lists all paths", 405: "this path has no such method"}
    found = ApiError(error.status_code, words.get(error.status_code, error.detail), headers=dict(error.headers or {}))
    return found.response()


async def _answer_bug(_: HttpRequest, error: Exception) -> Response:
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, "the server has a fault; its log has the details").response()


def server_config(app: Starlette, **options: Any) -> uvicorn.Config:
    """Return settings of uvicorn that do not depend on the installed packages.

    By default, uvicorn prefers other packages if they are installed. Its parser httptools accepts requests that h11
    refuses: requests with two Host headers, or with a header without an end.

    Args:
        app: The application.
        **options: Further settings of uvicorn.
    """
    config = uvicorn.Config(app, http="h11", loop="asyncio", ws="none", access_log=False, **options)
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    return config


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Return whether a record is not about a request that the end of the server has cancelled, which is no fault."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


class _Server(uvicorn.Server):
    """A server that drains before it ends: it refuses new requests, and finishes those that run.

    Args:
        config: Settings of uvicorn.
        thread: The thread that steps the engines.
        seconds: Longest time for the requests that run.
    """

    def __init__(self, config: uvicorn.Config, thread: EngineThread, seconds: float) -> None:
        super().__init__(config)
        self._engine_thread, self._seconds = thread, seconds
        self.loop, self._signals = asyncio.get_running_loop(), 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal, cancel all requests at the second, and end at once at the third."""
        self._signals += 1
        if self._signals == 1:
            self.loop.call_soon_threadsafe(self._begin_draining)
        elif self._signals == 2:
            self._engine_thread.hurry()
        else:
            self.should_exit = self.force_exit = True

    def _begin_draining(self) -> None:
        self._draining = self.loop.create_task(self._drain())

    async def _drain(self) -> None:
        await self._engine_thread.close(self._seconds)
        self.should_exit = True


def bound_clients(listening: socket.socket) -> None:
    """Bound the memory and the time of a client that reads nothing. Accepted connections inherit the options.

    Args:
        listening: Socket of the server.
    """
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LONGEST_SEND)


def serve(models: Sequence[Served], settings: Settings, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serve models until a signal ends the server.

    Args:
        models: The models.
        settings: The settings.
        listening: Socket that is bound to an address.
        ready: Function that is called once requests are answered.

    Raises:
        BaseException: The exception of an engine's step, which ends the server.
    """
    died: list[BaseException] = []
    server: _Server
    bound_clients(listening)

    def on_death(error: BaseException) -> None:
        died.append(error)
        server.should_exit = True

    app = create_app(models, settings, on_death)
    config = server_config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False, lifespan="on")

    async def run() -> None:
        nonlocal server
        server = _Server(config, app.state.service.thread, settings.drain_seconds)
        serving = asyncio.ensure_future(server.serve([listening]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.005)
        if server.started:
            ready()
        await serving

    asyncio.run(run())
    if died:
        raise died[0]
