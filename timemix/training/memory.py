"""Estimate of the memory that a training step needs, computed before the run starts."""

from timemix.config.run import RunConfig, TrainConfig
from timemix.errors import Unavailable
from timemix.models.config import ModelConfig
from timemix.models.language_model import block_class
from timemix.models.size import count_parameters
from timemix.runs.load import Loaded
from timemix.runs.tuning import tuned_parameters
from timemix.runtime.device import choose_device, choose_precision
from timemix.runtime.distributed import World
from timemix.runtime.machine import free_memory


def training_memory(model: ModelConfig, train: TrainConfig, precision: str, processes: int = 1) -> int:
    """Return the estimated number of bytes that a training step needs in each process.

    In all measured cases, the estimate differs from the measured memory by at most 45 %
    (docs/log/2026-11-23-memory-estimate.md). The estimate is the sum of

    - weights, and a gradient and two moments per trained weight,
    - values that the blocks save for the backward pass, counted per token,
    - logits and their gradient,
    - the matrices W (or attention matrices) of all heads and layers, or one strip of W if no code forms the whole W.

    Args:
        model: The model.
        train: Batch size, accumulation, recomputation and strategy.
        precision: "float32", "bfloat16" or "float64".
        processes: Number of processes that share a batch.
    """
    width = 8 if precision == "float64" else 4
    rows = max(1, train.batch_size // train.accumulation // processes)
    tokens = rows * train.contexts * model.ctx_len
    # In bfloat16, only the inputs and outputs of matrix products take half the memory.
    kept = 0.7 if precision == "bfloat16" else 1.0
    own = block_class(model).kept(model, rows)
    # With recomputation, only one block at a time has all its values in memory.
    blocks = {
        "none": model.layers * own.block,
        "cheap": model.layers * own.products + own.block,
        "all": model.layers * model.channels + own.block,
    }[train.recompute]
    per_token = kept * blocks + 4 * model.vocab_size
    total = count_parameters(model)["total"]
    if train.tune == "all":
        held = 4 * total / (processes if train.strategy == "shard" else 1)
    else:
        held = total + 4 * tuned_parameters(model, train)
    return int(width * (held + tokens * per_token + own.squares))


def run_memory(config: RunConfig, world: World) -> tuple[int, int]:
    """Return the estimated number of bytes that the processes of a run need on a device, and the free memory in bytes.

    Args:
        config: Config of the run.
        world: The processes of the run.
    """
    device, _ = choose_device(config.train.device, world.local_rank)
    precision, _ = choose_precision(config.train.precision, device)
    needed = training_memory(config.model, config.train, precision, world.size)
    if device.type == "cpu":
        needed *= world.local_size
    return needed, free_memory(device)


def refuse_too_large(config: RunConfig, world: World) -> None:
    """Check that the run fits into the free memory.

    Raises:
        Unavailable: The estimate exceeds the free memory.
    """
    needed, free = run_memory(config, world)
    if needed > free:
        raise Unavailable(
            f"this run needs about {needed / 2**30:.1f} GiB of memory, but only {free / 2**30:.1f} GiB are free;"
            f" lower train.batch_size ({config.train.batch_size}), raise train.accumulation, or set train.recompute to"
            " 'cheap' or 'all'"
        )


def memory_note(start: Loaded, config: RunConfig, world: World) -> str:
    """Return a note on the memory of a run from trained weights.

    Args:
        start: The trained model.
        config: Config of the run.
        world: The processes of the run.

    Returns:
        The note; "" for a run that trains all weights of a model in float32 or float64.
    """
    small = {str(x.dtype).removeprefix("torch.") for x in start.model.parameters() if x.dtype.itemsize < 4}
    if config.train.tune == "all" and not small:
        return ""
    needed, free = (size / 2**30 for size in run_memory(config, world))
    memory = f"needs about {needed:.1f} GiB of memory ({free:.1f} GiB are free)"
    if config.train.tune == "all":
        kinds = " and ".join(sorted(small))
        return f"the weights of {start.folder} are in {kinds}; training updates copies in float32, and {memory}"
    ranks = {rank for _, rank in config.train.lora_ranks}
    lora = f"LoRA of rank {ranks.pop()}" if len(ranks) == 1 else "LoRA of several ranks"
    what = "the initial state" if config.train.tune == "state" else lora
    count = tuned_parameters(config.model, config.train)
    return f"{what} has {count:,} parameters; the weights of {start.folder} are frozen; training {memory}"
