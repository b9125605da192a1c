"""The examples run as they stand, with fewer steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Arguments of each example, and a pattern of its output.
CALLS = {
    "train_and_sample.py": (["--steps", "4"], r"held-out loss: \d\.\d{3} nats per character\n\n(.|\n){400}"),
    "own_architecture.py": (
        ["--steps", "4", "--seeds", "1"],
        r"decay minus rwkv1: [+-]\d\.\d{3} (.|\n)*decay generates:",
    ),
    "many_sessions.py": (["--steps", "4", "--tokens", "24"], r"generated alone: 5 of 5\n$"),
}


def run_example(name, *arguments, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert set(CALLS) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", CALLS)
def test_an_example_runs(name, tmp_path):
    arguments, pattern = CALLS[name]
    assert re.search(pattern, run_example(name, *arguments, folder=tmp_path))
    assert not list(tmp_path.iterdir())
