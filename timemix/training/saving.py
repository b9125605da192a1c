"""Copies of weights and optimizer state from a trainer to a checkpoint and back."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from timemix.config.run import RunConfig
from timemix.errors import DamagedFile
from timemix.models.language_model import LanguageModel
from timemix.runs.folder import Progress, checkpoint_name, read_progress
from timemix.runs.load import check_weights
from timemix.runs.save import save_checkpoint
from timemix.runs.tuning import trained
from timemix.runtime.distributed import ALONE, World, own_part, own_rows, set_whole, whole
from timemix.storage.sharded import StoredTensors, open_stored
from timemix.tokenizers.base import Tokenizer
from timemix.training.optim import state_names

Named = dict[str, Tensor]


def tensors_to_save(model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Named, Named]:
    """Return the trained weights by name, and the optimizer state by "KEY.NAME". Sharded tensors stay sharded."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = {
        f"{key}.{names[id(p)]}": torch.as_tensor(value)
        for optimizer in optimizers
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }
    return trained(model), state


def gathered(tensors: Named, world: World) -> Named:
    """Return whole tensors on the CPU in process 0, {} in other processes. All processes must call this function."""
    found: Named = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.first:
            found[name] = full.cpu()
    return found


def first_damaged(weights: Named, world: World) -> str | None:
    """Return the name of the first weight that is not finite in some process, or None if all weights are finite.

    All processes must call this function.
    """
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
    """Write a checkpoint. All processes must call this function.

    A sharded model is written as one file per process and an index, so no process holds the whole model. If the
    model is not sharded, process 0 writes whole tensors. Any number of processes can resume from a sharded or a whole
    checkpoint.

    Args:
        run: Run folder.
        tensors: Weights under "model" and optimizer state under "training", of this process.
        config: Config of the run.
        tokenizer: Tokenizer of the run.
        progress: State of the run besides its tensors.
        world: The processes of the run.

    Returns:
        Path of the checkpoint in process 0, and the path or None in other processes.

    Raises:
        CannotWrite: The disk is full or not writable. Only process 0 raises CannotWrite.
        Elsewhere: Process 0 raised CannotWrite. The other processes then raise Elsewhere.
    """
    if all(own_part(x) is x for x in tensors["model"].values()):
        full = {stem: gathered(named, world) for stem, named in tensors.items()}
        return world.first_does(lambda: save_checkpoint(run, full, config, tokenizer, progress))
    # Process 0 also writes the step counts, which are the only tensors that are not sharded.
    own = {
        stem: {name: own_part(x).cpu() for name, x in named.items() if world.first or own_part(x) is not x}
        for stem, named in tensors.items()
    }
    shapes = {stem: {name: tuple(x.shape) for name, x in named.items()} for stem, named in tensors.items()}
    return save_checkpoint(run, own, config, tokenizer, progress, world, shapes)


def restore_training(
    folder: Path, model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer], world: World = ALONE
) -> Progress:
    """Load weights and optimizer state of a checkpoint into a model and its optimizers.

    Each process reads its own rows, from one or several files.

    Args:
        folder: The checkpoint.
        model: The model to fill.
        optimizers: Optimizers of the model, as returned by `build_optimizers`.
        world: The processes of the run, all of which must call this function.

    Returns:
        The content of training.json.

    Raises:
        FileError: A file is missing, damaged or does not fit the model.
        Elsewhere: Another process found a damaged file.
    """
    check_weights(model, folder)
    with open_stored(folder, "model") as stored:
        # Check each file in only one process.
        world.all_check(partial(stored.check_content, world.rank, world.size))
        for name, own in trained(model).items():
            _read_own_rows(own, stored, name)
    progress = read_progress(folder)
    if progress.step == 0:
        return progress
    if folder.name != checkpoint_name(progress.step):
        raise DamagedFile(
            f"{folder / 'training.json'} is of step {progress.step}, not of {folder.name};"
            " remove the checkpoint to resume from the one before"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    with open_stored(folder, "training") as stored:
        # Check each file in only one process.
        world.all_check(partial(stored.check_content, world.rank, world.size))
        for optimizer in optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                for key in state_names(optimizer):
                    name, shape = f"{key}.{names[id(parameter)]}", () if key == "step" else parameter.shape
                    if not stored.fits(name, shape):
                        raise DamagedFile(
                            f"{stored.path} does not fit this run: {name} is missing or has another shape;"
                            " remove the checkpoint to resume from the one before"
                        )
                    # The fused optimizer requires the step count in float32, on the device of the parameter.
                    if key == "step":
                        value = stored.tensor(name).to(parameter.device, torch.float32)
                    else:
                        value = torch.empty_like(parameter.detach())
                        _read_own_rows(value, stored, name)
                    optimizer.state[parameter][key] = value
    return progress


@torch.no_grad()
def _read_own_rows(own: Tensor, stored: StoredTensors, name: str) -> None:
    """Read this process's rows of a stored tensor."""
    part = own_part(own)
    part.copy_(stored.tensor(name) if part is own else stored.rows(name, *own_rows(own)))


@torch.no_grad()
def fill(model: LanguageModel, weight: Callable[[str], Tensor]) -> None:
    """Copy whole weights into a model, which may be sharded over processes.

    Args:
        model: The model to fill.
        weight: Function that returns the whole weight with a given name.
    """
    for name, own in model.state_dict().items():
        set_whole(own, weight(name))
