"""The checkpoints of a run in training: weights and optimizer state from a trainer to files and back."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from timemix.config.run import RunConfig
from timemix.errors import CannotWrite, DamagedFile
from timemix.models.language_model import LanguageModel
from timemix.runs.folder import Progress, checkpoint_name, last_good, not_finite, prune, read_progress
from timemix.runs.load import check_weights
from timemix.runs.save import save_checkpoint
from timemix.runs.tuning import trained
from timemix.runtime.distributed import ALONE, Elsewhere, World, own_part, own_rows, set_whole, whole
from timemix.storage.sharded import StoredTensors, open_stored
from timemix.tokenizers.base import Tokenizer
from timemix.training.failures import Failures
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


class Checkpoints:
    """The checkpoints of a run in training.

    Args:
        run: Run folder.
        config: Config of the run.
        tokenizer: Tokenizer of the run.
        world: The processes of the run.
        warn: Function that is called with each warning.
    """

    def __init__(
        self, run: Path, config: RunConfig, tokenizer: Tokenizer, world: World, warn: Callable[[str], None]
    ) -> None:
        self.run, self.config, self.tokenizer, self.world = run, config, tokenizer, world
        self._failures = Failures(f"{run / 'checkpoints'}", warn)

    def write(self, tensors: Mapping[str, Named], progress: Progress, *, go_on: bool) -> Path | None:
        """Write a checkpoint, and remove the checkpoints that are neither newest nor best.

        All processes must call this method. If writing fails, all earlier checkpoints stay.

        Args:
            tensors: Weights under "model" and optimizer state under "training", of this process.
            progress: State of the run besides its tensors.
            go_on: Whether to warn and continue if the disk is full or not writable.

        Returns:
            Path of the checkpoint in process 0, or None in other processes and if writing failed.

        Raises:
            CannotWrite: The disk is full or not writable, and `go_on` is False. Only process 0 raises CannotWrite.
            Elsewhere: Process 0 raised CannotWrite or NotFinite. The other processes then raise Elsewhere.
            NotFinite: A weight is not finite. Only process 0 raises NotFinite.
        """
        # All processes know the damaged weight, and only process 0 reports this weight.
        if damaged := _first_damaged(tensors["model"], self.world):
            self.world.first_does(lambda: self._refuse(damaged, progress.step))
        try:
            saved = self._write(tensors, progress)
        except CannotWrite as error:
            sentence = f"step {progress.step}: {error}; {last_good(self.run)}"
            if not go_on:
                raise CannotWrite(sentence) from error
            self._failures.failed(str(getattr(error.__cause__, "errno", "")), f"{sentence}; training continues")
            return None
        except Elsewhere:
            if not go_on:
                raise
            return None
        self._failures.worked()
        self.world.first_does(lambda: prune(self.run))
        return saved if self.world.first else None

    def close(self) -> None:
        """At the end of a run, report the number of failures if the last call of `write` failed."""
        self._failures.close()

    def _refuse(self, damaged: str, step: int) -> None:
        raise not_finite(self.run, f"weight {damaged}", step)

    def _write(self, tensors: Mapping[str, Named], progress: Progress) -> Path | None:
        """Write a checkpoint.

        A sharded model is written as one file per process and an index, so no process holds the whole model. If the
        model is not sharded, process 0 writes whole tensors. Any number of processes can resume from a sharded or a
        whole checkpoint.
        """
        if all(own_part(x) is x for x in tensors["model"].values()):
            full = {stem: gathered(named, self.world) for stem, named in tensors.items()}
            return self.world.first_does(lambda: save_checkpoint(self.run, full, self.config, self.tokenizer, progress))
        # Process 0 also writes the step counts, which are the only tensors that are not sharded.
        own = {
            stem: {name: own_part(x).cpu() for name, x in named.items() if self.world.first or own_part(x) is not x}
            for stem, named in tensors.items()
        }
        shapes = {stem: {name: tuple(x.shape) for name, x in named.items()} for stem, named in tensors.items()}
        return save_checkpoint(self.run, own, self.config, self.tokenizer, progress, self.world, shapes)


def gathered(tensors: Named, world: World) -> Named:
    """Return whole tensors on the CPU in process 0, {} in other processes. All processes must call this function."""
    found: Named = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.first:
            found[name] = full.cpu()
    return found


def _first_damaged(weights: Named, world: World) -> str | None:
    """Return the name of the first weight that is not finite in some process, or None if all weights are finite.

    All processes must call this function.
    """
    flags = world.sum(*(float(not torch.isfinite(own_part(each)).all()) for each in weights.values()))
    return next((name for name, flag in zip(weights, flags, strict=True) if flag), None)


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
