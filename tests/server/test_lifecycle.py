"""The server from its start to its end: bad options, clients that leave, signals, and an engine that fails."""

import os
import signal
import socket
import time

import psutil
import pytest

from tests.helpers.commands import run_command
from tests.helpers.raw_http import connect, post, read_to_end, read_until, within
from tests.helpers.runs import small_trainer
from tests.helpers.served_run import served_run
from tests.helpers.serving import served, tiny
from tests.helpers.states import OWN
from timemix.cli import serve

ENDLESS = {"prompt": "a", "max_tokens": 1_000_000, "seed": 1}
LONG_PROMPT = {"prompt": "ab" * 400_000, "max_tokens": 2}


@pytest.fixture
def server():
    with served([tiny(slots=2, max_pending=4)]) as running:
        yield running


def engine_of(server):
    return server.models[0].engine


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(server, stream):
    engine = engine_of(server)
    with post(server, "/v1/completions", ENDLESS | {"stream": stream, "n": 2}):
        assert within(10, lambda: engine.active == 2)
    assert within(10, lambda: not engine.busy and engine.active == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue(server, stream):
    engine = engine_of(server)
    with post(server, "/v1/completions", ENDLESS | {"n": 2}):
        assert within(10, lambda: engine.active == 2)
        with post(server, "/v1/completions", ENDLESS | {"stream": stream}):
            assert within(10, lambda: engine.pending == 1)
        assert within(10, lambda: engine.pending == 0)
        assert engine.active == 2


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/completions", {"stream": True}), ("/v1/completions", {}), ("/v1/next_token", {})],
)
def test_a_client_that_leaves_during_its_prompt(server, path, fields):
    engine = engine_of(server)
    with post(server, path, LONG_PROMPT | fields):
        assert within(10, lambda: engine.progress(0)[0] > 0)
    assert within(10, lambda: not engine.busy and engine.active == 0)
    done, total = engine.progress(0)
    assert done == total == 0


def test_a_client_that_leaves_takes_nobody_along(server):
    with post(server, "/v1/completions", {"prompt": "a", "max_tokens": 400, "seed": 2}) as staying:
        for _ in range(5):
            with post(server, "/v1/completions", ENDLESS | {"stream": True}) as leaving:
                read_until(leaving, b"data: ")
        assert b'"completion_tokens":400' in read_until(staying, b"}}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    small_trainer(folder, "rwkv7", steps=2).run()
    return folder / "run"


def stream_of(running, tokens):
    """Return a connection with a stream that has begun, and what it has read."""
    connection = post(running.http, "/v1/completions", {"prompt": "the", "max_tokens": tokens, "stream": True})
    return connection, read_until(connection, b"data: ")


def test_a_signal_drains_then_ends(run, tmp_path):
    with served_run(run, tmp_path / "log") as running:
        connection, begun = stream_of(running, 3000)
        running.process.terminate()
        assert within(5, lambda: running.http.call("/health").status == 503)
        refused = running.http.call("/v1/completions", {"prompt": "the"})
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        text = (begun + read_to_end(connection)).decode()
        assert text.count('"finish_reason": "length"') == 1
        assert "data: [DONE]" in text
        assert running.status() == 0
        assert "Traceback" not in running.output


def test_a_second_signal_ends_the_requests(run, tmp_path):
    with served_run(run, tmp_path / "log") as running:
        connection, _ = stream_of(running, 1_000_000)
        running.process.terminate()
        assert within(5, lambda: running.http.call("/health").status == 503)
        begin = time.monotonic()
        running.process.terminate()
        text = read_to_end(connection).decode()
        assert '"message": "the server has closed; send the request again"' in text
        assert "[DONE]" not in text
        assert running.status() == 0
        assert time.monotonic() - begin < 5


def test_two_signals_at_once_end_the_requests(run, tmp_path):
    with served_run(run, tmp_path / "log") as running:
        connection, _ = stream_of(running, 1_000_000)
        begin = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(running.process.pid, number)
        assert b"the server has closed" in read_to_end(connection)
        assert running.status() == 0
        assert time.monotonic() - begin < 10


def test_a_closing_server_stores_no_states(run, tmp_path):
    with served_run(run, tmp_path / "log") as running:
        state = running.http.call("/v1/states", {"prompt": "the"}).json["id"]
        content = running.http.call(f"/v1/states/{state}").body
        connection, _ = stream_of(running, 1_000_000)
        running.process.terminate()
        assert within(5, lambda: running.http.call("/health").status == 503)
        for answer in (
            running.http.call(f"/v1/states/{state}/fork", {}),
            running.http.call(f"/v1/states/{OWN}", content, "PUT"),
        ):
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        running.process.terminate()
        with connection:
            read_to_end(connection)


@pytest.mark.slow
def test_a_client_that_never_ends_its_request_leaves_no_traceback(run, tmp_path):
    with served_run(run, tmp_path / "log", "--drain-seconds", "0") as running:
        with connect(running.http) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            assert within(5, lambda: running.http.call("/health").status == 200)
            running.process.terminate()
            assert running.status() == 0
        assert "Traceback" not in running.output


def test_a_port_that_another_server_has_taken_since(run, capsys, monkeypatch):
    """Two servers that start at once can both bind a port. Only one of them can listen."""
    bound = serve._listen("127.0.0.1", 0)
    port = bound.getsockname()[1]
    listens = []

    def models(parsed):
        listens.append(serve._listen("127.0.0.1", port))
        listens[0].listen()
        return []

    monkeypatch.setattr(serve, "_models", models)
    status, _, err = run_command(capsys, "serve", run, "--port", port)
    listens[0].close()
    bound.close()
    assert status == 2
    reason = "Address already in use; choose another --host or --port"
    assert err == f"timemix: the server cannot listen on 127.0.0.1:{port}: {reason}\n"


def test_requests_past_the_drain_time_get_an_error(run, tmp_path):
    with served_run(run, tmp_path / "log", "--drain-seconds", "0") as running:
        connection, _ = stream_of(running, 1_000_000)
        running.process.terminate()
        assert b"the server has closed" in read_to_end(connection)
        assert running.status() == 0


def test_a_killed_server_leaves_nothing_behind(run, tmp_path):
    before = sorted(run.rglob("*"))
    with served_run(run, tmp_path / "log") as running:
        connection, _ = stream_of(running, 1_000_000)
        children = psutil.Process(running.process.pid).children(recursive=True)
        running.process.kill()
        with connection:
            read_to_end(connection)
        assert running.status() == -signal.SIGKILL
        assert not any(child.is_running() for child in children)
        port = int(running.http.url.rpartition(":")[2])
    assert sorted(run.rglob("*")) == before
    with served_run(run, tmp_path / "again", "--port", str(port)) as running:
        assert running.http.call("/health").json == {"status": "ok"}


def test_a_server_that_is_open_to_the_network_warns(run, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\n")
    warning = "other machines can use the server without an API key"
    cases = {"local": (), "closed": ("--host", "0.0.0.0", "--api-key-file", str(keys)), "open": ("--host", "0.0.0.0")}
    for name, options in cases.items():
        with served_run(run, tmp_path / name, *options) as running:
            assert running.http.call("/health").status == 200
            assert (warning in running.output) == (name == "open")


def test_a_failed_step_ends_the_process(run, tmp_path):
    with served_run(run, tmp_path / "log", fails_after=50) as running:
        stream, begun = stream_of(running, 1_000_000)
        with stream:
            text = (begun + read_to_end(stream)).decode()
        assert '"message": "the engine has failed; the server ends", "type": "server_error"' in text
        assert "[DONE]" not in text
        assert running.status() == 1
        assert "RuntimeError: the memory is broken" in running.output
        assert "timemix: the engine of the model 'run' has failed" in running.output


def test_a_failed_step_without_a_stream(run, tmp_path):
    with served_run(run, tmp_path / "log", fails_after=50) as running:
        answer = running.http.call("/v1/completions", {"prompt": "the", "max_tokens": 1000})
        assert answer.status == 500
        assert answer.json["error"]["message"] == "the engine has failed; the server ends"
        assert running.status() == 1


def test_wrong_options_end_with_one_sentence(run, tmp_path, capsys):
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            (run, "--port", port): "in use; choose another --host or --port",
            (run, "--host", "256.0.0.1", "--port", 0): "cannot listen on 256.0.0.1:0",
            (run, "--host", "192.0.2.1", "--port", 0): "cannot listen on 192.0.2.1:0",
            (tmp_path / "nothing", "--port", 0): "nothing",
            (run, "--port", 0, "--api-key-file", empty): "holds no API key",
            (run, "--port", 0, "--api-key-file", tmp_path / "missing"): "does not exist",
            (run, "--port", 70_000): "it must be from 0 to 65535",
            (run, "--port", 0, "--cors", "*"): "--cors is '*'; it must be an origin",
            (run, "--port", 0, "--cors", "https://example.org/"): "without a path, such as https://example.org",
            (run, "--port", 0, "--checkpoint", "7"): "7",
        }
        for words, message in cases.items():
            status, _, said = run_command(capsys, "serve", *words)
            assert (status, said.count("\n")) == (2, 1), said
            assert message in said
