"""With other processes, waiting threads sleep and decode steps use fewer threads; alone, nothing changes."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timemix.models.language_model import build_model
from timemix.runtime import native, threads
from timemix.runtime.processes import cores

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP library of GNU")


class Teams:
    """Substitute for the idle OpenMP threads; `held` counts the teams that have not ended."""

    def __init__(self):
        self.held = 0

    def __call__(self, threads):
        self.held += 1
        return self

    def end(self):
        self.held -= 1


def shared(monkeypatch, processors, of_torch, free):
    """Return the results of `share` for these numbers of free processors, and the number of teams held after each."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    teams = Teams()
    monkeypatch.setattr(threads, "_IdleTeam", teams)
    clock = itertools.count(-1000.0)
    totals = itertools.accumulate([0.0, *free])
    monkeypatch.setattr(threads, "_counters", lambda: (next(clock), next(totals)))
    load = threads.Load(processors)
    return [(load.share(), teams.held) for _ in free]


def test_threads_sleep_while_another_process_computes(monkeypatch):
    found = shared(monkeypatch, 2, 2, [2.0, 1.95, 1.33, 1.02, 1.0, 1.98, 2.0])
    assert found == [(2, 0), (2, 0), (1, 1), (1, 1), (1, 1), (2, 0), (2, 0)]


def test_threads_spin_while_enough_processors_are_free(monkeypatch):
    assert shared(monkeypatch, 8, 4, [5.0, 3.9, 3.0, 0.2]) == [(4, 0), (4, 0), (3, 1), (1, 1)]


def test_one_thread_waits_for_none(monkeypatch):
    assert shared(monkeypatch, 2, 1, [2.0, 0.1]) == [(1, 0), (1, 0)]


@given(st.integers(1, 64), st.integers(1, 64), st.lists(st.floats(-1, 70), min_size=1, max_size=8))
def test_at_least_one_thread_and_never_more_than_torch_has(processors, of_torch, free):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for count, held in shared(monkeypatch, processors, of_torch, free):
            assert 1 <= count <= of_torch
            assert held in (0, 1)


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "1000")])
def test_the_wait_policy_of_the_user_is_kept(name, value, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv(name, value)
    clock = itertools.count(-1000.0)
    monkeypatch.setattr(threads, "_counters", lambda: (next(clock), 0.0))
    monkeypatch.setattr(threads, "_IdleTeam", lambda threads: pytest.fail("threads should sleep"))
    load = threads.Load(2)
    assert [load.share(), load.share()] == [2, 2]


def test_every_forward_looks_at_the_load(monkeypatch):
    calls = []
    monkeypatch.setattr("timemix.models.language_model.share", lambda: calls.append(None))
    build_model("llama", layers=1, channels=8, heads=2, ctx_len=4, vocab_size=5)(torch.zeros(1, 4, dtype=torch.int64))
    assert calls


@pytest.mark.parametrize("path", sorted(native.PACKAGE.rglob("*.[ch]")), ids=lambda path: path.name)
def test_c_code_takes_the_number_of_threads_from_its_caller(path):
    regions = [line for line in path.read_text(encoding="utf-8").splitlines() if "omp parallel" in line]
    assert all("num_threads(" in line for line in regions)


# Processor seconds of 40 short parallel loops with pauses: spinning threads also use processor time in the pauses.
SPINNING = """
import time, torch
from timemix.runtime import native, threads
torch.set_num_threads(2)
x = torch.ones(2**20)

def used():
    x.add_(1)
    start = time.process_time()
    for _ in range(40):
        x.add_(1)
        time.sleep(0.01)
    return time.process_time() - start

before = used()
team = threads._IdleTeam(threads.cores() + 2)
time.sleep(0.3)
beside = used()
team.end()
time.sleep(0.3)
print(before, beside, used())
"""


@pytest.mark.skipif(cores() < 2, reason="two threads never spin on one processor")
def test_idle_threads_let_the_others_sleep():
    environment = {name: value for name, value in os.environ.items() if "OMP" not in name}
    command = [sys.executable, "-c", SPINNING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    before, beside, after = map(float, done.stdout.split())
    assert beside < before / 2
    assert beside < after / 2
