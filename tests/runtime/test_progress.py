"""Progress of reading: shown where a user sees it; an error in showing it never stops the work."""

import io
import sys

import pytest

from timemix.runtime.progress import meter, show


def test_lines_are_sent_to_the_progress_function(capsys):
    lines = []
    for progress in (True, False, lines.append):
        show(progress, "half")
    assert capsys.readouterr().err == "half\n"
    assert lines == ["half"]


def full_disk():
    return open("/dev/full", "wb", buffering=0)


@pytest.mark.parametrize("stream", [lambda: None, lambda: io.TextIOWrapper(full_disk(), write_through=True)])
def test_a_stderr_that_takes_nothing_stops_no_reading(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    with meter(True, "reading", 0, 100) as advance:
        for done in range(0, 101, 10):
            advance(done)
