"""The howto pages: their Python runs, and timemix accepts the options of their commands."""

import ast
import re
import shutil
import subprocess
from collections import Counter
from itertools import pairwise

import pytest

import timemix
from tests.helpers.pages import (
    ROOT,
    RUN,
    SERVER,
    blocks,
    check_command,
    commands,
    numbered_blocks,
    run_python,
    timemix_arguments,
)
from tests.helpers.serving import served
from timemix.server.engine_thread import Served

PAGES = sorted((ROOT / "docs/howto").glob("*.md"))
OF_SERVER = [page for page in PAGES if SERVER in page.read_text(encoding="utf-8")]
CREATING = ("train", "data", "convert", "import", "export")
"""Verbs that refuse an existing --out."""
CREATED = {"train": 1, "prepare": 0, "export_run": 2, "export_gguf": 1, "export_onnx": 1}
"""Functions that refuse an existing output, and the place of the output among their arguments."""


@pytest.fixture(scope="module")
def server(trained):
    """A server of the run of the pages."""
    run = timemix.load(trained / RUN)
    with served([Served("mine", timemix.Engine(run.model, run.tokenizer), "float32", 1)]) as running:
        yield running


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_a_page_runs(page, trained, monkeypatch, request):
    monkeypatch.chdir(trained)
    run_python(page, request.getfixturevalue("server").url if page in OF_SERVER else SERVER)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("page", OF_SERVER, ids=lambda page: page.stem)
def test_curl_of_a_page_succeeds(page, server, trained):
    own = server.call("/v1/states", {"prompt": "The "}).json["id"]
    content = server.call(f"/v1/states/{own}").body
    for text in blocks(page, "sh"):
        for id in re.findall(r"state-[0-9a-f]{32}", text):
            server.call(f"/v1/states/{id}", content, "PUT")
        command = re.sub(r"^curl ", "curl --silent --show-error --fail ", text, flags=re.MULTILINE)
        subprocess.run(command.replace(SERVER, server.url), shell=True, check=True, cwd=trained)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_accepted(page, trained, monkeypatch):
    monkeypatch.chdir(trained)
    for line in commands(page):
        check_command(line)


def created(page):
    """Yield the outputs that a page creates. A command that the page shows twice counts once."""
    for line in commands(page):
        for arguments in timemix_arguments(line):
            if set(arguments[:1]) & set(CREATING):
                yield from (out for flag, out in pairwise(arguments) if flag == "--out")
    for _, language, text in numbered_blocks(page):
        calls = ast.walk(ast.parse(text)) if language in ("python", "py") else ()
        for call in (each for each in calls if isinstance(each, ast.Call)):
            place = CREATED.get(ast.unparse(call.func).rpartition(".")[2], len(call.args))
            if place < len(call.args) and not any(each.arg == "resume" for each in call.keywords):
                yield from re.findall(r"^(?:Path\()?'([^']+)'", ast.unparse(call.args[place]))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/tutorial.md"], ids=lambda page: page.stem)
def test_a_page_creates_each_output_once(page):
    assert [out for out, count in Counter(created(page)).items() if count > 1] == []


def test_outputs_are_found_in_commands_and_python():
    assert {"runs/next", "runs/longer", "runs/next-python"} == set(created(ROOT / "docs/howto/fine-tune.md"))
    assert {"mine.gguf", "mine-python.gguf"} < set(created(ROOT / "docs/howto/llama-cpp.md"))


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
