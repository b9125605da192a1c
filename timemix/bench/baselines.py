"""Baselines: the naive wkv1, fused attention, the Llama of transformers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.bench.race import Contender
from timemix.models.config import ModelConfig
from timemix.ops.rwkv1.api import K_MAX, K_MIN


def plain_wkv1(
    k: Tensor, v: Tensor, f: Tensor, alpha: Tensor, beta: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """The formula of 2021 as anyone would write it: W as a matrix, one einsum, a running sum. Shapes as in `wkv1`."""
    T = k.shape[1]
    lag = torch.arange(T, device=k.device)[:, None] - torch.arange(T, device=k.device)
    W = (f[:, lag.clamp(min=0)] * alpha[:, None, :T] * beta[:, :T, None]).masked_fill(lag < 0, 0)
    exp_k = k.clamp(K_MIN, K_MAX).exp()
    return torch.einsum("htu,buhn->bthn", W, exp_k * v) / exp_k.cumsum(1), None


def _attention(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Contender:
    B, T, H, N = shape
    q, k, v = (torch.randn(B, H, T, N, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

    def call() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    return Contender(f"attention {str(dtype).removeprefix('torch.')}", call, B * T)


def llama_like(model: ModelConfig, device: torch.device) -> nn.Module | None:
    """A Llama-style model of `transformers` with about as many parameters, None where that is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]
    except ImportError:
        return None
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
    return LlamaForCausalLM(config).to(device)
