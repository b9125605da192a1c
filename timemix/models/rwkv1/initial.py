"""Initial values: `original` (RWKV-LM 0.01) and `zero` (late 2021).

original, rwkv1: orthogonal weights (gain sqrt(out/in) where out > in); embedding 0.4 sqrt(max(V, C)) times and
head 0.4 times orthogonal; both receptances and the time-mix key zero; the two outputs of layer l divided by
sqrt(1 + l); f one. original, attention: linear and embedding weights normal(0, 0.01).
zero: the orthogonal values for every architecture, both outputs of a block zero, so that it starts as the
identity, and f_h(lag) decaying faster in lower heads. Biases are zero, alpha, beta, gamma one, throughout.
rwkv1_exp is as rwkv1, each f_h one exponential, and the others without weight.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from timemix.models.config import ExpTimeMixConfig, ModelConfig, TimeMixConfig
from timemix.ops.common.causal import toeplitz
from timemix.ops.rwkv1.exponential import LEAST_RATE

HEAD_GAIN = 0.4


class Model(Protocol):
    """What is filled: a language model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def blocks(self) -> Any: ...

    def named_modules(self) -> Any: ...


@torch.no_grad()
def set_initial_values(model: Model) -> None:
    """Fills every weight in place, from torch's global generator."""
    config = model.config
    zero = config.initial == "zero"
    orthogonal = zero or config.arch.startswith("rwkv1")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            if orthogonal:
                _orthogonal(name, module)
            else:
                nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    if not orthogonal:
        return

    for layer, block in enumerate(model.blocks):
        mixer: Any = block.mixer
        halves: tuple[Any, Any] = (mixer, block.ffn)
        for half in halves:
            half.output.weight.mul_(0 if zero else (1 + layer) ** -0.5)
            if hasattr(half, "receptance"):
                half.receptance.weight.zero_()
        if config.arch.startswith("rwkv1"):
            mixer.key.weight.zero_()
        if zero and hasattr(mixer, "f"):
            mixer.f.copy_(_like(mixer.f, log_decay(config.heads, config.ctx_len)).exp())
        if isinstance(config.mixer, ExpTimeMixConfig):
            _set_exponentials(mixer, log_decay(config.heads, config.ctx_len) if zero else None)
    if isinstance(config.mixer, TimeMixConfig) and config.mixer.denominator == "weighted":
        _take_logarithms(model)


def _orthogonal(name: str, module: nn.Linear | nn.Embedding) -> None:
    out, into = module.weight.shape
    if isinstance(module, nn.Embedding):
        gain = HEAD_GAIN * math.sqrt(max(out, into))
    else:
        gain = math.sqrt(max(1, out / into)) * (HEAD_GAIN if name == "head" else 1)
    nn.init.orthogonal_(module.weight, gain=gain)


def log_decay(heads: int, ctx_len: int) -> Tensor:
    """Logarithm of f (H, ctx_len) in `zero`: -lag * ctx_len^(-(h+1)/(H-1)); the last head is constant 0."""
    rates = [ctx_len ** (-(h + 1) / (heads - 1)) for h in range(heads - 1)] + [0.0]
    return -torch.tensor(rates)[:, None] * torch.arange(ctx_len)


def _set_exponentials(mixer: Any, decay: Tensor | None) -> None:
    """The curves of `zero` (H, ctx_len), or None for the constant 1, in the first slots; the others have no weight yet.

    Their rates are spread from one lag to all of ctx_len, so that what a head lacks is near at hand.
    """
    _, K = mixer.rate.shape
    ctx_len = mixer.config.ctx_len
    mixer.rate.copy_(torch.tensor([ctx_len ** (-j / max(1, K - 2)) for j in range(-1, K - 1)]))
    mixer.rate[:, 0] = LEAST_RATE if decay is None or ctx_len == 1 else -decay[:, 1].clamp(max=-LEAST_RATE)
    mixer.coefficients.zero_()
    mixer.coefficients[:, 0] = 1


def _like(f: Tensor, by_lag: Tensor) -> Tensor:
    """A table by lag in the shape of f: itself, or written out for each pair (t, u)."""
    return by_lag if f.ndim == 2 else toeplitz(by_lag, by_lag.shape[1], by_lag.shape[1])


def _take_logarithms(model: Model) -> None:
    """Tables of the weighted denominator, whose W is exp(f + alpha + beta), with the same W as the plain one."""
    zero = model.config.initial == "zero"
    for block in model.blocks:
        mixer: Any = block.mixer
        decay = log_decay(model.config.heads, model.config.ctx_len)
        mixer.f.copy_(_like(mixer.f, decay) if zero else torch.zeros_like(mixer.f))
        if mixer.alpha is not None:
            mixer.alpha.zero_()
