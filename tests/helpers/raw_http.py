"""HTTP over a raw socket: clients that stop reading, leave, or send what no client sends."""

import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from tests.helpers.serving import Running


def connect(server: Running, receive_buffer: int | None = None) -> socket.socket:
    """Return a connection to a server.

    Args:
        server: The server.
        receive_buffer: Number of bytes that the kernel stores for a client that does not read; None: many.
    """
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    address = urlsplit(server.url)
    connection.connect((address.hostname, address.port))
    return connection


def posted(path: str, body: Any, *headers: str) -> bytes:
    """Return the bytes of a POST request with a JSON body."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def post(server: Running, path: str, body: Any, receive_buffer: int | None = None) -> socket.socket:
    """Send a POST request; return the connection, from which nothing has been read."""
    connection = connect(server, receive_buffer)
    connection.sendall(posted(path, body))
    return connection


def read_until(connection: socket.socket, word: bytes) -> bytes:
    """Read until a word has come, or the end."""
    found = b""
    while word not in found and (part := connection.recv(65536)):
        found += part
    return found


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def within(seconds: float, is_true: Callable[[], bool]) -> bool:
    """Return whether a condition becomes true within a time."""
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True
