"""RWKV-5.2 and RWKV-6 (arXiv 2404.05892): recurrent networks whose state is one matrix per head.

    x = x + time_mix(LayerNorm(x)),   x = x + channel_mix(LayerNorm(x))

The state has the same size at every position, so a context has no end. No linear map has a bias. Logits, gradients and
a training run equal those of the original training code (tests/models/test_original_code.py).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.layers.block import Block, Kept, Model, Recipe, Tensors
from timemix.models.layers.l2wrap import l2wrap
from timemix.models.layers.linear import LayerNorm, Linear, to_product_dtype
from timemix.models.layers.low_rank import LowRank, LowRankWithBias
from timemix.models.layers.mixtures import interpolated, learned, normed_mixtures, shares, wide
from timemix.models.layers.receptance_mix import MIXED as FFN_MIXED
from timemix.models.layers.receptance_mix import ReceptanceChannelMix
from timemix.models.layers.token_shift import previous_token
from timemix.models.rwkv6.config import Rwkv5Config, Rwkv6Config
from timemix.models.rwkv6.initial import set_initial_values
from timemix.ops.common import fused
from timemix.ops.common.kernels import chosen
from timemix.ops.common.spread import broadcast_parameter
from timemix.ops.rwkv6.api import choose_backend, wkv6
from timemix.ops.rwkv6.compiled import KERNELS, MOST

MIXED_5 = ("key", "value", "receptance", "gate")
"""The vectors of a time-mix of RWKV-5, each of which reads its own mixture of a token and the previous token."""
MIXED_6 = ("decay", "key", "value", "receptance", "gate")
"""The vectors of a time-mix of RWKV-6, in the order of the original low-rank map."""


class Recurrence(nn.Module):
    """The recurrence `wkv6` of a time-mix, as a module, so that a hook can read its arguments and its state."""

    def forward(
        self,
        r: Tensor,
        log_decay: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        lengths: Tensor | None,
        bonus: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute `wkv6`. Without a bonus (H, N), the current token has the weight 1."""
        bonus = r.new_ones(r.shape[2:]) if bonus is None else wide(bonus)
        return wkv6(r, log_decay, k, v, bonus, state, lengths=lengths, resets=resets)


class TimeMix(nn.Module):
    """The part of the time-mix that RWKV-5 and RWKV-6 share, in the formulas for one token and one head.

    k, v, r = key, value and receptance of mixtures of the token and the previous token
    y = wkv6(r, log-decay, k, v, bonus)          out = output(silu(gate) * norm(y))
    """

    def __init__(self, config: Rwkv5Config, mixed: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        C = config.channels
        self.mix = nn.ParameterDict({name: torch.zeros(C) for name in learned(config, mixed)})
        self.receptance = Linear(C, C, bias=False)
        self.key = Linear(C, C, bias=False)
        self.value = Linear(C, C, bias=False)
        self.gate = Linear(C, C, bias=False) if config.uses("gate") else None
        self.output = Linear(C, C, bias=False)
        self.bonus = nn.Parameter(torch.zeros(config.heads, config.head_size)) if config.uses("bonus") else None
        self.recurrence = Recurrence()
        has_norm = config.uses("head_norm")
        self.norm_weight = nn.Parameter(torch.ones(C)) if has_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(C)) if has_norm else None

    def mixtures(
        self, norm: LayerNorm, x: Tensor, state: Tensor | None, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the mixtures (B, T, C) of each token and the previous token by name, and the next state of the shift.

        Args:
            norm: LayerNorm of the sublayer.
            x: Input of the sublayer (B, T, C).
            state: Normalized token before x (B, 1, C); None: zeros, and the next state is None.
            lengths: Number of valid tokens of each row (B,); None: all tokens are valid.
            resets: Whether the previous token of each token is zero (B, T) bool; None: never.
        """
        raise NotImplementedError

    def log_decay(self, mixed: dict[str, Tensor]) -> Tensor:
        """Return the log-decay (H, N) of all tokens, or (B, T, H, N) of each token."""
        raise NotImplementedError

    def forward(
        self, mixed: dict[str, Tensor], wkv: Tensor | None, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the time-mix.

        Args:
            mixed: Mixtures of each token and the previous token (B, T, C) by name.
            wkv: State of `wkv6` (B, H, keys N, values N); None: zeros, and the next state is None.
            lengths: Number of valid tokens of each row (B,); None: all tokens are valid.
            resets: Whether to set the state to zero before each token (B, T) bool; None: never.

        Returns:
            Output (B, T, C), and the next state of `wkv6`.
        """
        # (B, T, C) -> (B, T, H, N)
        r, k, v = (self.heads(wide(getattr(self, name)(mixed[name]))) for name in ("receptance", "key", "value"))
        w = self.log_decay(mixed)
        y, wkv = self.recurrence(
            r=r, log_decay=w, k=k, v=v, state=wkv, lengths=lengths, bonus=self.bonus, resets=resets
        )
        y = self.normalized(y).flatten(2)
        if self.gate is not None:
            y = y * F.silu(wide(self.gate(mixed["gate"])))
        out: Tensor = self.output(y.to(mixed["gate"].dtype))
        return out, wkv

    def normalized(self, y: Tensor) -> Tensor:
        """Normalize y (B, T, H, N) over each head. Without a norm, scale y as a sum over N keys."""
        if self.norm_weight is None or self.norm_bias is None:
            return y / math.sqrt(self.config.head_size)
        y = F.layer_norm(y, y.shape[-1:], eps=self.config.group_norm_eps)
        weight, bias = self.heads(self.norm_weight), self.heads(self.norm_bias)
        return y * broadcast_parameter(weight, y) + broadcast_parameter(bias, y)

    def heads(self, x: Tensor) -> Tensor:
        """View x (..., C) as (..., H, N)."""
        return x.view(*x.shape[:-1], self.config.heads, self.config.head_size)


class TimeMix5(TimeMix):
    """The time-mix of RWKV-5.2, with the log-decay -exp(decay). `mix` holds the share of the current token."""

    def __init__(self, config: Rwkv5Config) -> None:
        super().__init__(config, MIXED_5)
        self.decay = nn.Parameter(torch.zeros(config.heads, config.head_size))

    def mixtures(
        self, norm: LayerNorm, x: Tensor, state: Tensor | None, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        mix = shares(self.mix, MIXED_5, norm, current=True)
        mixed, state = normed_mixtures(norm, x, mix, state, lengths, resets)
        return dict(zip(MIXED_5, mixed, strict=True)), state

    def log_decay(self, mixed: dict[str, Tensor]) -> Tensor:
        return -wide(self.decay).exp()


class TimeMix6(TimeMix):
    """The time-mix of RWKV-6, whose mixtures and decays depend on the token. x' is the token before x.

        mixture_c = x + (x' - x) (mix_c + tanh((x + (x' - x) first_mix) down_c) up_c)
        log-decay = -exp(decay of the mixture)

    `mix` and `first_mix` hold shares of the previous token.
    """

    def __init__(self, config: Rwkv6Config) -> None:
        super().__init__(config, MIXED_6)
        C, R = config.channels, config.mixture_rank
        mapped = learned(config, MIXED_6) if config.uses("token_mixtures") else ()
        self.first_mix = nn.Parameter(torch.zeros(C)) if mapped else None
        self.mix_maps = nn.ModuleDict({name: LowRank(C, R, torch.tanh) for name in mapped})
        # A map of rank 0 gives 0, which leaves the bias.
        self.decay = LowRankWithBias(C, config.decay_rank if config.uses("token_decay") else 0, torch.tanh)

    def mixtures(
        self, norm: LayerNorm, x: Tensor, state: Tensor | None, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        if self.first_mix is None:
            mix = shares(self.mix, MIXED_6, norm, current=False)
            plain, state = normed_mixtures(norm, x, mix, state, lengths, resets)
            return dict(zip(MIXED_6, plain, strict=True)), state
        z = norm(x)
        previous, state = previous_token(z, state, lengths, resets)
        first = interpolated(z, previous, self.first_mix)
        mixed = dict.fromkeys(MIXED_6, to_product_dtype(z))
        for name, low_rank in self.mix_maps.items():
            own = wide(low_rank(first))
            share = broadcast_parameter(self.mix[name], own) + own
            mixed[name] = to_product_dtype((z + (previous - z) * share).to(z.dtype))
        return mixed, state

    def log_decay(self, mixed: dict[str, Tensor]) -> Tensor:
        product = wide(self.decay(mixed["decay"]))
        return self.heads(-(product + broadcast_parameter(self.decay.bias, product)).exp())


class Rwkv5Block(Block):
    """A block of time-mix, then channel-mix, with LayerNorm before each sublayer."""

    gates = (("ffn", "receptance"),)
    takes_resets = True

    def __init__(self, config: Rwkv5Config, layer: int) -> None:
        super().__init__(config, layer)
        self.mixer_norm = LayerNorm(config.channels)
        self.ffn_norm = LayerNorm(config.channels)
        self.mixer = self.time_mix(config)
        self.ffn = ReceptanceChannelMix(config.channels, config.ffn_hidden, shifted=config.uses("token_shift"))
        self.dropout = nn.Dropout(config.dropout)

    @classmethod
    def time_mix(cls, config: Rwkv5Config) -> TimeMix:
        """Create the time-mix."""
        return TimeMix5(config)

    def previous_shares(self) -> tuple[Tensor, ...]:
        """Return the shares of the previous token (C,) in the two mixtures of the channel-mix."""
        return shares(self.ffn.mix, FFN_MIXED, self.ffn_norm, current=True)

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
        mixed, mixer_shift = self.mixer.mixtures(self.mixer_norm, x, old.get("mixer_shift"), lengths, resets)
        y, wkv = self.mixer(mixed, old.get("wkv"), lengths, resets)
        x = x + self.dropout(y).to(x.dtype)
        mix = self.previous_shares()
        both, ffn_shift = normed_mixtures(self.ffn_norm, x, mix, old.get("ffn_shift"), lengths, resets)
        x = x + self.dropout(self.ffn(*both)).to(x.dtype)
        if mixer_shift is None or ffn_shift is None or wkv is None:
            return x, None, carry
        return x, {"mixer_shift": mixer_shift, "ffn_shift": ffn_shift, "wkv": wkv}, carry

    @classmethod
    def input_norm(cls, config: Rwkv5Config) -> nn.Module:
        return LayerNorm(config.channels)

    @classmethod
    def set_initial_values(cls, model: Model) -> None:
        set_initial_values(model)

    @classmethod
    def training_loss(cls, config: Rwkv5Config, loss: Tensor, logits: Tensor) -> Tensor:
        """Return the mean cross-entropy with the gradient of L2Wrap."""
        return l2wrap(loss, logits, config.l2wrap)

    @classmethod
    def recipe(cls, config: Rwkv5Config) -> Recipe:
        """Double the learning rate of the decay, and apply weight decay to embedding and head too."""
        scales = ((".mixer.decay", 2.0), (".mixer.decay.bias", 2.0))
        return Recipe(lr_scale=scales, decay_all_matrices=True, warmup_floor=0.01)

    @classmethod
    def mixing_flops(cls, config: Rwkv5Config) -> int:
        """Count the operations of `wkv6` token by token: about 7 N per channel."""
        return 7 * config.layers * config.channels * config.head_size

    @classmethod
    def kept(cls, config: Rwkv5Config, rows: int) -> Kept:
        """Count the stored numbers. The C code stores the state of every 16 tokens, N / 16 numbers per channel."""
        C, hidden = config.channels, config.ffn_hidden
        return Kept(23 * C + 2 * hidden + C * config.head_size // 16, 7 * C + hidden)

    @classmethod
    def runs_in_c(cls, config: Rwkv5Config, precision: str, device: torch.device) -> bool:
        return config.head_size <= MOST and fused.trains(precision, device) and KERNELS.compiles()

    @classmethod
    def forms(cls, config: Rwkv5Config, precision: str, device: torch.device, resets: bool = False) -> dict[str, str]:
        shape = (1, config.ctx_len, config.heads, config.head_size)
        return {"wkv6": chosen(choose_backend, shape, precision, device, resets)}

    def projections(self) -> dict[tuple[str, str], nn.Linear]:
        found = {("mixer", name): getattr(self.mixer, name) for name in ("receptance", "key", "value", "gate")}
        found |= {("ffn", name): getattr(self.ffn, name) for name in FFN_MIXED}
        return {where: linear for where, linear in found.items() if linear is not None}

    def recurrence(self) -> nn.Module:
        return self.mixer.recurrence


class Rwkv6Block(Rwkv5Block):
    """A block of RWKV-6. As in the original code, `mix` holds shares of the previous token."""

    @classmethod
    def time_mix(cls, config: Rwkv5Config) -> TimeMix:
        assert isinstance(config, Rwkv6Config)
        return TimeMix6(config)

    def previous_shares(self) -> tuple[Tensor, ...]:
        return shares(self.ffn.mix, FFN_MIXED, self.ffn_norm, current=False)

    @classmethod
    def kept(cls, config: Rwkv5Config, rows: int) -> Kept:
        assert isinstance(config, Rwkv6Config)
        low_rank = len(MIXED_6) * config.mixture_rank + config.decay_rank
        base = super().kept(config, rows)
        return Kept(base.block + 13 * config.channels + low_rank, base.products + 6 * config.channels + low_rank)
