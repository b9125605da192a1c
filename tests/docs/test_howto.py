"""The howto pages: their Python runs, and timemix accepts the options of their commands."""

import pytest

from tests.helpers.pages import (
    ROOT,
    check_command,
    commands,
    run_python,
    timemix_arguments,
)

PAGES = sorted((ROOT / "docs/howto").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_a_page_runs(page, trained, monkeypatch):
    monkeypatch.chdir(trained)
    run_python(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_accepted(page, trained, monkeypatch):
    monkeypatch.chdir(trained)
    for line in commands(page):
        check_command(line)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("timemix runs --json | jq .", [["runs", "--json"]]),
        ("cat a.txt | timemix data - > report.txt", [["data", "-"]]),
        ("torchrun --nproc-per-node 2 -m timemix train --data a", [["train", "--data", "a"]]),
        ("NO_COLOR=1 .venv/bin/timemix info && timemix runs", [["info"], ["runs"]]),
        ("nohup timemix train --data 'a b' 2> log &", [["train", "--data", "a b"]]),
        ("timemix sample runs/mine > a 2>&1 | less", [["sample", "runs/mine"]]),
        ("python my.py timemix", []),
    ],
)
def test_calls_of_timemix_in_a_line_of_shell(line, found):
    assert timemix_arguments(line) == found


@pytest.mark.parametrize(
    "line",
    [
        "timemix tarin",
        "timemix train --data a --out b --no-such-option",
        "timemix sample",
        "torchrun --nproc-per-nod 2 --no-such-option -m timemix train --data a --out b",
    ],
)
def test_a_wrong_command_fails(line, trained, monkeypatch):
    monkeypatch.chdir(trained)
    with pytest.raises(pytest.fail.Exception, match="refuses"):
        check_command(line)
