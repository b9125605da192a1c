"""What the parts of benchmarks/rwkv7.py share: the file of results, and random models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from timemix.bench.race import Contender, Heat, Report, machine_now, to_markdown
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.storage.json_files import to_json

CPU = torch.device("cpu")


def say(line: str) -> None:
    print(f"  {line}", flush=True)


class Record:
    """The JSON file of the results. A part whose result is in the file does not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def part(self, name: str, heat: Callable[[], Heat]) -> None:
        """Run a part, print its table and store its result."""
        if name in self.parts:
            return
        print(f"{name} ...", flush=True)
        found = heat()
        report = Report(name, machine_now(CPU), [found])
        print(to_markdown(report), flush=True)
        self.parts[name] = to_json(report)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.parts, indent=1) + "\n")


def rwkv7(layers: int, channels: int, vocab_size: int, ctx_len: int = 512, **fields: Any) -> ModelConfig:
    """Return the settings of an RWKV-7 with heads of 64 channels, as in all published models."""
    return model_config(
        "rwkv7",
        layers=layers,
        channels=channels,
        heads=max(1, channels // 64),
        vocab_size=vocab_size,
        ctx_len=ctx_len,
        **fields,
    )


def random_model(config: ModelConfig) -> LanguageModel:
    """Create a model in which no weight is zero."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def square_product(size: int, precision: str) -> Contender:
    """Return one product of square matrices, whose speed is the peak speed of matrix products."""
    a, b = torch.rand(2, size, size).to(getattr(torch, precision)).unbind()
    return Contender(f"one product of {size} x {size} matrices {precision}", lambda: a @ b, size)
