"""The list of seeded faults fits the code: each replaced text occurs once, and each selection of tests selects some."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = tomllib.loads((ROOT / "benchmarks/faults.toml").read_text(encoding="utf-8"))["faults"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["name"])
def test_a_fault_fits_the_code_and_names_tests(fault):
    assert (ROOT / fault["file"]).read_text(encoding="utf-8").count(fault["old"]) == 1
    files, _, chosen = fault["tests"].partition(" -k ")
    tests = "".join((ROOT / name).read_text(encoding="utf-8") for name in files.split())
    # Names of tests; shorter words select parameters.
    for name in re.findall(r"\w+_\w+_\w+", chosen):
        assert name in tests
