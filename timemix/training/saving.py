"""Copies of weights and optimizer state from a trainer to a checkpoint and back."""

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
    """Return all weights and optimizer state as whole tensors.

    All processes must call this function. A checkpoint thus does not depend on the number of processes, and any number
    of processes can resume from it.

    Returns:
        Weights by name, and state tensors by "KEY.NAME", on the CPU; in processes other than 0, both are empty.
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
    """Load weights and optimizer state of a checkpoint into a model and its optimizers.

    Args:
        folder: The checkpoint.
        model: The model to fill.
        optimizers: Its optimizers, as `build_optimizers` returns them.

    Returns:
        The content of training.json.

    Raises:
        FileError: A file is missing, damaged or does not fit the model.
    """
    _fill_from(folder, model)
    path = folder / "training.safetensors"
    progress = read_progress(folder)
    if progress.step == 0:
        return progress
    if folder.name != checkpoint_name(progress.step):
        raise DamagedFile(
            f"{folder / 'training.json'} is of step {progress.step}, not of {folder.name};"
            " remove the checkpoint to resume from the one before"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    with open_tensors(path) as tensors:
        check_content(tensors, path)
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                for key in state_names(optimizer):
                    name, shape = f"{key}.{names[id(parameter)]}", () if key == "step" else parameter.shape
                    if not fits_tensor(tensors, name, shape):
                        raise DamagedFile(
                            f"{path} does not fit this run: {name} is missing or has another shape;"
                            " remove the checkpoint to resume from the one before"
                        )
                    # The fused optimizer requires these types, and its step count on the parameter's device.
                    tensor = tensors.get_tensor(name).to(torch.float32 if key == "step" else parameter.dtype)
                    optimizer.state[parameter][key] = (
                        tensor.to(parameter.device) if key == "step" else part_like(tensor, parameter)
                    )
    return progress


@torch.no_grad()
def fill(model: LanguageModel, weight: Callable[[str], Tensor]) -> None:
    """Copy whole weights into a model, which may be sharded over processes.

    Args:
        model: The model to fill.
        weight: Returns the whole weight of a name.
    """
    for name, own in model.state_dict().items():
        own.copy_(part_like(weight(name).to(own.dtype), own))


def _fill_from(folder: Path, model: LanguageModel) -> None:
    check_weights(model, folder)
    path = folder / "model.safetensors"
    with open_tensors(path) as tensors:
        check_content(tensors, path)
        fill(model, tensors.get_tensor)
