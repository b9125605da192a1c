"""benchmarks/gpu.py at a tiny size on the CPU, so that its code works when a GPU is available."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import write_text_file

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--toy", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_every_stage_runs_and_continues_where_it_was(tmp_path):
    write_text_file(tmp_path).rename(tmp_path / "train.txt")
    (tmp_path / "valid.txt").write_text("the cat sat on mat 1. the dog ran to hut 2!\n")
    out = tmp_path / "out"
    stages = ["--stage", "c", "--stage", "b", "--stage", "d"]
    run(*stages, "--out", out, "--data", tmp_path, "--draw", tmp_path / "curves.png")
    found = {stage: json.loads((out / f"{stage}.json").read_text()) for stage in "bcd"}
    assert {"rwkv1 seed 1", "mha_rotary seed 1", "mha_shift seed 1", "mha_pro seed 1"} < found["c"].keys()
    assert found["c"]["rwkv1 seed 1"]["losses"]
    assert found["c"]["rwkv1 seed 1"]["valid"][-1][0] == 4
    paths = {path["name"] for heat in found["b"]["train 16"]["results"] for path in heat["paths"]}
    assert {"plain float32", "mha_rotary bfloat16"} <= paths or {"plain float32", "mha_rotary float32"} <= paths
    assert found["d"]["rwkv1 2"]["tokens_per_second"] > 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    # A finished part does not run again.
    changed = found["d"] | {"rwkv1 1": {"tokens_per_second": 1.0, "step_seconds": 1.0}}
    del changed["rwkv1 2"]
    (out / "d.json").write_text(json.dumps(changed))
    run("--stage", "d", "--out", out)
    again = json.loads((out / "d.json").read_text())
    assert again["rwkv1 1"]["tokens_per_second"] == 1.0
    assert again["rwkv1 2"]["tokens_per_second"] > 0
