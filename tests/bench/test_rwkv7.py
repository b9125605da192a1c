"""benchmarks/rwkv7.py with tiny models, without other programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from timemix.models.quantize import WEIGHTS

ROOT = Path(__file__).parents[2]


def run(out, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "rwkv7.py"), *arguments, "--toy", "--json", str(out)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(out.read_text())


def rows(report):
    return {path["name"]: path for path in report["results"][0]["paths"]}


@pytest.mark.slow
def test_every_part_of_training_runs_once(tmp_path):
    out = tmp_path / "training.json"
    found = run(out, "training")
    peak = rows(found["share of the peak"])
    assert all(peak[f"rwkv7 {precision}"]["share_of_peak"] > 0 for precision in ("float32", "bfloat16"))
    assert rows(found["long context"])["1 x 128 float32"]["call_memory"] > 0
    assert rows(found["beside Llama at ctx_len 64"]).keys() == {"llama float32", "rwkv7 float32"}
    # A finished part does not run again.
    found["small model"]["work"] = "changed"
    out.write_text(json.dumps(found))
    assert run(out, "training")["small model"]["work"] == "changed"


@pytest.mark.slow
def test_training_steps_of_earlier_versions(tmp_path):
    found = run(tmp_path / "earlier.json", "training-of-earlier")
    for arch in ("rwkv4", "rwkv5", "rwkv6"):
        share = rows(found[f"share of the peak: {arch}"])
        assert all(share[f"{arch} {precision}"]["share_of_peak"] > 0 for precision in ("float32", "bfloat16"))
    assert rows(found["rwkv4 beside RwkvForCausalLM, 4 layers, 64 channels"])["rwkv4 float32"]["seconds"] > 0


@pytest.mark.slow
def test_every_part_of_generation_runs(tmp_path):
    found = run(tmp_path / "generation.json", "generation")
    for weights in WEIGHTS:
        for name in ("1 threads", "8 rows", "32 rows"):
            path = rows(found[f"0.19 B: decode in {weights}, {name}"])[f"timemix {weights}"]
            assert path["tokens_per_second"] > 0, path
            assert path["share_of_floor"] > 0
    assert rows(found["0.19 B: prefill of 24 tokens in float32"])["timemix float32"]["tokens_per_second"] > 0
    assert rows(found["far position"]).keys() == {"position 100", "position 1,000"}
