"""Measure `timemix serve`: against the bare engine, to the first token, and against the server of llama.cpp.

python benchmarks/serve.py                                             the parts without another program
python benchmarks/serve.py --llama-server FILE --gguf q8_0.gguf        all parts

Clients run in a process of their own (serve_load.py) and send requests over 127.0.0.1. The engine alone and the server
run in turn, in one process, on one engine. llama.cpp gets the same weights: benchmarks/rwkv7.py write-hf writes them,
convert_hf_to_gguf.py and llama-quantize make q8_0.gguf from them. llama-server is a target of the source archive of
llama-cpp-python.

`--json` gets the results after every part. A repeated command continues after the parts in that file. `--toy` runs the
same code with tiny models.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from rwkv7_common import random_model, rwkv7
from rwkv7_generation import published_size

from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.models.language_model import LanguageModel
from timemix.reporting.markdown import markdown_table
from timemix.server.app import Settings, bound_clients, create_app
from timemix.server.engine_thread import Served
from timemix.tokenizers.character import CharacterTokenizer

FILTERS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""Sampler of the mixed load: the defaults of llama.cpp."""

STREAMS = 32
ROUNDS = 5
CLIENTS = (1, 8, 32)


class Results:
    """The JSON file of the results. A part whose result is in the file does not run again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.parts: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def lacks(self, name: str) -> bool:
        return name not in self.parts

    def add(self, name: str, **figures: Any) -> None:
        """Store the figures of a part, and print them."""
        self.parts[name] = figures
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.parts, indent=1) + "\n")
        print(name, figures, flush=True)

    def table(self) -> str:
        """Return all results as a Markdown table."""
        rows = [[name, key, f"{value:,.4g}"] for name, part in self.parts.items() for key, value in part.items()]
        return markdown_table([["part", "figure", "value"], *rows], words=(0, 1))


def served(model: LanguageModel, name: str) -> Served:
    """Return a model in int8 with a tokenizer of one character a token."""
    # The code points from 256 on, without surrogates and control characters.
    characters = [chr(code) for code in range(256, 2**17) if not 0xD800 <= code < 0xE000]
    tokenizer = CharacterTokenizer(characters[: model.config.vocab_size], "error")
    return Served(name, Engine(model, tokenizer, slots=STREAMS, weights="int8"), "int8", 0)


@contextlib.contextmanager
def running(model: Served) -> Iterator[int]:
    """Run a server of a model in a thread; yield its port."""
    listening = socket.socket()
    bound_clients(listening)
    listening.bind(("127.0.0.1", 0))
    app = create_app([model], Settings(), on_death=lambda error: os.abort())
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def llama(program: Path, file: Path) -> Iterator[int]:
    """Run the server of llama.cpp with as many slots and threads; yield its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [program, "-m", file, "--port", port, "-np", STREAMS, "-c", 1024 * STREAMS, "-t", torch.get_num_threads()]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            time.sleep(0.1)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def load(port: int, clients: list[list[dict[str, Any]]], *, gaps: bool = False) -> dict[str, Any]:
    """Send requests from a process of their own; return what the clients saw."""
    spec = {"host": "127.0.0.1", "port": port, "path": "/v1/completions", "gaps": gaps, "clients": clients}
    command = [sys.executable, str(Path(__file__).with_name("serve_load.py"))]
    done = subprocess.run(command, input=json.dumps(spec), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    if found["wrong"] is not None:
        raise SystemExit(f"a request failed: {found['wrong']}")
    return found


def body(prompt: list[int], tokens: int, seed: int = 0, **sampler: float) -> dict[str, Any]:
    options = {"ignore_eos": True, "seed": seed, "stream": True, "stream_options": {"include_usage": True}}
    return {"prompt": prompt, "max_tokens": tokens} | options | sampler


def bare(engine: Engine, tokens: int) -> float:
    """Return the time in which the engine alone generates all streams."""
    for seed in range(STREAMS):
        engine.add(Request([1], tokens, seed=seed))
    begin = time.perf_counter()
    while engine.busy:
        engine.step()
    return time.perf_counter() - begin


def streams(results: Results, model: Served, port: int, tokens: int) -> None:
    """Compare 32 streams over HTTP with the engine alone: the median and the range of the rounds."""
    name = f"{STREAMS} streams, {model.name}"
    if not results.lacks(name):
        return
    requests = [[body([1], tokens, seed)] for seed in range(STREAMS)]
    ratios, rates = [], []
    for number in range(ROUNDS + 1):
        alone = bare(model.engine, tokens)
        found = load(port, requests)
        if number == 0:
            continue
        # Each token is an event. The last event of a stream holds the usage.
        assert found["events"] == STREAMS * (tokens + 1), found["events"]
        ratios.append(alone / found["seconds"])
        rates.append(STREAMS * tokens / alone)
    results.add(
        name,
        engine_tokens_per_second=statistics.median(rates),
        share_over_http=statistics.median(ratios),
        lowest_share=min(ratios),
        highest_share=max(ratios),
    )


def first_token(results: Results, model: Served, port: int) -> None:
    """Measure the time to the first token of an idle server, for a prompt of 32 tokens."""
    name = f"first token, {model.name}"
    if results.lacks(name):
        times = [load(port, [[body([i % 50] * 32, 1, i)]], gaps=True)["first"][0] for i in range(21)]
        results.add(name, median_ms=1e3 * statistics.median(times), worst_ms=1e3 * max(times))


def mixed(clients: int, vocab_size: int, *, toy: bool) -> list[list[dict[str, Any]]]:
    """Return the requests of a mixed load: prompts of 8 to 256 tokens, answers of 16 to 96 tokens."""
    chosen = random.Random(clients)
    count = 1 if toy else {1: 6, 8: 3, 32: 2}[clients]
    return [
        [
            body(chosen.choices(range(70, vocab_size), k=length), tokens, client, **FILTERS)
            for length, tokens in ((chosen.randint(8, 256), chosen.randint(16, 96)) for _ in range(count))
        ]
        for client in range(clients)
    ]


def summary(found: dict[str, Any]) -> dict[str, float]:
    gaps = sorted(found["gaps"])
    return {
        "tokens_per_second": found["tokens"] / found["seconds"],
        "between_tokens_p50_ms": 1e3 * gaps[len(gaps) // 2],
        "between_tokens_p95_ms": 1e3 * gaps[int(0.95 * len(gaps))],
        "first_token_p50_ms": 1e3 * statistics.median(found["first"]),
    }


def against_llama(
    results: Results, model: Served, port: int, program: Path | None, file: Path | None, *, toy: bool
) -> None:
    """Send a mixed load to both servers, alternating."""
    vocab_size = model.engine.model.config.vocab_size
    for clients in CLIENTS:
        name = f"{clients} clients, {model.name}"
        if not results.lacks(name):
            continue
        requests = mixed(clients, vocab_size, toy=toy)
        ours, theirs = [], []
        for _ in range(1 if toy else 2):
            ours.append(summary(load(port, requests, gaps=True)))
            if program is not None and file is not None:
                # The other server runs only while it is measured.
                with llama(program, file) as other:
                    load(other, [[body([150] * 8, 8)]])
                    theirs.append(summary(load(other, requests, gaps=True)))
        figures = {key: statistics.median(each[key] for each in ours) for key in ours[0]}
        if theirs:
            other_figures = {key: statistics.median(each[key] for each in theirs) for key in theirs[0]}
            figures |= {f"llama_{key}": value for key, value in other_figures.items()}
            figures["speedup"] = figures["tokens_per_second"] / figures["llama_tokens_per_second"]
        results.add(name, **figures)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, help="the program llama-server")
    parser.add_argument("--gguf", type=Path, help="q8_0.gguf with the weights of the model of 0.19 B parameters")
    parser.add_argument("--json", type=Path, default=Path("runs/serve.json"), help="file of the results")
    parser.add_argument("--toy", action="store_true", help="use tiny models")
    asked = parser.parse_args(arguments)
    results, toy = Results(asked.json), asked.toy
    small = rwkv7(2, 64, 260) if toy else rwkv7(8, 384, 2048)
    models = [served(random_model(small).eval(), "17 M"), served(published_size("0.19 B", toy), "0.19 B")]
    for model, tokens in zip(models, (10, 10) if toy else (200, 48), strict=True):
        with running(model) as port:
            first_token(results, model, port)
            streams(results, model, port, tokens)
            if model is models[1]:
                against_llama(results, model, port, asked.llama_server, asked.gguf, toy=toy)
    print(results.table())


if __name__ == "__main__":
    main()
