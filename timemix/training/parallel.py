"""A model on several processes: replicated or sharded."""

import contextlib
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from timemix.config.run import TrainConfig
from timemix.errors import InvalidValue, ProcessLost
from timemix.models.language_model import LanguageModel
from timemix.runtime.distributed import World


def in_parallel(model: LanguageModel, strategy: str, world: World) -> nn.Module:
    """The module to call in training: its gradients are the mean over the processes.

    "replicate" (DistributedDataParallel) keeps the model whole in each of them; "shard" (fully_shard) cuts the
    parameters of each block, in place, into a part for each process.
    """
    if world.size == 1:
        return model
    if strategy == "shard":
        # Imported where needed: it takes more than a second, half of what torch does.
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(next(model.parameters()).device.type, (world.size,))  # type: ignore[attr-defined]
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        # Also what is outside the blocks, which would stay whole after a forward pass that no backward follows.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        return model
    device = next(model.parameters()).device
    ids = None if device.type == "cpu" else [device]
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


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
