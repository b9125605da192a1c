"""Keys, Host, Origin, and requests that are not what HTTP promises."""

import contextlib
import hashlib
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.raw_http import connect, posted, read_to_end, read_until
from tests.helpers.serving import served, tiny
from tests.helpers.tiers import examples
from timemix.errors import FileError
from timemix.server import security
from timemix.server.app import Settings
from timemix.server.security import read_keys

KEYS = ["first-key", "zweiter schlüssel", "密钥", "voilà"]
ORIGIN = "http://localhost:3000"


@pytest.fixture(scope="module")
def locked():
    with served([tiny()], Settings(keys=KEYS)) as running:
        yield running


@pytest.fixture(scope="module")
def server():
    with served([tiny()], Settings(origins=[ORIGIN])) as running:
        yield running


def asked(server, *headers, path="/v1/models", method="GET"):
    """Return the answer to a request with headers as bytes, as text."""
    with connect(server) as connection:
        lines = [f"{method} {path} HTTP/1.1".encode(), *headers, b"Connection: close"]
        if not any(header.lower().startswith(b"host") for header in headers):
            lines.insert(1, b"Host: localhost")
        connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
        return read_to_end(connection).decode()


def status_of(answer):
    return int(answer.split(" ")[1])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER   "])
def test_each_key_opens(locked, key, scheme):
    assert status_of(asked(locked, f"Authorization: {scheme}{key}  ".encode())) == 200


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Authorization:",
        "Authorization: Bearer",
        "Authorization: Bearer first-ke",
        "Authorization: Bearer first-keys",
        "Authorization: Bearer FIRST-KEY",
        "Authorization: Bearer first-key second",
        "Authorization: Basic first-key",
        "Authorization: first-key",
        "Authorization: Bearer\tfirst-key",
        "Authorization: Bearer first-key,Bearer first-key",
        "X-Api-Key: first-key",
        "Cookie: Authorization=Bearer first-key",
    ],
)
def test_anything_else_does_not(locked, header):
    answer = asked(locked, *([header.encode()] if header else []))
    assert status_of(answer) == 401
    assert "www-authenticate: Bearer" in answer
    assert '"code":"invalid_api_key"' in answer
    assert "first" not in answer


def test_public_paths_need_no_key(locked):
    assert status_of(asked(locked, path="/health")) == 200
    for path in ("/v1/models", "/metrics", "/health/", "//health", "/health/../v1/models", "/nothing"):
        assert status_of(asked(locked, path=path)) == 401
    for method in ("POST", "PUT", "DELETE", "HEAD"):
        assert status_of(asked(locked, path="/v1/models", method=method)) == 401


def test_a_key_is_compared_in_constant_time(locked, monkeypatch):
    compared, compare_digest = [], secrets.compare_digest

    def compare(a, b):
        compared.append((a, b))
        return compare_digest(a, b)

    monkeypatch.setattr(security.secrets, "compare_digest", compare)
    assert locked.call("/v1/models", Authorization="Bearer first-key").status == 200
    expected = [hashlib.sha256(key.encode()).digest() for key in KEYS]
    assert compared == [(expected[0], digest) for digest in expected]


def test_the_file_of_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes("# ours\n  first-key  \n\n#second\n密钥\r\n".encode())
    assert read_keys(file) == ["first-key", "密钥"]
    file.write_bytes("\ufefffirst-key\r\n".encode())
    assert read_keys(file) == ["first-key"]
    for content in (b"", b"\n# none\n", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(FileError, match="one API key a line|holds no API key"):
            read_keys(file)
    with pytest.raises(FileError, match="cannot read .*: Is a directory; check its path"):
        read_keys(tmp_path)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "[::1]"])
def test_own_hosts(server, host):
    assert status_of(asked(server, f"Host: {host}".encode())) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "localhost:80:80",
        "192.168.1.2",
        "0.0.0.0",
        "",
        "é",
    ],
)
def test_a_foreign_host_is_refused(server, host):
    assert status_of(asked(server, f"Host: {host}".encode())) == 403


def test_a_server_for_other_machines_has_any_host():
    with served([tiny()], Settings(host="0.0.0.0", keys=KEYS[:1])) as server:
        assert status_of(asked(server, b"Host: models.example", b"Authorization: Bearer first-key")) == 200


@pytest.mark.parametrize("host", ["127.0.0.2", "0:0:0:0:0:0:0:1"])
def test_any_address_of_this_machine_refuses_foreign_hosts(host):
    settings = Settings(host=host)
    with served([tiny()], settings) as server:
        own = f"[{host}]" if ":" in host else host
        for name, status in ((own, 200), ("localhost", 200), ("evil.example", 403)):
            assert status_of(asked(server, f"Host: {name}:8000".encode())) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 200),
        (ORIGIN, 200),
        ("http://localhost:3001", 403),
        ("https://localhost:3000", 403),
        ("http://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("http://localhost@evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[", 403),
        ("http://[::1", 403),
        ("//localhost", 403),
        ("localhost", 403),
    ],
)
def test_origins(server, origin, status):
    answer = asked(server, f"Origin: {origin}".encode())
    assert status_of(answer) == status
    assert ("access-control-allow-origin" in answer) == (origin == ORIGIN)


def test_a_preflight_request(locked, server):
    wanted = [b"Access-Control-Request-Method: POST", b"Access-Control-Request-Headers: authorization,content-type"]
    answer = asked(server, f"Origin: {ORIGIN}".encode(), *wanted, path="/v1/completions", method="OPTIONS")
    assert status_of(answer) == 200
    assert f"access-control-allow-origin: {ORIGIN}" in answer
    assert "authorization" in answer
    assert "access-control-allow-credentials" not in answer
    foreign = asked(server, b"Origin: http://evil.example", *wanted, path="/v1/completions", method="OPTIONS")
    assert "access-control-allow-origin" not in foreign
    without = asked(locked, f"Origin: {ORIGIN}".encode(), *wanted, path="/v1/completions", method="OPTIONS")
    assert status_of(without) == 403


def test_an_allowed_page_reads_refusals_too():
    """Without the header, a browser hides the reason of a refusal from the page."""
    with served([tiny()], Settings(origins=[ORIGIN], keys=KEYS)) as server:
        answer = asked(server, f"Origin: {ORIGIN}".encode())
    assert status_of(answer) == 401
    assert f"access-control-allow-origin: {ORIGIN}" in answer


def test_pipelined_requests_are_answered_in_order(server):
    bodies = [{"prompt": "abc"[:n], "max_tokens": n, "seed": n} for n in (1, 2, 3)]
    with connect(server) as connection:
        connection.sendall(b"".join(posted("/v1/completions", body) for body in bodies))
        text = b""
        while text.count(b"}}}") < 3:
            text += connection.recv(65536)
    found = [int(part.split(b",")[0]) for part in text.split(b'"completion_tokens":')[1:]]
    assert found == [1, 2, 3]


@pytest.mark.parametrize(
    "data",
    [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX\x00Y: 1\r\n\r\n",
    ],
)
def test_broken_http(server, data):
    with connect(server) as connection:
        connection.sendall(data)
        assert read_until(connection, b"\r\n").startswith(b"HTTP/1.1 400")
    assert server.call("/health").status == 200


@pytest.mark.parametrize("begin", [b"GET /", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_header_without_an_end(server, begin):
    with connect(server) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(begin)
        for _ in range(100):
            connection.sendall(b"a" * 100_000)
        pytest.fail("the server reads a header of 10 MB")
    assert server.call("/health").status == 200


def test_a_body_that_ends_early(server):
    whole = posted("/v1/completions", {"prompt": "a"})
    for size in (len(whole) - 1, len(whole) - 9, 40):
        with connect(server) as connection:
            connection.sendall(whole[:size])
    assert server.complete(prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1
    assert not server.models[0].engine.busy


HEADERS = st.binary(max_size=40).filter(lambda data: b"\r" not in data and b"\n" not in data)


@given(name=st.sampled_from([b"Host", b"Origin", b"Authorization", b"Content-Type", b"Accept", b"X"]), value=HEADERS)
@examples(500)
def test_odd_headers_never_break_the_server(locked, name, value):
    answer = asked(locked, name + b": " + value)
    assert status_of(answer) in (400, 401, 403)


@given(data=st.binary(max_size=200))
@examples(300)
def test_any_bytes(server, data):
    with connect(server) as connection:
        connection.sendall(data + b"\r\n\r\n")
        connection.settimeout(0.05)
        try:
            answer = connection.recv(1000)
        except (TimeoutError, ConnectionError):
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 5")
