"""A model on several processes: replicated or sharded."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timemix.config.run import TrainConfig
from timemix.errors import InvalidValue, ProcessLost
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel, model_parts
from timemix.runtime.distributed import World, set_whole


def new_model(
    config: ModelConfig, strategy: str, world: World, device: torch.device, dtype: torch.dtype
) -> tuple[LanguageModel, nn.Module]:
    """Create a model with initial values from torch's generator, the same for any strategy and number of processes.

    Args:
        config: Of the model.
        strategy: "replicate" (DistributedDataParallel) keeps the whole model in each process. "shard" (fully_shard)
            splits each parameter by rows over the processes; no process ever holds the whole model.
        world: The processes; all call.
        device: Of this process.
        dtype: Of the parameters.

    Returns:
        The model, and the module to call in training, whose gradients are the mean over the processes.
    """
    if world.size > 1 and strategy == "shard":
        model = _sharded(config, world, device, dtype)
        return model, model
    model = LanguageModel(config).to(device, dtype)
    if world.size == 1:
        return model, model
    ids = None if device.type == "cpu" else [device]
    return model, DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def _sharded(config: ModelConfig, world: World, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """Create a sharded model: its parts are created one by one, and each process copies its rows of them."""
    # Imported where needed: it takes more than a second, half of what torch does.
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = LanguageModel(config).to(dtype)
    mesh = dist.init_device_mesh(device.type, (world.size,))  # type: ignore[attr-defined]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # Also the parameters outside the blocks, which would stay whole after a forward pass without a backward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.to_empty(device=device)
    # As LanguageModel does: first all modules with the values of their constructors, then those of the architecture.
    for name, create in model_parts(config):
        for end, values in create().named_parameters():
            set_whole(model.get_parameter(f"{name}.{end}"), values)
    model.block.set_initial_values(model)
    return model


@contextlib.contextmanager
def without_exchange(module: nn.Module) -> Iterator[None]:
    """Gradients of the block stay in their process: those of all but the last piece of a batch."""
    with module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext():
        yield


def check_shares(train: TrainConfig, world: World) -> None:
    """Raises InvalidValue where the processes cannot take equal parts of a batch."""
    if train.batch_size % (train.accumulation * world.size):
        raise InvalidValue(
            f"train.batch_size={train.batch_size} cannot be cut into {world.size} equal parts for the processes,"
            f" each in {train.accumulation} pieces; take a multiple of {train.accumulation * world.size}"
        )


@contextlib.contextmanager
def losses_reported(world: World, last_good: Callable[[], str]) -> Iterator[None]:
    """Raise ProcessLost, with a sentence about the last checkpoint, where the block fails for want of a process."""
    try:
        yield
    except RuntimeError as error:
        if not world.lost(error):
            raise
        raise ProcessLost(
            f"a process of this run has ended or does not answer; {last_good()}; any number of processes can resume it"
        ) from error
