"""Size of a model before it is built: parameters, FLOPs per token."""

import torch

from timemix.models.config import ModelConfig, TimeMixConfig
from timemix.models.language_model import LanguageModel
from timemix.ops.common.causal import BLOCK
from timemix.ops.common.spectral import block_length
from timemix.ops.rwkv1.api import DENSE_UP_TO, blocked_up_to, choose_backend


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
