"""Weights and optimizer state between a training and its checkpoints."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from timemix.errors import DamagedFile
from timemix.models.language_model import LanguageModel
from timemix.runs.folder import Progress, checkpoint_name, read_progress
from timemix.runs.load import check_weights
from timemix.runtime.distributed import World, part_like, whole
from timemix.storage.tensors import check_content, fits_tensor, open_tensors
from timemix.training.optim import state_names


def gathered(
    model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer], world: World
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole tensors of the weights and of the optimizers' state, on the CPU, in process 0; all processes call.

    So a checkpoint looks the same whatever number of processes made it, and any number can resume from it.
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


def restore_training(folder: Path, model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer]) -> Progress:
    """Puts weights and optimizer state of a checkpoint back; returns its training.json.

    Raises FileError when a file is missing, damaged or does not fit the model.
    """
    _fill_from(folder, model)
    path = folder / "training.safetensors"
    progress = read_progress(folder)
    if progress.step == 0:
        return progress
    if folder.name != checkpoint_name(progress.step):
        raise DamagedFile(f"{folder / 'training.json'} is not that of {folder.name}: its step is {progress.step}")
    names = {id(p): name for name, p in model.named_parameters()}
    with open_tensors(path) as tensors:
        check_content(tensors, path)
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                for key in state_names(optimizer):
                    name, shape = f"{key}.{names[id(parameter)]}", () if key == "step" else parameter.shape
                    if not fits_tensor(tensors, name, shape):
                        raise DamagedFile(f"{path} does not fit this run: {name} is missing or of another shape")
                    # The fused optimizer takes no other types, and its step counts on the parameter's device only.
                    tensor = tensors.get_tensor(name).to(torch.float32 if key == "step" else parameter.dtype)
                    optimizer.state[parameter][key] = (
                        tensor.to(parameter.device) if key == "step" else part_like(tensor, parameter)
                    )
    return progress


@torch.no_grad()
def fill(model: LanguageModel, weight: Callable[[str], Tensor]) -> None:
    """Puts the whole weights that `weight` gives by name into a model, which may be cut up over processes."""
    for name, own in model.state_dict().items():
        own.copy_(part_like(weight(name).to(own.dtype), own))


def _fill_from(folder: Path, model: LanguageModel) -> None:
    check_weights(model, folder)
    path = folder / "model.safetensors"
    with open_tensors(path) as tensors:
        check_content(tensors, path)
        fill(model, tensors.get_tensor)
