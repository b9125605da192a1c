"""Stop a run at a step, and compare the final states of two runs."""

import json
import os
import signal
from pathlib import Path

from timemix.runs import folder as run_folder

TIMED = ("seconds", "tokens_per_second", "peak_share", "memory")


def metrics(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without fields that depend on the clock or the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def same_end(a: Path, b: Path) -> None:
    """Assert that weights, optimizer state, losses and checkpoints of two runs are bit-identical."""
    assert [c.name for c in run_folder.checkpoints(a)] == [c.name for c in run_folder.checkpoints(b)]
    for x, y in zip(run_folder.checkpoints(a), run_folder.checkpoints(b), strict=True):
        for name in ("model.safetensors", "training.safetensors"):
            assert (x / name).read_bytes() == (y / name).read_bytes(), f"{name} of {x.name}"
        progress = [json.loads((folder / "training.json").read_text()) | {"seconds": 0} for folder in (x, y)]
        assert progress[0] == progress[1]
    assert metrics(a) == metrics(b)
    assert sorted(p.name for p in (b / "checkpoints").iterdir()) == [c.name for c in run_folder.checkpoints(b)]


def stop_at(step: int):
    def watch(progress):
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch
