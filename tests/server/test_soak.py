"""The server over a long time: its memory, its slots, and the steadiness of its streams."""

import itertools
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.helpers.raw_http import connect, post, posted, read_until, within
from tests.helpers.runs import small_trainer
from tests.helpers.served_run import served_run

pytestmark = pytest.mark.slow

ENDLESS = {"prompt": "the", "max_tokens": 1_000_000, "stream": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    small_trainer(folder, "rwkv7", steps=2).run()
    return folder / "run"


@pytest.fixture
def running(run, tmp_path):
    with served_run(run, tmp_path / "log", "--queue", "1000") as running:
        yield running


def memory(running):
    return psutil.Process(running.process.pid).memory_info().rss


def busy(running):
    """Return the number of samples that have a slot or wait for a slot."""
    text = running.http.call("/metrics").body.decode()
    return sum(int(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("timemix_requests_"))


def send_many(running, count, clients=8):
    """Send short requests of all kinds from several clients, each over one connection."""

    def send(client):
        with connect(running.http) as connection:
            for number in range(client, count, clients):
                is_stream = number % 2 == 0
                body = {"prompt": "the cat", "max_tokens": 3, "seed": number, "n": 1 + number % 3, "stream": is_stream}
                connection.sendall(posted("/v1/completions", body))
                read_until(connection, b"[DONE]\n\n\r\n0\r\n\r\n" if is_stream else b"}}}")

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(send, range(clients)))


def test_ten_thousand_requests_leave_the_memory_as_it_was(running):
    send_many(running, 1000)
    before = memory(running)
    send_many(running, 9000)
    print(f"memory after 10,000 requests: {memory(running) / before:.3f} of that after 1,000")
    assert memory(running) < 1.05 * before
    assert busy(running) == 0


def test_two_hundred_clients_that_leave(running):
    begun = [post(running.http, "/v1/completions", ENDLESS) for _ in range(200)]
    for connection in begun[:20]:
        read_until(connection, b"data: ")
    before = memory(running)
    for connection in begun:
        connection.close()
    assert within(10, lambda: busy(running) == 0)
    assert memory(running) < 1.05 * before
    assert running.http.complete(prompt="the", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_two_hundred_clients_that_never_read(running):
    send_many(running, 1000)
    before = memory(running)
    # Each of these texts is longer than what the server stores for a client.
    silent = [post(running.http, "/v1/completions", ENDLESS, 4096) for _ in range(200)]
    assert within(600, lambda: busy(running) == 0)
    print(f"{(memory(running) - before) / 2**20:.0f} MB for 200 clients that never read")
    assert memory(running) - before < 200 * 2**20
    for connection in silent:
        connection.close()
    assert running.http.complete(prompt="the", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_long_prompt_does_not_stop_other_streams(running):
    times = [[] for _ in range(8)]
    is_over = threading.Event()

    def read(own):
        with post(running.http, "/v1/completions", ENDLESS) as connection:
            while not is_over.is_set():
                part = connection.recv(65536)
                own.extend([time.perf_counter()] * (b"data: " in part))

    with ThreadPoolExecutor(8) as pool:
        reading = [pool.submit(read, own) for own in times]
        time.sleep(2)
        begin = time.perf_counter()
        body = {"prompt": "the cat sat " * 8334, "max_tokens": 1}
        assert running.http.complete(**body)["usage"]["prompt_tokens"] > 100_000
        end = time.perf_counter()
        is_over.set()
        for each in reading:
            each.result()
    before, during = [], []
    for own in times:
        for a, b in itertools.pairwise(own):
            (before if b < begin else during).append(b - a)
    usual, longest = statistics.median(before), max(x for x in during)
    print(f"median before {usual * 1e3:.2f} ms, longest during {longest * 1e3:.1f} ms, prompt {end - begin:.1f} s")
    # Times depend on the machine, so the printed gap is no test.
    for own in times:
        assert sum(begin < t < end for t in own) > 100
