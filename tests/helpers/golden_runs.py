"""Short loss curves of the architectures of 2021 in their presets, and of rwkv7, to detect changes of behaviour.

python -m tests.helpers.golden_runs rewrites tests/golden/runs.json, after a change that is meant to change it.
"""

import json
import platform
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from timemix.config.presets import PRESETS, preset
from timemix.config.run import RunConfig
from timemix.data.config import DataConfig
from timemix.data.corpus import is_corpus
from timemix.data.prepare import prepare
from timemix.runtime import native
from timemix.training.start import new_run
from timemix.training.trainer import Trainer

PATH = Path(__file__).parent.parent / "golden" / "runs.json"
STEPS = 5
ARCHITECTURES = ("rwkv1", "rwkv1_exp", "mha_rotary", "mha_shift", "mha_pro")
NAMES = [
    *(f"{name} {arch}" for name in PRESETS if preset(name).model.arch in ARCHITECTURES for arch in ARCHITECTURES),
    "cpu-small rwkv1 muon",
    "cpu-small rwkv7",
]


def corpus(folder: Path) -> Path:
    """Write a prepared folder of invented words, the same on every machine."""
    if not is_corpus(folder / "tokens"):
        letters = np.random.Generator(np.random.Philox(key=7)).integers(0, 2**32, 60_000) % 30
        alphabet = "etaoinshrdlcumwfgypbvk     \n.,"
        (folder / "text.txt").write_text("".join(alphabet[i] for i in letters))
        prepare(folder / "tokens", DataConfig(source=str(folder / "text.txt")))
    return folder / "tokens"


def config(name: str, tokens: Path, precision: str) -> RunConfig:
    """Return a preset with two layers and a few steps of one window, to save time.

    Dropout is off, since its random numbers differ between processors.
    """
    size, arch, *optimizer = name.split()
    full = preset(size, arch)
    train = replace(full.train, steps=STEPS, batch_size=1, precision=precision, seed=1, device="cpu")
    if optimizer:
        train = replace(train, optimizer=optimizer[0])
    data = DataConfig(source=str(tokens), order=full.data.order)
    return RunConfig(replace(full.model, dropout=0.0, layers=2), data, train)


@torch.no_grad()
def set_portable_values(trainer: Trainer) -> None:
    """Set weights that do not depend on the processor, unlike normal numbers and orthogonal matrices."""
    for i, (_, p) in enumerate(sorted(trainer.model.named_parameters())):
        uniform = np.random.Generator(np.random.Philox(key=i)).random(p.shape) - 0.5
        value = torch.from_numpy(uniform)
        p.copy_(value * p.shape[-1] ** -0.5 if p.ndim == 2 and p.shape[0] > 8 else 1 + 0.2 * value)


def losses(name: str, folder: Path, precision: str) -> list[list[float]]:
    """Return loss and gradient norm of each step: in float64 from portable weights, in float32 from initial weights."""
    trainer = new_run(config(name, corpus(folder), precision), folder / f"{name} {precision}")
    if precision == "float64":
        set_portable_values(trainer)
    return [list(trainer.train_step()) for _ in range(STEPS)]


def _c_compiler() -> str:
    command = native.c_compiler()
    if command is None:
        return "none"
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0]


def processor() -> dict[str, str | int]:
    """Return the properties of the machine that float32 results depend on, bit for bit."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return {
        "torch": torch.__version__,
        "processor": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "C": _c_compiler(),
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: {p: losses(name, Path(folder), p) for p in ("float64", "float32")} for name in NAMES}
    PATH.write_text(json.dumps({"float32": processor(), "curves": curves}, indent=1) + "\n")


if __name__ == "__main__":
    main()
