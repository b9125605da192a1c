"""Baselines: the naive wkv1, fused attention, the Llama of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.bench.race import Contender
from timemix.errors import InvalidValue
from timemix.models.config import ModelConfig, ShiftedConfig
from timemix.models.registry import like_size_of
from timemix.models.rwkv1.config import Rwkv1Config
from timemix.ops.rwkv1.api import BACKENDS, wkv1
from timemix.ops.rwkv1.state import K_MAX, K_MIN

PLAIN = "plain float32"
"""The naive implementation: what every other path is compared to, and must give the values of."""

LIBRARY = "transformers Llama"
"""A model of another library, with about as many parameters."""
WITHOUT_LIBRARY = "transformers is not installed: its Llama is left out"

OP, FORMS = wkv1, ("dense", "blocked", "spectral")


def plain_wkv1(
    k: Tensor, v: Tensor, f: Tensor, alpha: Tensor, beta: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """The formula of 2021 as anyone would write it: W as a matrix, one einsum, a running sum. Shapes as in `wkv1`."""
    T = k.shape[1]
    lag = torch.arange(T, device=k.device)[:, None] - torch.arange(T, device=k.device)
    W = (f[:, lag.clamp(min=0)] * alpha[:, None, :T] * beta[:, :T, None]).masked_fill(lag < 0, 0)
    exp_k = k.clamp(K_MIN, K_MAX).exp()
    return torch.einsum("htu,buhn->bthn", W, exp_k * v) / exp_k.cumsum(1), None


def attention(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Contender:
    B, T, H, N = shape
    q, k, v = (torch.randn(B, H, T, N, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

    def call() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    return Contender(f"attention {str(dtype).removeprefix('torch.')}", call, B * T)


def naive_config(model: ModelConfig) -> Rwkv1Config:
    """The settings of the same model with the naive op. Raises InvalidValue for a model that it cannot compute."""
    if not isinstance(model, Rwkv1Config) or model.weights == "free" or not (model.alpha and model.beta):
        raise InvalidValue("bench train compares rwkv1, with alpha and beta, to the others; leave model.arch out")
    config = replace(model)
    # A backend that no run may ask for, hence past the checks.
    object.__setattr__(config, "backend", PLAIN)
    return config


@contextmanager
def naive_backend() -> Iterator[None]:
    """Within it, wkv1 has the naive implementation among its backends."""
    BACKENDS[PLAIN] = lambda k, v, f, alpha, beta, *_: plain_wkv1(k, v, f, alpha, beta)
    try:
        yield
    finally:
        del BACKENDS[PLAIN]


def rotary_like(model: ModelConfig) -> ModelConfig:
    """The settings of rotary attention of the same size."""
    return like_size_of(model, "mha_rotary")


def library_like(model: ModelConfig, device: torch.device) -> nn.Module | None:
    """A Llama-style model of `transformers` with about as many parameters, None where that is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]
    except ImportError:
        return None
    assert isinstance(model, ShiftedConfig)
    C = model.channels
    # Three matrices of its feed-forward half and four of attention make the time-mix's 4 and the channel-mix's 1 + 3 r.
    hidden = int((model.ffn_ratio + 1 / 3) * C) // 8 * 8
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=C,
        intermediate_size=hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=model.ctx_len,
        use_cache=False,
    )
    result: nn.Module = LlamaForCausalLM(config).to(device)
    return result
