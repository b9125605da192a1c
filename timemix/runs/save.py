"""Atomic writes of checkpoints."""

import json
from pathlib import Path

from torch import Tensor

from timemix.config.run import RunConfig, to_toml
from timemix.runs.folder import Progress, checkpoint_name
from timemix.storage.files import atomic_folder
from timemix.storage.json_files import to_json
from timemix.storage.tensors import write_tensors
from timemix.tokenizers.base import Tokenizer


def save_checkpoint(
    run: Path,
    weights: dict[str, Tensor],
    training: dict[str, Tensor],
    config: RunConfig,
    tokenizer: Tokenizer,
    progress: Progress,
) -> Path:
    """Write the checkpoint RUN/checkpoints/step-NNNNNNNN atomically, and return its path.

    Args:
        run: Run folder.
        weights: Weights by name, on the CPU.
        training: Tensors of the optimizer state by name, on the CPU, as `gathered` returns them.
        config: Config of the run.
        tokenizer: Tokenizer of the run.
        progress: State of the run besides its tensors.

    Raises:
        CannotWrite: The disk is full or not writable.
    """
    folder = run / "checkpoints" / checkpoint_name(progress.step)
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / "model.safetensors", weights, {"format": "pt"})
        (temporary / "config.toml").write_text(to_toml(config), encoding="utf-8")
        tokenizer.save(temporary / "tokenizer.json")
        write_tensors(temporary / "training.safetensors", training, {})
        (temporary / "training.json").write_text(json.dumps(to_json(progress), indent=1), encoding="utf-8")
    return folder
