"""Run folders and checkpoints: safetensors, JSON and TOML, each written whole or not at all.

runs/NAME/config.toml, metrics.jsonl, samples.txt, loss.png
runs/NAME/checkpoints/step-00000500/{model.safetensors, config.toml, tokenizer.json,
                                     training.safetensors, training.json}
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from timemix.config import RunConfig, read_toml, to_toml
from timemix.errors import UserError
from timemix.files import atomic_folder, cannot_write
from timemix.models import LanguageModel
from timemix.tokenizer import Tokenizer, load_tokenizer


@dataclass
class Loaded:
    """A trained model with its tokenizer and the config of its run."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: RunConfig
    folder: Path


def save_checkpoint(
    run: Path,
    step: int,
    model: LanguageModel,
    config: RunConfig,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> Path:
    """Writes checkpoints/step-NNNNNNNN of a run folder and returns its path.

    `progress`: what resuming needs besides tensors (step, seconds, validation loss ...).
    Raises UserError when the disk is full.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    with atomic_folder(folder) as temporary:
        _write_tensors(temporary / "model.safetensors", model.state_dict(), {"format": "pt"})
        (temporary / "config.toml").write_text(to_toml(config), encoding="utf-8")
        tokenizer.save(temporary / "tokenizer.json")
        _write_tensors(temporary / "training.safetensors", _training_tensors(model, optimizer), {})
        (temporary / "training.json").write_text(json.dumps({"step": step, **progress}, indent=1), encoding="utf-8")
    return folder


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)
    except SafetensorError as error:
        # The library hides the errno of a full disk in its text.
        if "os error 28" in str(error):
            raise OSError(28, "No space left on device") from None
        raise OSError(5, str(error)) from None


def _training_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {"random.cpu": torch.get_rng_state()}
    if model.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(model.device)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{key}.{names[id(parameter)]}"] = torch.as_tensor(value)
    return tensors


def restore_training(folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts weights, optimizer and random states of a checkpoint back; returns its training.json.

    Raises UserError when a file is missing, damaged or does not fit the model.
    """
    _fill(model, folder)
    tensors = read_tensors(folder / "training.safetensors")
    progress = read_progress(folder)
    try:
        torch.set_rng_state(tensors["random.cpu"])
        if model.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], model.device)
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
            if optimizer.state[parameter]["exp_avg"].shape != parameter.shape:
                raise RuntimeError(f"{name} has another shape")
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder / 'training.safetensors'} does not fit this run: {error}") from None
    return progress


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises UserError when it is missing, truncated or something else."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return data


def read_progress(folder: Path) -> dict[str, Any]:
    """training.json of a checkpoint. Raises UserError when it is missing, damaged, or lacks a number."""
    progress = read_json(folder / "training.json")
    for name, may_be_none in (("step", False), ("seconds", False), ("valid_loss", True), ("valid_step", True)):
        value = progress.get(name)
        if not (isinstance(value, int | float) or (value is None and may_be_none and name in progress)):
            raise UserError(f"{folder / 'training.json'} is damaged: {name} is {value!r}")
    return progress


def _fill(model: LanguageModel, folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors, ours = read_tensors(path), model.state_dict()
    if tensors.keys() != ours.keys():
        name = sorted(tensors.keys() ^ ours.keys())[0]
        where = "only in the file" if name in tensors else "missing from it"
        raise UserError(f"{path} holds another architecture than its config.toml names: {name} is {where}")
    for name, tensor in tensors.items():
        if tensor.shape != ours[name].shape:
            raise UserError(
                f"{path} does not fit its config.toml: {name} is {list(tensor.shape)}, not {list(ours[name].shape)}"
            )
    model.load_state_dict(tensors)


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-" + 8 * "[0-9]"))


def newest(run: Path) -> Path:
    """Newest checkpoint. Raises UserError when the run has none."""
    found = checkpoints(run)
    if not found:
        raise UserError(_no_checkpoint(run))
    return found[-1]


def _validated(run: Path) -> list[tuple[float, Path]]:
    """Validation loss and folder of the checkpoints that were validated at their own step."""
    found = [(read_progress(folder), folder) for folder in checkpoints(run)]
    own = [(p["valid_loss"], folder) for p, folder in found if p["valid_step"] == p["step"]]
    return [(loss, folder) for loss, folder in own if loss is not None]


def best(run: Path) -> Path:
    """Checkpoint of the lowest validation loss, the newest where none was validated at its own step."""
    return min(_validated(run), default=(0.0, None))[1] or newest(run)


def best_loss(run: Path) -> float:
    """Lowest validation loss of a run's checkpoints in nats per token, infinite where none was validated."""
    return min((loss for loss, _ in _validated(run)), default=math.inf)


def prune(run: Path) -> None:
    """Removes every checkpoint but the newest and the best."""
    keep = {newest(run), best(run)}
    for folder in checkpoints(run):
        if folder not in keep:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise UserError(cannot_write(folder, error)) from error


def load(run: str | Path, *, checkpoint: str | int = "best", device: str = "cpu") -> Loaded:
    """Model, tokenizer and config of a run folder or of one checkpoint folder; the model in eval mode.

    `checkpoint`: "best" (lowest validation loss), "newest", or a step.
    Raises UserError when something is missing, damaged, or does not fit together.
    """
    path = Path(run)
    if not path.is_dir():
        raise UserError(f"there is no run folder {path}{_similar(path)}")
    if (path / "model.safetensors").exists():
        folder = path
    elif checkpoint == "best":
        folder = best(path)
    elif checkpoint == "newest":
        folder = newest(path)
    else:
        newest(path)
        steps = {str(int(c.name.removeprefix("step-"))): c for c in checkpoints(path)}
        if str(checkpoint) not in steps:
            raise UserError(f"{path} has no checkpoint {checkpoint!r}; it has best, newest, {', '.join(steps)}")
        folder = steps[str(checkpoint)]
    config = read_toml(folder / "config.toml")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} entries,"
            f" but the model was made for {config.model.vocab_size}: it is not this model's tokenizer"
        )
    with torch.device("meta"):
        model = LanguageModel(config.model)
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    model = model.to(dtype).to_empty(device=device)
    _fill(model, folder)
    return Loaded(model.eval(), tokenizer, config, folder)


def _no_checkpoint(run: Path) -> str:
    if not run.is_dir():
        return f"there is no run folder {run}{_similar(run)}"
    if not (run / "config.toml").exists():
        return f"{run} is no run folder: it has no config.toml"
    return f"{run} has no checkpoint yet"


def _similar(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return ""
    runs = sorted(p.name for p in parent.iterdir() if (p / "config.toml").exists())
    return f"; {parent} has {', '.join(runs[:8])}" if runs else ""
