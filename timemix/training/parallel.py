"""Training on several processes: the model is replicated or sharded."""

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
    config: ModelConfig,
    strategy: str,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_filled: bool = False,
) -> tuple[LanguageModel, nn.Module]:
    """Create a model with initial values from the random generator of torch.

    The initial values are equal for any strategy and number of processes.

    Args:
        config: Config of the model.
        strategy: "replicate" (DistributedDataParallel) keeps a whole model in each process. "shard" (fully_shard)
            splits each parameter by rows over the processes, and no process ever holds the whole model.
        world: The processes of the run, all of which must call this function.
        device: Device of this process.
        dtype: Type of the parameters.
        is_filled: Whether trained weights replace the initial values, which are then zeros. Computing the initial
            values takes more memory than the values.

    Returns:
        The model, and the module to call in training. The gradients of the module are the mean over the processes.
    """
    if world.size > 1 and strategy == "shard":
        model = _sharded(config, world, device, dtype)
        return model, model
    if is_filled:
        with torch.device("meta"):
            model = LanguageModel(config).to(dtype)
        model.to_empty(device=device)
        for parameter in model.parameters():
            parameter.data.zero_()
    else:
        model = LanguageModel(config).to(device, dtype)
    if world.size == 1:
        return model, model
    ids = None if device.type == "cpu" else [device]
    return model, DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def _sharded(config: ModelConfig, world: World, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """Create a sharded model part by part. Each process copies its rows of each part."""
    # The import takes more than a second, half as long as the import of torch, so fully_shard is imported on use.
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = LanguageModel(config).to(dtype)
    mesh = dist.init_device_mesh(device.type, (world.size,))  # type: ignore[attr-defined]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # `fully_shard(model)` shards the parameters outside the blocks. Without `reshard_after_forward`, the parameters
    # outside the blocks would stay whole after a forward pass without a backward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.to_empty(device=device)
    # Use the same order as LanguageModel: first the values of the constructors, then the values of the architecture.
    for name, create in model_parts(config):
        for end, values in create().named_parameters():
            set_whole(model.get_parameter(f"{name}.{end}"), values)
    model.block.set_initial_values(model)
    return model


@contextlib.contextmanager
def without_exchange(module: nn.Module) -> Iterator[None]:
    """Disable the exchange of gradients in the `with` block, for all pieces of a batch except the last piece."""
    with module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext():
        yield


def check_shares(train: TrainConfig, world: World) -> None:
    """Check that the batch divides evenly among the processes and their accumulated pieces.

    Raises:
        InvalidValue: The batch does not divide evenly, or `train.tune` supports one process only.
    """
    if train.tune != "all" and world.size > 1:
        raise InvalidValue(
            f"train.tune is {train.tune!r}, which supports one process, not {world.size}; start one process"
        )
    if train.batch_size % (train.accumulation * world.size):
        raise InvalidValue(
            f"train.batch_size={train.batch_size} is not divisible by processes ({world.size}) x train.accumulation"
            f" ({train.accumulation}); give a multiple of {train.accumulation * world.size}"
        )


@contextlib.contextmanager
def losses_reported(world: World, last_good: Callable[[], str]) -> Iterator[None]:
    """Raise ProcessLost in place of the error that a lost process causes in the `with` block.

    Args:
        world: The processes of the run.
        last_good: Function that returns a clause about the last good checkpoint, for the error message.

    Raises:
        ProcessLost: Another process of the run has ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if not world.lost(error):
            raise
        raise ProcessLost(
            f"a process of this run has ended or does not answer; {last_good()}; any number of processes can resume"
            " the run"
        ) from error
