"""Run folders and checkpoints: safetensors, JSON and TOML, each written whole or not at all.

runs/NAME/config.toml, metrics.jsonl, samples.txt, loss.png
runs/NAME/checkpoints/step-00000500/{model.safetensors, config.toml, tokenizer.json,
                                     training.safetensors, training.json}
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from timemix.config.run import RunConfig, read_toml, to_toml
from timemix.data.corpus import Corpus, open_run_corpus
from timemix.errors import UserError
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.optim import state_names
from timemix.runtime.distributed import World, part_like, whole
from timemix.storage.files import atomic_folder, check_regular, remove_folder
from timemix.storage.json_files import are_numbers, is_count, is_number, misfit, read_json
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.make import load_tokenizer

LARGEST_HEADER = 16 * 2**20
"""Bytes of the JSON at the beginning of a safetensors file at most: some 100,000 tensors."""


@dataclass
class Loaded:
    """A trained model with its tokenizer and the config of its run."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: RunConfig
    folder: Path

    def corpus(self) -> Corpus:
        """Tokens of its run. Raises UserError as `open_run_corpus` does, and for those of another vocabulary."""
        run = self.folder.parent.parent
        corpus = open_run_corpus(run, self.config.data.source)
        if corpus.tokenizer.hash != self.tokenizer.hash:
            raise UserError(f"the data of {run} were made with another tokenizer than the model in {self.folder}")
        return corpus


def save_checkpoint(
    run: Path,
    step: int,
    weights: dict[str, Tensor],
    training: dict[str, Tensor],
    config: RunConfig,
    tokenizer: Tokenizer,
    progress: dict[str, Any],
) -> Path:
    """Writes checkpoints/step-NNNNNNNN of a run folder and returns its path.

    `weights` and `training` as `gathered` gives them; `progress`: what resuming needs besides tensors (seconds,
    validation loss ...). Raises CannotWrite when the disk is full.
    """
    folder = run / "checkpoints" / checkpoint_name(step)
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / "model.safetensors", weights, {"format": "pt"})
        (temporary / "config.toml").write_text(to_toml(config), encoding="utf-8")
        tokenizer.save(temporary / "tokenizer.json")
        write_tensors(temporary / "training.safetensors", training, {})
        (temporary / "training.json").write_text(json.dumps({"step": step, **progress}, indent=1), encoding="utf-8")
    return folder


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def gathered(
    model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer], world: World
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole tensors of the weights and of the optimizers' state, on the CPU, in process 0; all processes call.

    So a checkpoint looks the same whatever number of processes made it, and any number goes on with it.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    state = {
        f"{key}.{names[id(p)]}": torch.as_tensor(value)
        for optimizer in optimizers
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }
    weights: dict[str, Tensor] = {}
    training: dict[str, Tensor] = {}
    for source, found in ((model.state_dict(), weights), (state, training)):
        for name, tensor in source.items():
            full = whole(tensor)
            if world.first:
                found[name] = full.cpu()
    return weights, training


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file. Raises OSError."""
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)
    except SafetensorError as error:
        # The library hides the errno of a full disk in its text.
        if "os error 28" in str(error):
            raise OSError(28, "No space left on device") from None
        raise OSError(5, str(error)) from None


def restore_training(folder: Path, model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Puts weights and optimizer state of a checkpoint back; returns its training.json.

    Raises UserError when a file is missing, damaged or does not fit the model.
    """
    _fill_from(folder, model)
    path = folder / "training.safetensors"
    progress = read_progress(folder)
    if progress["step"] == 0:
        return progress
    if folder.name != checkpoint_name(progress["step"]):
        raise UserError(f"{folder / 'training.json'} is not that of {folder.name}: its step is {progress['step']}")
    names = {id(p): name for name, p in model.named_parameters()}
    with open_tensors(path) as tensors:
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                for key in state_names(optimizer):
                    name, shape = f"{key}.{names[id(parameter)]}", () if key == "step" else parameter.shape
                    if not fits_tensor(tensors, name, shape):
                        raise UserError(f"{path} does not fit this run: {name} is missing or of another shape")
                    # The fused optimizer takes no other types.
                    tensor = tensors.get_tensor(name).to(torch.float32 if key == "step" else parameter.dtype)
                    optimizer.state[parameter][key] = tensor if key == "step" else part_like(tensor, parameter)
    return progress


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one.

    Raises UserError when it is missing, truncated or something else.
    """
    if not path.exists():
        raise UserError(f"{path} is missing")
    check_regular(path)
    try:
        with path.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if header > LARGEST_HEADER:
            raise OSError(f"its header is said to have {header:,} bytes")
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None


def fits_tensor(tensors: Any, name: str, shape: Sequence[int]) -> bool:
    """Whether an open file has a tensor of this name and shape, of floating-point numbers; reads no content."""
    if name not in tensors.keys():  # noqa: SIM118
        return False
    found = tensors.get_slice(name)
    return list(found.get_shape()) == list(shape) and found.get_dtype() in ("F32", "F64", "F16", "BF16")


def read_progress(folder: Path) -> dict[str, Any]:
    """training.json of a checkpoint. Raises UserError when it is missing, damaged, or a value cannot be."""
    path = folder / "training.json"
    progress = {"losses_since_line": [], "usual_loss": [0.0, 0.0, 0]} | read_json(path)
    if name := misfit(progress, _PROGRESS):
        raise UserError(f"{path} is damaged: {name} is {progress.get(name)!r}")
    if len(progress["losses_since_line"]) > progress["step"]:
        raise UserError(f"{path} is damaged: it holds more losses than steps")
    return progress


_PROGRESS: dict[str, Callable[[Any], bool]] = {
    "step": is_count,
    "seconds": lambda x: is_number(x) and x >= 0,
    "valid_loss": lambda x: x is None or is_number(x),
    "valid_step": lambda x: x is None or is_count(x),
    "losses_since_line": are_numbers,
    # Mean, variance, and number of losses.
    "usual_loss": lambda x: are_numbers(x) and len(x) == 3 and min(x[1:]) >= 0,
}


@torch.no_grad()
def fill(model: LanguageModel, weight: Callable[[str], Tensor]) -> None:
    """Puts the whole weights that `weight` gives by name into a model, which may be cut up over processes."""
    for name, own in model.state_dict().items():
        own.copy_(part_like(weight(name).to(own.dtype), own))


def _fill_from(folder: Path, model: LanguageModel) -> None:
    check_weights(model, folder)
    with open_tensors(folder / "model.safetensors") as tensors:
        fill(model, tensors.get_tensor)


def check_weights(model: LanguageModel, folder: Path) -> None:
    """Raises UserError where the weights of a checkpoint do not fit the model, by names, shapes and types alone."""
    path, ours = folder / "model.safetensors", model.state_dict()
    with open_tensors(path) as tensors:
        if other := sorted(set(tensors.keys()) ^ ours.keys()):
            where = "missing from it" if other[0] in ours else "only in the file"
            raise UserError(f"{path} holds another architecture than its config.toml names: {other[0]} is {where}")
        for name, own in ours.items():
            if not fits_tensor(tensors, name, own.shape):
                found = tensors.get_slice(name)
                raise UserError(
                    f"{path} does not fit its config.toml: {name} is {found.get_dtype()} {found.get_shape()},"
                    f" not {list(own.shape)}"
                )


def empty_model(config: ModelConfig, folder: Path) -> LanguageModel:
    """The model of a config without memory, which the weights of a checkpoint fit.

    Raises UserError where they do not, before work or memory of the size that the config names is taken.
    """
    path = folder / "model.safetensors"
    with open_tensors(path) as tensors:
        layers = len({name.split(".")[1] for name in tensors.keys() if name.startswith("blocks.")})  # noqa: SIM118
    if layers != config.layers:
        raise UserError(f"{path} does not fit its config.toml: it holds {layers} layers, not {config.layers}")
    with torch.device("meta"):
        model = LanguageModel(config)
    check_weights(model, folder)
    return model


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
            remove_folder(folder)


def find(run: str | Path, checkpoint: str | int = "best") -> Path:
    """Folder of a checkpoint: of a run folder ("best", of the lowest validation loss, "newest", or a step), or itself.

    Raises UserError when there is none.
    """
    path = Path(run)
    if not path.is_dir():
        raise UserError(f"there is no run folder {path}{_similar(path)}")
    if (path / "model.safetensors").exists():
        return path
    if checkpoint == "best":
        return best(path)
    if checkpoint == "newest":
        return newest(path)
    newest(path)
    steps = {str(int(c.name.removeprefix("step-"))): c for c in checkpoints(path)}
    if str(checkpoint) not in steps:
        raise UserError(f"{path} has no checkpoint {checkpoint!r}; it has best, newest, {', '.join(steps)}")
    return steps[str(checkpoint)]


def load(run: str | Path, *, checkpoint: str | int = "best", device: str = "cpu") -> Loaded:
    """Model, tokenizer and config of a run folder or of one checkpoint folder; the model in eval mode.

    `checkpoint`: as for `find`. Raises UserError when something is missing, damaged, or does not fit together.
    """
    folder = find(run, checkpoint)
    config = read_toml(folder / "config.toml")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} entries,"
            f" but the model was made for {config.model.vocab_size}: it is not this model's tokenizer"
        )
    dtype = torch.float64 if config.train.precision == "float64" else torch.float32
    model = empty_model(config.model, folder)
    with open_tensors(folder / "model.safetensors") as tensors:
        # A copy: what the file gives may be the file itself, mapped into memory.
        weights = {name: tensors.get_tensor(name).to(device, dtype, copy=True) for name in model.state_dict()}
    model.load_state_dict(weights, assign=True)
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
