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
from timemix.runtime.distributed import ALONE, World, own_part, own_rows, set_whole, whole
from timemix.storage.sharded import StoredTensors, open_stored
from timemix.tokenizers.base import Tokenizer
from timemix.training.optim import state_names

Named = dict[str, Tensor]


def tensors_to_save(model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Named, Named]:
    """Return the weights by name, and the optimizer state by "KEY.NAME". Sharded tensors stay sharded."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = {
        f"{key}.{names[id(p)]}": torch.as_tensor(value)
        for optimizer in optimizers
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }
    return model.state_dict(), state


def gathered(tensors: Named, world: World) -> Named:
    """Return whole tensors on the CPU in process 0, and nothing in the others. All processes must call."""
    found: Named = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.first:
            found[name] = full.cpu()
    return found


def first_damaged(weights: Named, world: World) -> str | None:
    """Return the name of the first weight that is not finite in any process, or None. All processes must call."""
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
    """Write a checkpoint. All processes must call.

    A sharded model is written as one file per process and an index, so no process holds the whole model. Otherwise
    process 0 writes whole tensors. Any number of processes can resume from both forms.

    Args:
        run: Run folder.
        tensors: Weights under "model" and optimizer state under "training", of this process.
        config: Config of the run.
        tokenizer: Tokenizer of the run.
        progress: State of the run besides its tensors.
        world: The processes of the run.

    Returns:
        The checkpoint in process 0; in the others the checkpoint or None.

    Raises:
        CannotWrite: In process 0: the disk is full or not writable.
        Elsewhere: In the other processes, when process 0 raises CannotWrite.
    """
    if all(own_part(x) is x for x in tensors["model"].values()):
        full = {stem: gathered(named, world) for stem, named in tensors.items()}
        return world.first_does(lambda: save_checkpoint(run, full, config, tokenizer, progress))
    # Process 0 also writes the tensors that are not sharded: step counts.
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

    Each process reads its own rows, from one file or from several.

    Args:
        folder: The checkpoint.
        model: The model to fill.
        optimizers: Its optimizers, as `build_optimizers` returns them.
        world: The processes of the run, which all must call.

    Returns:
        The content of training.json.

    Raises:
        FileError: A file is missing, damaged or does not fit the model.
        Elsewhere: Another process found a damaged file.
    """
    check_weights(model, folder)
    with open_stored(folder, "model") as stored:
        # Each file in one process.
        world.all_check(partial(stored.check_content, world.rank, world.size))
        for name, own in model.state_dict().items():
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
        # Each file in one process.
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
                    # The fused optimizer requires these types, and its step count on the parameter's device.
                    if key == "step":
                        value = stored.tensor(name).to(parameter.device, torch.float32)
                    else:
                        value = torch.empty_like(parameter.detach())
                        _read_own_rows(value, stored, name)
                    optimizer.state[parameter][key] = value
    return progress


@torch.no_grad()
def _read_own_rows(own: Tensor, stored: StoredTensors, name: str) -> None:
    """Read the rows of a stored tensor that this process has."""
    part = own_part(own)
    part.copy_(stored.tensor(name) if part is own else stored.rows(name, *own_rows(own)))


@torch.no_grad()
def fill(model: LanguageModel, weight: Callable[[str], Tensor]) -> None:
    """Copy whole weights into a model, which may be sharded over processes.

    Args:
        model: The model to fill.
        weight: Returns the whole weight of a name.
    """
    for name, own in model.state_dict().items():
        set_whole(own, weight(name))
