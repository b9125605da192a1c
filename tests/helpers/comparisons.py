"""Small comparisons of two variants, without progress output."""

import contextlib

from timemix.experiments.spec import Experiment, Verdict
from timemix.experiments.variants import Variant

BASE = {
    "model": {"layers": 1, "heads": 2, "channels": 16, "ctx_len": 16, "ffn_ratio": 2.0},
    "train": {"batch_size": 4, "valid_every": 4, "log_every": 1, "precision": "float32", "warmup": 0.0},
}


def small(source, **fields):
    settings = {
        "title": "small",
        "variants": (
            Variant("rwkv1", color="red"),
            Variant("mha", {"model": {"arch": "mha_rotary"}}, label="attention"),
        ),
        "tokens": 8 * 64,
        "seeds": (1, 2),
        "base": BASE | {"data": {"source": str(source)}},
        "tune": {"train": {"lr": [1e-4, 1e-2]}},
        "prompts": ("the cat",),
        "verdicts": (Verdict("rwkv1 is better", "rwkv1", "mha"),),
    }
    return Experiment(**(settings | fields))


@contextlib.contextmanager
def unwatched(job, config):
    yield lambda progress: None


def finish(comparison):
    lines = []
    comparison.run(unwatched, lines.append)
    return lines
