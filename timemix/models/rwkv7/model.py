"""RWKV-7 (arXiv 2503.14456): a recurrent network whose state is one matrix per head.

    x = x + time_mix(LayerNorm(x)),   x = x + channel_mix(LayerNorm(x))

The state has the same size at every position, so a context has no end. No linear map has a bias. Logits, gradients and
a training run equal those of the original training code (tests/models/test_original_code.py).
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.layers.activations import relu2
from timemix.models.layers.block import Block, Kept, Model, Recipe, Tensors
from timemix.models.layers.l2wrap import l2wrap
from timemix.models.layers.linear import LayerNorm, Linear
from timemix.models.layers.low_rank import LowRank, LowRankWithBias
from timemix.models.layers.mixtures import learned, normed_mixtures, shares, wide
from timemix.models.rwkv7.config import Rwkv7Config
from timemix.models.rwkv7.initial import set_initial_values
from timemix.ops.common import fused
from timemix.ops.common.kernels import chosen
from timemix.ops.common.spread import broadcast_parameter
from timemix.ops.rwkv7.api import choose_backend, wkv7
from timemix.ops.rwkv7.chunked import CHUNK
from timemix.ops.rwkv7.compiled import KERNELS, MOST
from timemix.ops.rwkv7.time_mix import Products, Vectors, supports, time_mix

LEAST_LOG_DECAY = -math.exp(-0.5)
"""Least log-decay: in each token, a channel of the keys keeps at least exp(-exp(-1/2)) = 0.545 of the state."""
MIXED = ("receptance", "decay", "key", "value", "rate", "gate")
"""The vectors of a time-mix, each of which reads its own mixture of a token and the previous token."""


class Recurrence(nn.Module):
    """The recurrence `wkv7` of a time-mix, as a module, so that a hook can read its arguments and its state."""

    def forward(
        self,
        r: Tensor,
        log_decay: Tensor,
        k: Tensor,
        v: Tensor,
        q: Tensor,
        rate: Tensor,
        state: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute `wkv7`, where the state forgets its values along q (B, T, H, N) at the in-context learning rate."""
        return wkv7(r, log_decay, k, v, -q, q * rate, state, lengths=lengths, resets=resets)


class TimeMix(nn.Module):
    """The time-mix of RWKV-7, in the formulas for one token and one head.

        r, k, v = receptance, key and value of mixtures of the token and the previous token
        w = -exp(-1/2) sigmoid(decay)         a = sigmoid(rate)          v = v + sigmoid(residual) (v of layer 0 - v)
        q = normalized(k removal)             k = k (1 + (a - 1) replacement)
        y = wkv7(r, w, k, v, -q, q a)         out = output(gate * (norm(y) + (r . bonus k) v))

    Layer 0 passes its v to the later layers as `carry`.
    """

    def __init__(self, config: Rwkv7Config, layer: int) -> None:
        super().__init__()
        self.config = config
        C, ranks = config.channels, config.ranks
        has_delta = config.uses("delta_rule")
        self.mix = nn.ParameterDict({name: torch.zeros(C) for name in learned(config, MIXED)})
        self.receptance = Linear(C, C, bias=False)
        self.key = Linear(C, C, bias=False)
        self.value = Linear(C, C, bias=False)
        self.output = Linear(C, C, bias=False)
        # A map of rank 0 gives 0, which leaves the bias.
        self.decay = LowRankWithBias(C, ranks["decay"] if config.uses("token_decay") else 0, torch.tanh)
        self.rate = LowRankWithBias(C, ranks["rate"]) if has_delta else None
        self.residual = LowRankWithBias(C, ranks["residual"]) if layer and config.uses("value_residual") else None
        self.gate = LowRank(C, ranks["gate"], torch.sigmoid) if config.uses("gate") else None
        self.removal = nn.Parameter(torch.zeros(C)) if has_delta else None
        self.replacement = nn.Parameter(torch.zeros(C)) if has_delta else None
        self.bonus = nn.Parameter(torch.zeros(config.heads, config.head_size)) if config.uses("bonus") else None
        self.recurrence = Recurrence()
        has_norm = config.uses("head_norm")
        self.norm_weight = nn.Parameter(torch.ones(C)) if has_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(C)) if has_norm else None

    def forward(
        self,
        mixed: dict[str, Tensor],
        wkv: Tensor | None,
        first: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Apply the time-mix.

        Args:
            mixed: Mixtures of each token and the previous token (B, T, C), with the names in `MIXED`.
            wkv: State of `wkv7` (B, H, N, N); None: zeros, and the next state is None.
            first: Values of layer 0 (B, T, C); None in layer 0.
            lengths: Number of valid tokens of each row (B,); None: all tokens are valid.
            resets: Whether to set the state to zero before each token (B, T) bool; None: never.

        Returns:
            Output (B, T, C), the next state of `wkv7`, and the values of layer 0.
        """
        products = Products(
            self.receptance(mixed["receptance"]),
            self.key(mixed["key"]),
            self.value(mixed["value"]),
            self.decay(mixed["decay"]),
            None if self.rate is None else self.rate(mixed["rate"]),
            None if self.residual is None else self.residual(mixed["value"]),
            None if self.gate is None else self.gate(mixed["gate"]),
        )
        if lengths is None and not self.config.without and supports(products.key, self.config.head_size):
            y, wkv = self._in_c(products, wkv, first, resets)
        else:
            y, wkv = self._in_torch(products, wkv, first, lengths, resets)
        out: Tensor = self.output(y.to(mixed["gate"].dtype))
        return out, wkv, wide(products.value) if first is None else first

    def _in_c(
        self, products: Products, wkv: Tensor | None, first: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the input of the output product (B, T, C) and the next state, by ops/rwkv7/time_mix.c."""
        B, H, N = len(products.key), self.config.heads, self.config.head_size
        start = products.key.new_zeros(B, H, N, N, dtype=torch.float32) if wkv is None else wkv
        bias = None if self.residual is None else self.residual.bias
        # A whole model, which has all vectors; a model without an idea runs in PyTorch.
        own: tuple[Any, ...] = (self.removal, self.replacement, self.bonus, self.norm_weight, self.norm_bias)
        vectors = Vectors(self.decay.bias, cast(LowRankWithBias, self.rate).bias, bias, *own)
        y, end = time_mix(products, vectors, first, start, self.config.group_norm_eps, resets)
        return y, None if wkv is None else end

    def _in_torch(
        self,
        products: Products,
        wkv: Tensor | None,
        first: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what `_in_c` computes, with PyTorch."""
        r, k, v = wide(products.receptance), wide(products.key), wide(products.value)
        if first is not None and self.residual is not None and products.residual is not None:
            v = v + (first - v) * self.residual.sigmoid(products.residual)
        w = LEAST_LOG_DECAY * self.decay.sigmoid(products.decay)
        # Without the delta rule, the state forgets nothing along q, whose length is then 0 instead of 1.
        a = q = torch.zeros_like(k)
        if self.rate is not None and self.removal is not None and self.replacement is not None:
            a = self.rate.sigmoid(cast(Tensor, products.rate))
            q = k * broadcast_parameter(self.removal, k)
            k = k * (1 + (a - 1) * broadcast_parameter(self.replacement, k))
        # (B, T, C) -> (B, T, H, N), with unit length over N
        q = F.normalize(self._heads(q), dim=-1, eps=1e-12)
        r, w, k, v, a = (self._heads(each) for each in (r, w, k, v, a))
        y, wkv = self.recurrence(r=r, log_decay=w, k=k, v=v, q=q, rate=a, state=wkv, lengths=lengths, resets=resets)
        y = self._with_bonus(y, r, k, v).flatten(2)
        return y if products.gate is None else y * wide(products.gate), wkv

    def _heads(self, x: Tensor) -> Tensor:
        # (B, T, C) -> (B, T, H, N)
        return x.view(*x.shape[:-1], self.config.heads, self.config.head_size)

    def _with_bonus(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Normalize y (B, T, H, N) over each head, and add the bonus of the current token.

        Without a norm, y is scaled as a sum over N keys.
        """
        if self.norm_weight is None or self.norm_bias is None:
            y = y / math.sqrt(self.config.head_size)
        else:
            y = F.layer_norm(y, y.shape[-1:], eps=self.config.group_norm_eps)
            weight, bias = self._heads(self.norm_weight), self._heads(self.norm_bias)
            y = y * broadcast_parameter(weight, y) + broadcast_parameter(bias, y)
        if self.bonus is None:
            return y
        return y + (r * k * broadcast_parameter(self.bonus, k)).sum(-1, keepdim=True) * v


class ChannelMix(nn.Module):
    """The channel-mix of RWKV-7: value(relu(key(mixture of the token and the previous token))^2)."""

    def __init__(self, config: Rwkv7Config) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(config.channels)) if config.uses("token_shift") else None
        self.key = Linear(config.channels, config.ffn_hidden, bias=False)
        self.value = Linear(config.ffn_hidden, config.channels, bias=False)

    def forward(self, mixed: Tensor) -> Tensor:
        """Map a mixture of each token and the previous token (B, T, C) to (B, T, C)."""
        k = self.key(mixed)
        y: Tensor = self.value(fused.activated(k, "relu2") if fused.serves(k) else relu2(k))
        return y


class Rwkv7Block(Block):
    """A block of time-mix, then channel-mix, with LayerNorm before each sublayer."""

    takes_resets = True

    def __init__(self, config: Rwkv7Config, layer: int) -> None:
        super().__init__(config, layer)
        self.mixer_norm = LayerNorm(config.channels)
        self.ffn_norm = LayerNorm(config.channels)
        self.mixer = TimeMix(config, layer)
        self.ffn = ChannelMix(config)
        self.dropout = nn.Dropout(config.dropout)

    def init_state(self, batch_size: int) -> Tensors:
        config, weight = self.mixer.config, self.mixer_norm.weight
        B, H, N, dtype = batch_size, config.heads, config.head_size, torch.promote_types(weight.dtype, torch.float32)
        rows = weight.new_zeros(B, 1, config.channels, dtype=dtype)
        return {"mixer_shift": rows, "ffn_shift": rows.clone(), "wkv": weight.new_zeros(B, H, N, N, dtype=dtype)}

    def state_parameters(self) -> Tensors:
        return {"wkv": self.init_state(1)["wkv"][0]}

    def forward(
        self,
        x: Tensor,
        state: Tensors | None = None,
        carry: Tensor | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensors | None, Tensor | None]:
        old = state or {}
        mix = shares(self.mixer.mix, MIXED, self.mixer_norm, current=False)
        mixed, mixer_shift = normed_mixtures(self.mixer_norm, x, mix, old.get("mixer_shift"), lengths, resets)
        y, wkv, carry = self.mixer(dict(zip(MIXED, mixed, strict=True)), old.get("wkv"), carry, lengths, resets)
        x = x + self.dropout(y).to(x.dtype)
        ffn_mix = torch.zeros_like(self.ffn_norm.weight) if self.ffn.mix is None else self.ffn.mix
        (y,), ffn_shift = normed_mixtures(self.ffn_norm, x, (ffn_mix,), old.get("ffn_shift"), lengths, resets)
        x = x + self.dropout(self.ffn(y)).to(x.dtype)
        if mixer_shift is None or ffn_shift is None or wkv is None:
            return x, None, carry
        return x, {"mixer_shift": mixer_shift, "ffn_shift": ffn_shift, "wkv": wkv}, carry

    @classmethod
    def input_norm(cls, config: Rwkv7Config) -> nn.Module:
        return LayerNorm(config.channels)

    @classmethod
    def set_initial_values(cls, model: Model) -> None:
        set_initial_values(model)

    @classmethod
    def training_loss(cls, config: Rwkv7Config, loss: Tensor, logits: Tensor) -> Tensor:
        """Return the mean cross-entropy with the gradient of L2Wrap."""
        return l2wrap(loss, logits, config.l2wrap)

    @classmethod
    def recipe(cls, config: Rwkv7Config) -> Recipe:
        """Double the learning rate of the bias of the decay, and apply weight decay to embedding and head too."""
        return Recipe(lr_scale=((".mixer.decay.bias", 2.0),), decay_all_matrices=True, warmup_floor=0.01)

    @classmethod
    def mixing_flops(cls, config: Rwkv7Config) -> int:
        """Count the operations of `wkv7` in chunks of n tokens: 16 n + 10 N + 2 N^2 / n per channel."""
        n, N = min(CHUNK, config.ctx_len), config.head_size
        return config.layers * config.channels * (16 * n + 10 * N + 2 * N * N // n)

    @classmethod
    def kept(cls, config: Rwkv7Config, rows: int) -> Kept:
        """Count the stored numbers. The C code stores the state of every 16 tokens, N / 16 numbers per channel."""
        C, hidden, ranks = config.channels, config.ffn_hidden, sum(config.ranks.values())
        # A model without an idea computes its elementwise operations in PyTorch.
        if config.without or not cls.runs_in_c(config, "float32", torch.device("cpu")):
            return Kept(38 * C + 2 * hidden + ranks, 11 * C + hidden + ranks)
        return Kept(17 * C + C * config.head_size // 16 + 2 * hidden + ranks, 11 * C + hidden + ranks)

    @classmethod
    def runs_in_c(cls, config: Rwkv7Config, precision: str, device: torch.device) -> bool:
        return config.head_size <= MOST and fused.trains(precision, device) and KERNELS.compiles()

    @classmethod
    def forms(cls, config: Rwkv7Config, precision: str, device: torch.device, resets: bool = False) -> dict[str, str]:
        shape = (1, config.ctx_len, config.heads, config.head_size)
        return {"wkv7": chosen(choose_backend, shape, precision, device, resets)}

    def projections(self) -> dict[tuple[str, str], nn.Linear]:
        mixer = self.mixer
        return {
            ("mixer", "receptance"): mixer.receptance,
            ("mixer", "key"): mixer.key,
            ("mixer", "value"): mixer.value,
            ("ffn", "key"): self.ffn.key,
        }

    def recurrence(self) -> nn.Module:
        return self.mixer.recurrence
