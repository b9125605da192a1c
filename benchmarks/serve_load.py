"""The client of benchmarks/serve.py, in a process of its own so that it does not slow the server's Python.

It reads a JSON object from standard input and prints a JSON object: `address`, `path`, and for each connection the
bodies of its requests, one after another. With `gaps`, it records when tokens arrive. Otherwise it counts bytes only.
"""

import json
import selectors
import socket
import sys
import time
from typing import Any

EVENT = b"data: "


class Client:
    """One client: it sends its requests one after another, each over a new connection."""

    def __init__(self, spec: dict[str, Any], bodies: list[dict[str, Any]], selector: selectors.BaseSelector) -> None:
        self._address = (spec["host"], spec["port"])
        self._path, self._has_gaps, self._selector = spec["path"], spec["gaps"], selector
        self._bodies = [json.dumps(body).encode() for body in bodies]
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.texts: list[bytes] = []
        self.is_done = False
        self._next()

    def _next(self) -> None:
        if not self._bodies:
            self.is_done = True
            return
        body = self._bodies.pop(0)
        self._socket, self._parts, self._last = socket.create_connection(self._address), [], 0.0
        self._sent = time.perf_counter()
        lines = (
            f"POST {self._path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._socket.sendall(lines.encode() + body)
        self._selector.register(self._socket, selectors.EVENT_READ, self)

    def read(self) -> None:
        """Read what has come; begin the next request after the last byte."""
        part = self._socket.recv(65536)
        if not part:
            self._selector.unregister(self._socket)
            self._socket.close()
            self.texts.append(b"".join(self._parts))
            self._next()
            return
        self._parts.append(part)
        if self._has_gaps and EVENT in part:
            now = time.perf_counter()
            if self._last:
                # Events that come together have no time between them.
                self.gaps += [now - self._last, *[0.0] * (part.count(EVENT) - 1)]
            else:
                self.first.append(now - self._sent)
            self._last = now


def main() -> None:
    spec = json.load(sys.stdin)
    with selectors.DefaultSelector() as selector:
        begin = time.perf_counter()
        clients = [Client(spec, bodies, selector) for bodies in spec["clients"]]
        while not all(client.is_done for client in clients):
            for key, _ in selector.select():
                key.data.read()
        seconds = time.perf_counter() - begin
    texts = [text for client in clients for text in client.texts]
    wrong = next((text for text in texts if not text.startswith(b"HTTP/1.1 200") or b"[DONE]" not in text), None)
    found = {
        "seconds": seconds,
        "events": sum(text.count(EVENT) for text in texts) - len(texts),
        "tokens": sum(_tokens(text) for text in texts),
        "first": [x for client in clients for x in client.first],
        "gaps": [x for client in clients for x in client.gaps],
        "wrong": None if wrong is None else wrong[:500].decode(errors="replace"),
    }
    print(json.dumps(found))


def _tokens(text: bytes) -> int:
    """Return the number of generated tokens that the usage of a stream reports; 0 without usage."""
    _, _, rest = text.rpartition(b'"completion_tokens":')
    return int(rest.split(b",")[0].split(b"}")[0]) if rest and rest != text else 0


if __name__ == "__main__":
    main()
