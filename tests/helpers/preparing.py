"""Preparations of a text in another process, which are killed between two token files."""

import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.pages import ROOT

SLOW = """
import sys, time
from pathlib import Path
from timemix.data import prepare as module, shards, pipeline
from timemix.data.config import DataConfig
source, out, shard_bytes, options = sys.argv[1:]
pipeline.PART = module.PART = 50
shards.SHARD_BYTES = int(shard_bytes)
finish = shards.ShardWriter._finish
def slow(self):
    finish(self)
    print("file", flush=True)
    time.sleep(0.02)
shards.ShardWriter._finish = slow
module.prepare(Path(out), DataConfig(source=source, **eval(options)))
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def started(source: Path | str, out: Path, shard_bytes: int, **options: str) -> subprocess.Popen:
    """Begin to prepare a text slowly in small pieces, in a process that prints a line after each token file."""
    command = [sys.executable, "-c", SLOW, source, out, str(shard_bytes), repr(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def kill_after(child: subprocess.Popen, files: int) -> None:
    """Kill a process of `started` after a number of token files."""
    assert child.stdout is not None
    for _ in range(files):
        child.stdout.readline()
    time.sleep(0.01)
    child.kill()
    child.wait()
    child.stdout.close()
