"""The command-line verb serve: offer trained models over HTTP."""

import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from timemix.cli.options import parse
from timemix.cli.sample import note_uncompiled
from timemix.errors import InvalidValue, Unavailable

if TYPE_CHECKING:
    from timemix.server.engine_thread import Served

Runs = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN [RUN ...]", help="Run folders, or checkpoints; each is a model of the API."),
]


WAITING_CONNECTIONS = 2048
"""Number of connections that may wait for the server, as in uvicorn."""

_RANGES = (
    ("port", 0, 65535),
    ("slots", 1, 2**20),
    ("queue", 1, 2**20),
    ("cache_bytes", 0, 2**63 - 1),
    ("state_bytes", 0, 2**63 - 1),
)

_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^\s/?#@*A-Z]+")
"""An origin as browsers send it: a scheme, a host in small letters and a port, or null for a page without an origin."""


@dataclass(frozen=True)
class ServeArguments:
    """Offer trained models over HTTP: an API in the form of OpenAI's, and a page to write with a model.

    Examples:
        timemix serve runs/mine
        timemix serve runs/mine runs/other --port 8080 --weights int8 --api-key-file keys.txt
    """

    runs: Runs
    host: str = "127.0.0.1"
    """Address on which the server listens; 127.0.0.1 is reached from this machine alone."""
    port: int = 8000
    """Port, from 0 to 65535 (0: a free port)."""
    slots: int = 32
    """Largest number of texts that each model generates at once, at least 1."""
    queue: int = 256
    """Largest number of requests that wait for a slot, at least 1; further requests get status 429."""
    checkpoint: str = "best"
    """Checkpoint: best, newest, or the number of its step."""
    weights: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    """Number format of the weights; fewer bytes are faster and less exact."""
    api_key_file: Path | None = None
    """File with one API key a line, of which each request must send one. Default: requests need no key."""
    cors: tuple[str, ...] = ()
    """Origins of web pages that may send requests, such as http://localhost:3000."""
    cache_bytes: int = 256 * 10**6
    """Largest size in bytes of each model's cache of states, which saves prompts that begin alike from being processed
    again (0: no cache)."""
    state_bytes: int = 10**9
    """Largest size in bytes of all states that clients store, at least 0."""
    state_dir: Path | None = None
    """Folder for these states, which survive a restart in it. Default: states are stored in memory."""
    drain_seconds: float = 30.0
    """Time in seconds, at least 0, that running requests get after Ctrl-C or SIGTERM."""
    device: str = "auto"
    """PyTorch device: cpu, cuda ...; `auto` is cuda if available, otherwise cpu."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                flag = name.replace("_", "-")
                raise InvalidValue(f"--{flag} is {getattr(self, name)}; it must be from {low} to {high}")
        if not self.drain_seconds >= 0:
            raise InvalidValue(f"--drain-seconds is {self.drain_seconds}; it must be at least 0")
        for origin in self.cors:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidValue(
                    f"--cors is {origin!r}; it must be an origin without a path, such as https://example.org"
                )
        if not self.runs:
            raise InvalidValue("no run is given; give at least one: timemix serve RUN")


def serve(arguments: list[str]) -> int:
    parsed = parse(ServeArguments, arguments, "serve")
    listening = _listen(parsed.host, parsed.port)
    with listening:
        from timemix.server import app
        from timemix.server.security import read_keys

        keys = () if parsed.api_key_file is None else read_keys(parsed.api_key_file)
        models = _models(parsed)
        try:
            # Another server may have bound the port as well, and listen since then.
            listening.listen(WAITING_CONNECTIONS)
        except OSError as error:
            raise _cannot_listen(parsed.host, parsed.port, error) from None
        host = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
        url = f"http://{host}:{listening.getsockname()[1]}/"
        settings = app.Settings(
            parsed.host, keys, parsed.cors, parsed.drain_seconds, parsed.state_bytes, parsed.state_dir
        )
        if not (settings.hosts or keys):
            print(
                "timemix: other machines can use the server without an API key; restrict it with --api-key-file",
                file=sys.stderr,
                flush=True,
            )
        app.serve(models, settings, listening, lambda: print(f"timemix: serving at {url} (Ctrl-C ends it)", flush=True))
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, UnicodeError) as error:
        listening.close()
        raise _cannot_listen(host, port, error) from None
    return listening


def _cannot_listen(host: str, port: int, error: Exception) -> Unavailable:
    reason = getattr(error, "strerror", None) or error
    return Unavailable(f"the server cannot listen on {host}:{port}: {reason}; choose another --host or --port")


def _models(parsed: ServeArguments) -> "Sequence[Served]":
    """Load the models of the runs."""
    from timemix.generation.engine import Engine
    from timemix.generation.prefix_cache import PrefixCache
    from timemix.runs.load import load
    from timemix.runtime.device import choose_device
    from timemix.server.engine_thread import Served

    device = str(choose_device(parsed.device)[0])
    models: list[Served] = []
    for run in parsed.runs:
        loaded = load(run, checkpoint=parsed.checkpoint, device=device, mapped=True)
        name = _free_name(run, {each.name for each in models})
        engine = Engine(
            loaded.model,
            loaded.tokenizer,
            slots=parsed.slots,
            weights=parsed.weights,
            max_pending=parsed.queue,
            cache=PrefixCache(parsed.cache_bytes) if parsed.cache_bytes else None,
        )
        note_uncompiled(engine, name)
        created = int(loaded.folder.stat().st_mtime)
        models.append(Served(name, engine, parsed.weights, created, loaded.config.data.template))
        config = loaded.model.config
        parameters = sum(p.numel() for p in loaded.model.parameters())
        print(f"timemix: model {name}: {config.arch}, {parameters:,} parameters, {parsed.weights}", flush=True)
    return models


def _free_name(run: Path, taken: set[str]) -> str:
    """Return the name of a run's folder, with a number if another model has this name."""
    base = run.resolve().name
    return next(name for i in range(1, len(taken) + 2) if (name := base if i == 1 else f"{base}-{i}") not in taken)
