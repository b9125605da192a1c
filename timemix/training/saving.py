"""Weights and optimizer state between a training and its checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from timemix.config.run import RunConfig
from timemix.errors import DamagedFile
from timemix.models.language_model import LanguageModel
from timemix.runs.folder import Progress, checkpoint_name, read_progress
from timemix.runs.load import check_weights
from timemix.runs.save import save_checkpoint
from timemix.runtime.distributed import ALONE, Elsewhere, World, own_part, own_rows, set_whole, whole
from timemix.storage.sharded import StoredTensors, open_stored
from timemix.tokenizers.base import Tokenizer
from timemix.training.optim import state_names

Named = dict[str, Tensor]


def tensors_to_save(model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Named, Named]:
    """Return the weights by name, and the optimizers' state by name; sharded tensors stay sharded."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = {
        f"{key}.{names[id(p)]}": torch.as_tensor(value)
        for optimizer in optimizers
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }
    return model.state_dict(), state


def gathered(tensors: Named, world: World) -> Named:
    """Return whole tensors on the CPU in process 0, nothing in the others; all processes call."""
    found: Named = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.first:
            found[name] = full.cpu()
    return found


def first_damaged(weights: Named, world: World) -> str | None:
    """Return the name of the first weight that is not finite in any process, or None; all processes call."""
    flags = world.sum(*(float(not torch.isfinite(own_part(each)).all()) for each in weights.values()))
    return next((name for name, flag in zip(weights, flags, strict=True) if flag), None)


def write_checkpoint(
    run: Path,
    tensors: Mapping[str, Named],
    config: RunConfig,
    tokenizer: Tokenizer,
    progress: Progress,
    world: World,
) -> Path | None:
    """Write a checkpoint: one file of each kind, or where the model is sharded one per process. All processes call.

    Args:
        run: Run folder.
        tensors: Weights under "model" and optimizer state under "training", of this process.
        config: Config of the run.
        tokenizer: Tokenizer of the run.
        progress: Content of training.json.
        world: The processes of the run.

    Returns:
        The checkpoint folder in process 0, None or the folder in the others.

    Raises:
        CannotWrite: The disk is full, or the folder cannot be written; in process 0.
        Elsewhere: Process 0 raises CannotWrite; in the other processes.
    """
    if not any(own_part(x) is not x for x in tensors["model"].values()):
        full = {stem: gathered(named, world) for stem, named in tensors.items()}
        return world.first_does(lambda: save_checkpoint(run, full, config, tokenizer, progress))
    # Process 0 also has the tensors that are not sharded: step counts.
    own = {
        stem: {name: own_part(x).cpu() for name, x in named.items() if world.first or own_part(x) is not x}
        for stem, named in tensors.items()
    }
    shapes = {stem: {name: tuple(x.shape) for name, x in named.items()} for stem, named in tensors.items()}
    return save_checkpoint(run, own, config, tokenizer, progress, world, shapes)


def restore_training(
    folder: Path, model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer], world: World = ALONE
) -> Progress:
    """Puts weights and optimizer state of a checkpoint back; returns its training.json.

    Each process reads the rows that it has, from one file or several. Raises FileError when a file is missing, damaged
    or does not fit the model.
    """
    check_weights(model, folder)
    with open_stored(folder, "model") as stored:
        _check_content(stored, world)
        for name, own in model.state_dict().items():
            _set(own, stored, name)
    progress = read_progress(folder)
    if progress.step == 0:
        return progress
    if folder.name != checkpoint_name(progress.step):
        raise DamagedFile(f"{folder / 'training.json'} is not that of {folder.name}: its step is {progress.step}")
    names = {id(p): name for name, p in model.named_parameters()}
    with open_stored(folder, "training") as stored:
        _check_content(stored, world)
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                for key in state_names(optimizer):
                    name, shape = f"{key}.{names[id(parameter)]}", () if key == "step" else parameter.shape
                    if not stored.fits(name, shape):
                        raise DamagedFile(f"{stored.path} does not fit this run: {name} is missing or of another shape")
                    # The fused optimizer takes no other types, and its step counts on the parameter's device only.
                    if key == "step":
                        value = stored.tensor(name).to(parameter.device, torch.float32)
                    else:
                        value = torch.empty_like(parameter.detach())
                        _set(value, stored, name)
                    optimizer.state[parameter][key] = value
    return progress


def _check_content(stored: StoredTensors, world: World) -> None:
    """Check the files of a checkpoint, each in one process. Raises DamagedFile there, and Elsewhere in the others."""
    error = None
    try:
        stored.check_content(world.rank, world.size)
    except DamagedFile as damaged:
        error = damaged
    (failed,) = world.sum(float(error is not None))
    if error is not None:
        raise error
    if failed:
        raise Elsewhere


@torch.no_grad()
def _set(own: Tensor, stored: StoredTensors, name: str) -> None:
    """Read the rows of a tensor that this process has."""
    part = own_part(own)
    part.copy_(stored.tensor(name) if part is own else stored.rows(name, *own_rows(own)))


@torch.no_grad()
def fill(model: LanguageModel, weight: Callable[[str], Tensor]) -> None:
    """Copy the whole weights that `weight` returns by name into a model, which may be sharded."""
    for name, own in model.state_dict().items():
        set_whole(own, weight(name))
