"""Memory of a training step, estimated before it is run."""

from timemix.config.run import RunConfig, TrainConfig
from timemix.errors import UserError
from timemix.models.config import ModelConfig
from timemix.models.size import count_parameters
from timemix.ops.common.causal import BLOCK
from timemix.ops.rwkv1.api import DENSE_UP_TO
from timemix.runtime.device import choose_device, choose_precision
from timemix.runtime.distributed import World
from timemix.runtime.machine import free_memory


def training_memory(model: ModelConfig, train: TrainConfig, precision: str, processes: int = 1) -> int:
    """Bytes that a training step needs in each process, estimated; within 45 % where measured (docs/LOG.md).

    Weights, gradients and two moments; what blocks keep for the backward pass, counted in numbers per token; logits and
    their gradient; W or attention matrices per head: in every layer, or a strip once where W is never written out.
    """
    width = 8 if precision == "float64" else 4
    rows = max(1, train.batch_size // train.accumulation // processes)
    tokens = rows * train.contexts * model.ctx_len
    # In bfloat16 the inputs and outputs of products are half as wide, the rest is not.
    kept = 0.7 if precision == "bfloat16" else 1.0
    block, products = 25 * model.channels + 6 * model.ffn_hidden, 7 * model.channels + 2 * model.ffn_hidden
    # With recomputing, one block at a time is whole.
    blocks = {
        "none": model.layers * block,
        "cheap": model.layers * products + block,
        "all": model.layers * model.channels + block,
    }[train.recompute]
    per_token = kept * blocks + 4 * model.vocab_size
    matrices = {"rwkv1": 4, "rwkv1_exp": 4, "mha_rotary": 0, "mha_shift": 0, "mha_pro": 3 * rows + 4}[model.arch]
    written = model.layers * model.ctx_len
    if model.arch.startswith("rwkv1") and model.ctx_len > DENSE_UP_TO:
        written = BLOCK
    squares = matrices * model.heads * model.ctx_len * written
    held = 4 * count_parameters(model)["total"] / (processes if train.strategy == "shard" else 1)
    return int(width * (held + tokens * per_token + squares))


def refuse_too_large(config: RunConfig, world: World) -> None:
    """Raises UserError when the run would not fit the memory that is free now."""
    device, _ = choose_device(config.train.device, world.local_rank)
    precision, _ = choose_precision(config.train.precision, device)
    needed = training_memory(config.model, config.train, precision, world.size)
    if device.type == "cpu":
        needed *= world.local_size
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"this run needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free;"
            f" lower --train.batch-size ({config.train.batch_size}), cut it with --train.accumulation, or take"
            " --train.recompute cheap or all"
        )
