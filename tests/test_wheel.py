"""The distributions: the wheel trains and generates outside the checkout, and the sdist has all files."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import timemix
from tests.helpers.runs import TEXT

ROOT = Path(__file__).parents[1]

USE = """
import sys
from pathlib import Path
import timemix
from timemix.cli.main import main
from timemix.experiments.spec import shipped
from timemix.experiments.report import __file__ as report
from timemix.generation.decode import build_step
from timemix.ops.common import fused

package = Path(timemix.__file__).parent
assert package.parent == Path(sys.argv[1]), package
small = "--model.layers 1 --model.heads 2 --model.channels 8 --model.ctx-len 8 --train.steps 2 --train.batch-size 2"
try:
    main(["train", "cpu-small", "--data", "text.txt", "--out", "run", *small.split()])
except SystemExit as end:
    assert not end.code, end.code
run = timemix.load("run")
print(timemix.generate(run, "the", tokens=5))
assert len(shipped()) >= 10
assert (package / "py.typed").exists() and (package / "server/openapi.json").exists()
assert (Path(report).parent / "report.html").exists()
assert list(package.rglob("*.h")) and list(package.rglob("*.c"))
step = build_step(run.model)
print("step:", step.reason, "fused:", fused.available())
"""


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == timemix.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] in ("Unreleased", timemix.__version__)


@pytest.mark.slow
def test_the_sdist_has_all_that_is_committed(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name for name in listed.splitlines() if not name.startswith(".ci/")} - names == set()


@pytest.mark.slow
def test_installed_from_a_wheel_it_trains_and_generates(tmp_path):
    def run(*command: str, **options: object) -> str:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel))
    (tmp_path / "text.txt").write_text(TEXT)
    # Before the checkout, which is on the path of an editable installation.
    environment = os.environ | {"PYTHONPATH": str(installed)}
    told = run("-c", USE, str(installed), cwd=tmp_path, env=environment)
    assert ("compiled by" in told) == ("fused: True" in told), told
