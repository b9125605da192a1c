"""Baselines of the benchmarks: the naive wkv1, fused attention, and the Llama of `transformers`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.bench.race import Contender
from timemix.errors import InvalidValue
from timemix.models.config import HeadsConfig, ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.registry import like_size_of
from timemix.models.rwkv1.config import Rwkv1Config
from timemix.ops.rwkv1.api import BACKENDS, wkv1
from timemix.ops.rwkv1.state import K_MAX, K_MIN

PLAIN = "plain float32"
"""Name of the naive implementation, to which the values and the speed of all other implementations are compared."""

LIBRARY = "transformers Llama"
"""Name of the Llama of `transformers`, which has about as many parameters as the timed model."""
WITHOUT_LIBRARY = "transformers is not installed: its Llama is skipped"

OP, FORMS = wkv1, ("dense", "blocked", "spectral")


def plain_wkv1(
    k: Tensor, v: Tensor, f: Tensor, alpha: Tensor, beta: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """Compute wkv1 by a naive implementation of the 2021 formula: a matrix W, one einsum and one running sum.

    For each head and channel:

        W[t, u] = f[t - u] alpha[u] beta[t] for u <= t, else 0
        y[t] = sum over u of W[t, u] exp(k[u]) v[u] / sum over u <= t of exp(k[u])

    Args:
        k: Keys, (B, T, H, N).
        v: Values, (B, T, H, N).
        f: Weights by lag, (H, T).
        alpha: Factors by source position, (H, T).
        beta: Factors by target position, (H, T).

    Returns:
        Output y, (B, T, H, N), and None instead of a state.
    """
    T = k.shape[1]
    # (T, T): target position minus source position
    lag = torch.arange(T, device=k.device)[:, None] - torch.arange(T, device=k.device)
    W = (f[:, lag.clamp(min=0)] * alpha[:, None, :T] * beta[:, :T, None]).masked_fill(lag < 0, 0)
    exp_k = k.clamp(K_MIN, K_MAX).exp()
    return torch.einsum("htu,buhn->bthn", W, exp_k * v) / exp_k.cumsum(1), None


def attention(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Contender:
    """Return forward and backward pass of PyTorch's fused causal attention, as a contender of a benchmark.

    Args:
        shape: Shape of queries, keys and values, (B, T, H, N).
        dtype: Data type of queries, keys and values.
        device: Device of the tensors.
    """
    B, T, H, N = shape
    q, k, v = (torch.randn(B, H, T, N, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

    def call() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    return Contender(f"attention {str(dtype).removeprefix('torch.')}", call, B * T)


def naive_config(model: ModelConfig) -> Rwkv1Config:
    """Return the config of a model whose op wkv1 is replaced by the naive implementation.

    Raises:
        InvalidValue: The model is not an rwkv1 with tables f, alpha and beta.
    """
    if not isinstance(model, Rwkv1Config):
        raise InvalidValue(
            f"model.arch={model.arch!r} has no naive implementation to compare with; choose model.arch rwkv1"
        )
    if model.weights == "free" or not (model.alpha and model.beta):
        raise InvalidValue(
            "these settings of rwkv1 have no naive implementation to compare with; leave model.weights, model.alpha and"
            " model.beta out"
        )
    config = replace(model)
    # The checks of the config reject the naive backend, so this code bypasses the checks.
    object.__setattr__(config, "backend", PLAIN)
    return config


@contextmanager
def naive_backend() -> Iterator[None]:
    """Add the naive implementation to the backends of wkv1 during the `with` block."""
    BACKENDS[PLAIN] = lambda k, v, f, alpha, beta, *_: plain_wkv1(k, v, f, alpha, beta)
    try:
        yield
    finally:
        del BACKENDS[PLAIN]


def rotary_like(model: ModelConfig) -> ModelConfig:
    """Return the config of a rotary-attention model that has the size of `model`."""
    return like_size_of(model, "mha_rotary")


def library_like(model: ModelConfig, device: torch.device) -> nn.Module | None:
    """Return a Llama of `transformers` with about as many parameters as `model`, None if `transformers` is missing.

    Args:
        model: Config of the model to match.
        device: Device of the Llama.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    C = model.channels
    # A model without heads gets a Llama with heads of 64 channels, or with one head.
    heads = model.heads if isinstance(model, HeadsConfig) else C // 64 if C % 64 == 0 else 1
    with torch.device("meta"):
        of_layer = sum(p.numel() for block in LanguageModel(model).blocks for p in block.parameters()) // model.layers
    # A layer of Llama has 4 C^2 parameters in attention, and three matrices of `hidden` x C.
    hidden = max(8, round((of_layer - 4 * C * C) / (3 * C) / 8) * 8)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=C,
        intermediate_size=hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=heads,
        max_position_embeddings=model.ctx_len,
        use_cache=False,
    )
    result: nn.Module = LlamaForCausalLM(config).to(device)
    return result
