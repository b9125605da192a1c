"""Imports of a short command: not the compiler of PyTorch, which takes longer than the command itself."""

import subprocess
import sys

from tests.helpers.runs import write_text_file

# A run of one step for each architecture, with both optimizers.
TRAIN = """
import itertools, sys
from pathlib import Path
from tests.helpers.runs import small_config
from timemix.models.registry import ARCHITECTURES
from timemix.training.start import new_run
source, out = sys.argv[1], Path(sys.argv[2])
for arch, optimizer in itertools.product(ARCHITECTURES, ("adamw", "muon")):
    new_run(small_config(source, arch, steps=1, optimizer=optimizer), out / arch / optimizer).run()
    print(arch, optimizer, sorted(sys.modules.keys() & {"torch._dynamo", "torch.distributed.fsdp", "sympy"}))
"""


def test_training_imports_no_compiler(tmp_path):
    command = [sys.executable, "-c", TRAIN, str(write_text_file(tmp_path)), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    assert all(line.endswith(" []") for line in lines), lines
