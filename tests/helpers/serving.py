"""A server of timemix in this process, on a free port of 127.0.0.1."""

import asyncio
import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn

from tests.helpers.engines import CHARACTERS
from tests.helpers.models import build
from tests.helpers.openapi import check_answer
from timemix.generation.engine import Engine
from timemix.models.registry import model_config
from timemix.server.app import Settings, bound_clients, create_app, server_config
from timemix.server.engine_thread import Served


@dataclass
class Answer:
    """An answer of the server."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of a stream of events, without the comments and the end."""
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@dataclass
class Running:
    """A running server."""

    url: str
    models: Sequence[Served]
    app: Any

    def call(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Answer:
        """Send a request: with a body (bytes, or a value that becomes JSON) as POST, otherwise as GET.

        The answer must be one that openapi.json declares.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, names, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                found = Answer(error.code, dict(error.headers), error.read())
        check_answer(request.get_method(), path, found.status, found.headers, found.body)
        return found

    def complete(self, **body: Any) -> Any:
        """Return the answer of /v1/completions, which must succeed."""
        answer = self.call("/v1/completions", body)
        assert answer.status == 200, answer.body
        return answer.json


def tiny(name: str = "tiny", arch: str = "rwkv7", tokenizer: Any = CHARACTERS, **options: Any) -> Served:
    """Return a random model with the vocabulary of a tokenizer, ready to be served."""
    import torch

    model = build(model_config(arch), torch.float32, vocab_size=tokenizer.vocab_size)
    return Served(name, Engine(model, tokenizer, **options), "float32", 1)


@contextlib.contextmanager
def served(models: Sequence[Served], settings: Settings | None = None) -> Iterator[Running]:
    """Run a server for models, and yield it."""
    app = create_app(models, settings or Settings(), on_death=lambda error: None)
    listening = socket.socket()
    bound_clients(listening)
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.005)
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", models, app)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
