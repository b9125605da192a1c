"""benchmarks/serve.py with tiny models, without another program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(out):
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--toy", "--json", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_every_part_runs_once(tmp_path):
    out = tmp_path / "serve.json"
    table = run(out)
    found = json.loads(out.read_text())
    for name in ("17 M", "0.19 B"):
        assert found[f"first token, {name}"]["median_ms"] > 0
        streams = found[f"32 streams, {name}"]
        assert 0 < streams["lowest_share"] <= streams["share_over_http"] <= streams["highest_share"]
    for clients in (1, 8, 32):
        load = found[f"{clients} clients, 0.19 B"]
        assert load["tokens_per_second"] > 0
        assert 0 <= load["between_tokens_p50_ms"] <= load["between_tokens_p95_ms"]
        assert f"| {clients} clients, 0.19 B" in table
    # A finished part does not run again.
    found["first token, 17 M"]["median_ms"] = 123.0
    out.write_text(json.dumps(found))
    run(out)
    assert json.loads(out.read_text()) == found
