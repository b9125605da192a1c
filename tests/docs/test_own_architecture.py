"""docs/howto/own-architecture.md: its Python is that of the example, and its commands run."""

import os
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.helpers.pages import ROOT, blocks, write_texts

PAGE = ROOT / "docs/howto/own-architecture.md"
EXAMPLE = ROOT / "examples/own_architecture.py"
SHORTER = {"train": ["--train.steps", "2"], "sample": ["--tokens", "5"], "compare": ["--tokens", "1536", "--no-tune"]}


def test_the_code_of_the_architecture_is_in_the_example():
    registration, check, *_ = blocks(PAGE, "py")
    example = EXAMPLE.read_text(encoding="utf-8")
    assert registration in example
    assert textwrap.indent(check, "    ") in example


@pytest.mark.slow
def test_the_files_and_commands_run(tmp_path):
    write_texts(tmp_path)
    shutil.copy(EXAMPLE, tmp_path / "decay.py")
    *_, program, command_line = blocks(PAGE, "py")
    (tmp_path / "program.py").write_text(program.replace('data="my.txt"', 'data="my.txt", train={"steps": 2}'))
    (tmp_path / "my_timemix.py").write_text(command_line)
    (experiment,) = blocks(PAGE, "toml")
    (tmp_path / "mean.toml").write_text(experiment.replace("1_500_000", "1536").replace("[2e-3, 4e-3, 8e-3]", "[4e-3]"))
    (shell,) = blocks(PAGE, "sh")
    calls = [[*words[1:], *SHORTER[words[2]]] for words in map(shlex.split, shell.splitlines())]
    for call in (["program.py"], *calls, ["my_timemix.py", "compare", "mean.toml", "--data", "my.txt"]):
        done = subprocess.run(
            [sys.executable, *call],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (call, done.stderr)
    assert "| decay | " in done.stdout
