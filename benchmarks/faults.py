"""Seed faults into copies of the package, one fault at a time, and check that the tests catch each fault.

python benchmarks/faults.py [NAME ...] [--tests-only] [--no-tests-first]

faults.toml lists the faults. A fault replaces the text `old`, which occurs once in `file`, by `new`. With the fault,
the tests of the selection `tests` must fail.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAULTS = Path(__file__).with_suffix(".toml")
LIMIT = 600
"""Time limit for the tests of one fault, in seconds."""

# Exit statuses of pytest.
PASSED, FAILED = 0, 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to seed; default: all")
    parser.add_argument("--tests-only", action="store_true", help="only run the tests without faults, which must pass")
    parser.add_argument("--no-tests-first", action="store_true", help="skip the run of the tests without faults")
    asked = parser.parse_args()
    faults = tomllib.loads(FAULTS.read_text(encoding="utf-8"))["faults"]
    known = {fault["name"]: fault for fault in faults}
    if len(known) < len(faults) or not set(asked.names) <= known.keys():
        parser.error(f"unknown or repeated name; known: {', '.join(known)}")
    chosen = [known[name] for name in asked.names] or faults

    wrong = sum(not _applies(fault) for fault in chosen)
    if not asked.no_tests_first:
        wrong += sum(not _passes(tests) for tests in _by_file(fault["tests"] for fault in chosen))
    if asked.tests_only:
        return int(wrong > 0)
    caught = sum(_is_caught(fault) for fault in chosen)
    print(f"{caught} of {len(chosen)} faults caught", flush=True)
    return int(wrong > 0 or caught < len(chosen))


def _applies(fault: dict[str, str]) -> bool:
    """Return whether the text `old` of a fault occurs exactly once in its file; print the fault otherwise."""
    path = ROOT / fault["file"]
    found = path.read_text(encoding="utf-8").count(fault["old"]) if path.is_file() else 0
    if found != 1:
        print(f"NOT APPLIED  {fault['name']}: `old` occurs {found} times in {fault['file']}", flush=True)
    return found == 1


def _by_file(selections: Iterable[str]) -> list[str]:
    """Join test selections of one file: `FILE -k A` and `FILE -k B` become `FILE -k "(A) or (B)"`."""
    expressions: dict[str, set[str]] = {}
    for selection in selections:
        target, *options = shlex.split(selection)
        expressions.setdefault(target, set()).add(options[1] if options[:1] == ["-k"] else "")
    # A selection without a `-k` expression selects all tests of the file.
    return [
        target if "" in each else shlex.join([target, "-k", " or ".join(f"({e})" for e in sorted(each))])
        for target, each in expressions.items()
    ]


def _passes(tests: str) -> bool:
    """Return whether a selection of tests passes in a copy without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        status, seconds, last = _run(_copied(Path(folder)), tests)
    word = "passes" if status == PASSED else "FAILS WITHOUT A FAULT"
    print(f"{word}  {tests}  ({seconds:.0f} s, {last})", flush=True)
    return status == PASSED


def _is_caught(fault: dict[str, str]) -> bool:
    """Return whether the tests of a fault fail in a copy with this fault."""
    if not _applies(fault):
        return False
    with tempfile.TemporaryDirectory() as folder:
        copy = _copied(Path(folder))
        path = copy / fault["file"]
        path.write_text(path.read_text(encoding="utf-8").replace(fault["old"], fault["new"]), encoding="utf-8")
        status, seconds, last = _run(copy, fault["tests"])
    # A crash of the process (a negative status) counts as caught. A failed import of a test module does not count.
    caught = status == FAILED or status < 0
    word = "caught" if caught else "NOT CAUGHT"
    print(f"{word}  {fault['name']} ({fault['module']}, {seconds:.0f} s, {last})", flush=True)
    return caught


def _copied(folder: Path) -> Path:
    """Copy all files that git tracks, with uncommitted changes, into a folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def _run(copy: Path, tests: str) -> tuple[int, float, str]:
    """Run pytest. Return the exit status, the time in seconds, and the failed test or the last line of the output."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-m",
        "slow or not slow",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "--hypothesis-seed=0",
    ]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "TIMEMIX_TESTS": "all"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *shlex.split(tests)],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        # A test that exceeds the time limit counts as failed.
        return FAILED, time.monotonic() - start, "exceeded the time limit"
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, time.monotonic() - start, (failed or lines)[-1][:100]


if __name__ == "__main__":
    sys.exit(main())
