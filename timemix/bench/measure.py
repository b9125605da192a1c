"""Measure the speed and the peak memory of a training step, in a new process that does nothing else."""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from timemix.config.run import RunConfig
from timemix.evaluation.loss import cross_entropy
from timemix.models.language_model import LanguageModel
from timemix.runtime.device import autocast, choose_device, choose_precision
from timemix.runtime.machine import address_space, free_memory, keep_freed_memory, peak_memory, resident_memory
from timemix.storage.json_files import NotNegative, Positive, to_json
from timemix.storage.settings import from_dict, to_dict
from timemix.training.optim import build_optimizers

OUT_OF_MEMORY = "out of memory"
# Parts of the error messages of torch on a GPU, of torch on a CPU, and of Python when memory runs out.
_WANT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "MemoryError")


@dataclass(frozen=True)
class StepSpeed:
    """Measured speed and memory of a training step."""

    step_seconds: NotNegative
    """Duration of the fastest step, in seconds."""
    tokens_per_second: Positive
    """Speed of the fastest step, in tokens per second."""
    peak_memory: Positive | None
    """Peak memory minus the memory before the model is built, in bytes, or None if unavailable.

    The measurement counts resident memory on a CPU, and allocated memory on a GPU.
    """


@dataclass(frozen=True)
class StepFailure:
    """Reason why a training step could not be measured."""

    error: str
    """The text `OUT_OF_MEMORY`, or the last line of the error output."""


def measure_training(config: RunConfig, steps: int = 3) -> StepSpeed | StepFailure:
    """Measure training steps on random tokens, in a new process.

    Args:
        config: Config of the run: model, batch size, accumulation, precision and device.
        steps: Number of timed steps, after one step that is not timed.

    Returns:
        Speed and memory of the fastest step, or a StepFailure if a step fails, for example because memory runs out.
    """
    asked = {"config": to_dict(config), "steps": steps, "threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "timemix.bench.measure"]
    child = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if child.returncode == 0:
        return StepSpeed(**json.loads(child.stdout))
    # Linux kills a process with SIGKILL when memory runs out.
    if child.returncode == -9 or any(words in child.stderr for words in _WANT_OF_MEMORY):
        return StepFailure(OUT_OF_MEMORY)
    return StepFailure((child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1])


def _measure(config: RunConfig, steps: int) -> StepSpeed:
    train = config.train
    device, _ = choose_device(train.device)
    precision, _ = choose_precision(train.precision, device)
    keep_freed_memory()
    on_gpu = device.type == "cuda"
    # A small step runs first, so that the memory of loaded code does not count.
    small = config.model.tiny()
    small_model = LanguageModel(small).to(device)
    _step(small_model, build_optimizers(small_model, train, precision), (2, small.ctx_len), 1, precision)
    if not on_gpu:
        _limit_memory(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else resident_memory()
    model = LanguageModel(config.model).to(device)
    model.recompute = train.recompute
    optimizers = build_optimizers(model, train, precision)
    rows = train.batch_size // train.accumulation
    fastest = math.inf
    for step in range(steps + 1):
        start = time.perf_counter()
        _step(model, optimizers, (rows, config.window), train.accumulation, precision)
        # The first step is not timed, because it allocates memory.
        if step > 0:
            fastest = min(fastest, time.perf_counter() - start)
    peak = peak_memory(device)
    return StepSpeed(
        step_seconds=fastest,
        tokens_per_second=train.batch_size * config.window / fastest,
        peak_memory=None if peak is None else peak - before,
    )


def _step(
    model: LanguageModel,
    optimizers: list[torch.optim.Optimizer],
    shape: tuple[int, int],
    pieces: int,
    precision: str,
) -> None:
    """Run one training step on random tokens, and wait for the device to finish.

    Args:
        model: The model.
        optimizers: Optimizers of the model.
        shape: Number of windows of a piece, and number of tokens of a window.
        pieces: Number of pieces of the batch.
        precision: Precision of matrix products.
    """
    config, (rows, window) = model.config, shape
    for _ in range(pieces):
        tokens = torch.randint(config.vocab_size, (rows, window + 1), device=model.device)
        with autocast(precision, model.device):
            logits, _ = model(tokens[:, :-1])
        model.block.training_loss(config, cross_entropy(logits, tokens[:, 1:]), logits).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _limit_memory(device: torch.device) -> None:
    """Limit the memory of this process, so that the process fails before the system kills other processes."""
    import resource

    limit = address_space() + int(0.9 * free_memory(device))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    print(json.dumps(to_json(_measure(from_dict(RunConfig, asked["config"]), asked["steps"]))))
