"""Checks before a request reaches a handler: Host, Origin and API key."""

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from timemix.errors import DamagedFile, FileError, MissingFile
from timemix.server.errors import ApiError
from timemix.storage.files import cannot_read

PUBLIC = ("/", "/health", "/openapi.json")
"""Paths that need no key."""

LOCAL = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine."""


def read_keys(path: Path) -> list[str]:
    """Read a file of API keys, one a line. Empty lines, and lines that begin with #, are left out.

    Args:
        path: The file.

    Raises:
        FileError: The file is missing, cannot be read, is no UTF-8 text, or holds no key.
    """
    try:
        # Some editors begin a file with a byte order mark, which is no part of the first key.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise MissingFile(f"{path} does not exist; write one API key a line into it") from None
    except OSError as error:
        raise FileError(cannot_read(path, error)) from None
    except UnicodeDecodeError:
        raise DamagedFile(f"{path} is not UTF-8 text; write one API key a line into it") from None
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise DamagedFile(f"{path} holds no API key; write one a line")
    return keys


class Guard:
    """Refuse requests from foreign pages, to foreign host names, and without a key.

    A page of another site that a user of this machine visits can send requests to this server. Its requests carry
    their Origin, or a foreign Host if the page's own name leads to this machine.

    Args:
        app: The app.
        keys: API keys; [] allows every request.
        origins: Origins that may send requests besides the server's own pages.
        hosts: Host names that a request may name; [] allows every name.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], origins: Sequence[str], hosts: Sequence[str]) -> None:
        self._app, self._origins, self._hosts = app, set(origins), set(hosts)
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then pass it on with the digest of its key as `scope["state"]["owner"]`."""
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["owner"] = self._checked(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _checked(self, scope: Scope) -> str:
        """Return the digest of the key of a request, "" if the server has no keys.

        Raises:
            ApiError: The request is refused.
        """
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts and _name(host).lower() not in self._hosts:
            raise ApiError(403, f"the host {host!r} is not served; open the address that the server printed", "Host")
        if origin is not None and origin not in self._origins and origin.partition("://")[2] != host:
            raise ApiError(403, f"pages of {origin!r} are not allowed; start the server with --cors {origin}", "Origin")
        # A preflight request of a browser carries no key.
        if not self._digests or scope["path"] in PUBLIC or scope["method"] == "OPTIONS":
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Clients send a key that is not ASCII as UTF-8. Starlette decodes every header as Latin-1.
        digest = _digest(key.strip(" \t").encode("latin-1"))
        # Compare with every key, so that the time says nothing about the keys.
        found = [secrets.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(found):
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _name(host: str) -> str:
    """Return a host without its port."""
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host
