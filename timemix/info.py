"""What this machine has, and the size of a model before it is built: parameters, FLOPs, memory."""

import platform
from typing import Any

import torch

from timemix._version import __version__
from timemix.config.run import TrainConfig
from timemix.models.config import ARCHITECTURES, ExpTimeMixConfig, ModelConfig, TimeMixConfig, architecture
from timemix.models.language_model import LanguageModel
from timemix.ops.common.causal import BLOCK
from timemix.ops.common.spectral import block_length
from timemix.ops.rwkv1.api import DENSE_UP_TO, blocked_up_to, choose_backend
from timemix.runtime.device import choose_device, choose_precision


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of the embedding, of all mixers, of all feed-forward halves, of the head, and in total."""
    with torch.device("meta"):
        model = LanguageModel(config)
    counts = {"embedding": 0, "mixers": 0, "ffns": 0, "head": 0, "norms": 0}
    for name, p in model.named_parameters():
        part = "norms" if "norm" in name else name.split(".")[0]
        if part == "blocks":
            part = f"{name.split('.')[2]}s"
        counts[part] += p.numel()
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations per token of a forward pass over ctx_len tokens; training takes three times.

    Two per weight of each matrix product, and 2 * ctx_len * channels for a time-mix's product with W, half of that in
    blocks, less through spectra; twice that for attention, whole T x T matrices as they are computed.
    """
    C, T = config.channels, config.ctx_len
    weights = config.vocab_size * C
    with torch.device("meta"):
        model = LanguageModel(config)
    weights += sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2 and "weight" in name)  # type: ignore[attr-defined]
    time_mix = config.arch.startswith("rwkv1")
    products = T if time_mix else 2 * T
    if time_mix and blocked_up_to(torch.float32) < T:
        L = block_length(T)
        products = 5 * L + 4 * T // L
    elif time_mix and T > DENSE_UP_TO:
        products = (T + BLOCK) // 2
    return 2 * weights + config.layers * 2 * C * products


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


def describe_machine() -> dict[str, Any]:
    """Versions, and what `auto` takes for device and precision, with the reason."""
    device, device_reason = choose_device("auto")
    precision, precision_reason = choose_precision("auto", device)
    return {
        "timemix": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": f"{device} ({device_reason})",
        "precision": f"{precision} ({precision_reason})",
    }


def wkv1_backend(model: ModelConfig, precision: str) -> str:
    """The form of wkv1 that a model takes for a whole context, and the reason."""
    dtype = getattr(torch, precision)
    if not isinstance(model.mixer, TimeMixConfig):
        return "{} ({})".format(*choose_backend("auto", model.ctx_len, dtype))
    name, reason = choose_backend(
        model.mixer.backend,
        model.ctx_len,
        dtype,
        free=model.mixer.weights == "free",
        weighted=model.mixer.denominator == "weighted",
    )
    return f"{name} ({reason})"


def describe_model(model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    """Parameters by part and of every architecture at this size, FLOPs per token, memory of training."""
    precision, _ = choose_precision(train.precision, choose_device(train.device)[0])
    report: dict[str, Any] = {
        "arch": model.arch,
        "size": f"{model.layers} layers, {model.heads} heads, {model.channels} channels, ffn_ratio {model.ffn_ratio},"
        f" ctx_len {model.ctx_len}, vocabulary {model.vocab_size}",
    }
    if isinstance(model.mixer, TimeMixConfig | ExpTimeMixConfig):
        report["wkv1"] = wkv1_backend(model, precision)
    report["parameters"] = count_parameters(model)
    sizes = ("vocab_size", "ctx_len", "layers", "heads", "channels", "ffn_ratio")
    same_size = {name: getattr(model, name) for name in sizes}
    report["parameters_by_arch"] = {
        arch: count_parameters(architecture(arch, **same_size))["total"] for arch in ARCHITECTURES
    }
    flops = flops_per_token(model)
    report["flops_per_token"] = {"forward": flops, "training": 3 * flops}
    report["training_memory_mib"] = training_memory(model, train, precision) // 2**20
    report["batch_size"] = train.batch_size // train.accumulation
    return report
