"""Memory of a training step, estimated before it is run."""

from timemix.config.run import RunConfig, TrainConfig
from timemix.errors import Unavailable
from timemix.models.config import ModelConfig
from timemix.models.language_model import block_class
from timemix.models.size import count_parameters
from timemix.runtime.device import choose_device, choose_precision
from timemix.runtime.distributed import World
from timemix.runtime.machine import free_memory


def training_memory(model: ModelConfig, train: TrainConfig, precision: str, processes: int = 1) -> int:
    """Bytes that a training step needs in each process, estimated.

    Within 45 % of the measured ones (docs/log/2026-11-23-memory-estimate.md).

    Weights, gradients and two moments; what blocks keep for the backward pass, counted in numbers per token; logits and
    their gradient; W or attention matrices per head: in every layer, or a strip once where W is never written out.
    """
    width = 8 if precision == "float64" else 4
    rows = max(1, train.batch_size // train.accumulation // processes)
    tokens = rows * train.contexts * model.ctx_len
    # In bfloat16 the inputs and outputs of products are half as wide, the rest is not.
    kept = 0.7 if precision == "bfloat16" else 1.0
    own = block_class(model).kept(model, rows)
    # With recomputing, one block at a time is whole.
    blocks = {
        "none": model.layers * own.block,
        "cheap": model.layers * own.products + own.block,
        "all": model.layers * model.channels + own.block,
    }[train.recompute]
    per_token = kept * blocks + 4 * model.vocab_size
    held = 4 * count_parameters(model)["total"] / (processes if train.strategy == "shard" else 1)
    return int(width * (held + tokens * per_token + own.squares))


def refuse_too_large(config: RunConfig, world: World) -> None:
    """Raises Unavailable when the run would not fit the memory that is free now."""
    device, _ = choose_device(config.train.device, world.local_rank)
    precision, _ = choose_precision(config.train.precision, device)
    needed = training_memory(config.model, config.train, precision, world.size)
    if device.type == "cpu":
        needed *= world.local_size
    free = free_memory(device)
    if needed > free:
        raise Unavailable(
            f"this run needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free;"
            f" lower train.batch_size ({config.train.batch_size}), cut it with train.accumulation, or take"
            " train.recompute cheap or all"
        )
