"""RWKV-4 (arXiv 2305.13048): a recurrent network whose state is a pair of sums per channel.

    x = x + time_mix(LayerNorm(x)),   x = x + channel_mix(LayerNorm(x))

The state has the same size at every position, so a context has no end. No linear map has a bias. Logits, gradients and
a training run equal those of the original training code (tests/models/test_original_code.py).
"""

import torch
from torch import Tensor, nn

from timemix.models.layers.block import FIRST_WEIGHT, Block, Kept, Model, Recipe, Tensors
from timemix.models.layers.l2wrap import l2wrap
from timemix.models.layers.linear import LayerNorm, Linear
from timemix.models.layers.mixtures import learned, normed_mixtures, shares, wide
from timemix.models.layers.receptance_mix import MIXED as FFN_MIXED
from timemix.models.layers.receptance_mix import ReceptanceChannelMix
from timemix.models.rwkv4.config import Rwkv4Config
from timemix.models.rwkv4.initial import set_initial_values
from timemix.ops.common import fused
from timemix.ops.common.kernels import chosen
from timemix.ops.rwkv4.api import choose_backend, empty_state, wkv4
from timemix.ops.rwkv4.compiled import CHUNK, KERNELS
from timemix.ops.rwkv6.api import choose_backend as choose_wkv6
from timemix.ops.rwkv6.api import wkv6

MIXED = ("key", "value", "receptance")
"""The vectors of a time-mix, each of which reads its own mixture of a token and the previous token."""


def numerator(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    *,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute `wkv4` without its denominator. The arguments are those of `wkv4`.

    The numerator is the recurrence of RWKV-5 with one channel in each head:

        y[t] = S[t-1] + exp(u) exp(k[t]) v[t]            S[t] = exp(w) S[t-1] + exp(k[t]) v[t]

    The state is (S, 1, 0), which is S exp(0) in the form of `wkv4`.
    """
    # (..., C) -> (..., C, 1): C heads of one channel, and (B, C) -> (B, C, 1, 1) for the state.
    before = None if state is None else (state[:, 0] * state[:, 2].exp())[..., None, None]
    r, w, k, v, u = (x[..., None] for x in (torch.ones_like(k), w, k.exp(), v, u.exp()))
    y, S = wkv6(r, w, k, v, u, before, lengths=lengths, resets=resets)
    if S is not None:
        S = S[..., 0, 0]
        state = torch.stack((S, torch.ones_like(S), torch.zeros_like(S)), 1)
    return y[..., 0], state


class TimeMix(nn.Module):
    """The time-mix of RWKV-4, in the formulas for one token.

        k, v, r = key, value and receptance of mixtures of the token and the previous token
        out = output(sigmoid(r) * wkv4(-exp(decay), bonus, k, v))

    As in the original code, `mix` holds the share of the current token in each mixture.
    """

    def __init__(self, config: Rwkv4Config) -> None:
        super().__init__()
        C = config.channels
        self.average = wkv4 if config.uses("denominator") else numerator
        self.mix = nn.ParameterDict({name: torch.zeros(C) for name in learned(config, MIXED)})
        self.decay = nn.Parameter(torch.zeros(C))
        self.bonus = nn.Parameter(torch.zeros(C)) if config.uses("bonus") else None
        self.key = Linear(C, C, bias=False)
        self.value = Linear(C, C, bias=False)
        self.receptance = Linear(C, C, bias=False) if config.uses("receptance") else None
        self.output = Linear(C, C, bias=False)

    def forward(
        self, mixed: dict[str, Tensor], wkv: Tensor | None, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the time-mix.

        Args:
            mixed: Mixtures of each token and the previous token (B, T, C), with the names in `MIXED`.
            wkv: State of `wkv4` (B, 3, C); None: no tokens, and the next state is None.
            lengths: Number of valid tokens of each row (B,); None: all tokens are valid.
            resets: Whether to forget all earlier tokens before each token (B, T) bool; None: never.

        Returns:
            Output (B, T, C), and the next state of `wkv4`.
        """
        k, v = wide(self.key(mixed["key"])), wide(self.value(mixed["value"]))
        bonus = torch.zeros_like(self.decay) if self.bonus is None else self.bonus
        y, wkv = self.average(-wide(self.decay).exp(), bonus, k, v, wkv, lengths=lengths, resets=resets)
        y = y.to(mixed["receptance"].dtype)
        if self.receptance is not None:
            y = self.receptance(mixed["receptance"]).sigmoid() * y
        out: Tensor = self.output(y)
        return out, wkv


class Rwkv4Block(Block):
    """A block of time-mix, then channel-mix, with LayerNorm before each sublayer."""

    gates = (("mixer", "receptance"), ("ffn", "receptance"))
    takes_resets = True

    def __init__(self, config: Rwkv4Config, layer: int) -> None:
        super().__init__(config, layer)
        self.mixer_norm = LayerNorm(config.channels)
        self.ffn_norm = LayerNorm(config.channels)
        self.mixer = TimeMix(config)
        shifted, learned_shift = config.uses("token_shift"), config.uses("learned_shift")
        self.halved = shifted and not learned_shift
        self.ffn = ReceptanceChannelMix(config.channels, config.ffn_hidden, shifted=shifted and learned_shift)
        self.dropout = nn.Dropout(config.dropout)

    def init_state(self, batch_size: int) -> Tensors:
        weight = self.mixer_norm.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rows = weight.new_zeros(batch_size, 1, len(weight), dtype=dtype)
        wkv = empty_state(batch_size, len(weight), dtype, weight.device)
        return {"mixer_shift": rows, "ffn_shift": rows.clone(), "wkv": wkv}

    def state_parameters(self) -> Tensors:
        zeros = self.init_state(1)["mixer_shift"][0, 0]
        return {"value": zeros, "log_weight": zeros + FIRST_WEIGHT}

    def state_of(self, parameters: Tensors) -> Tensors:
        """Compute the state of one token with a learned value and a learned logarithm of its weight.

        The state (a, b, p) stands for the sums a exp(p) and b exp(p), so (a c, b c, p - log c) is the same state. The
        choice b = 1 gives each state of a text by one pair of parameters, and no parameters give a negative sum of
        weights.
        """
        value, log_weight = parameters["value"], parameters["log_weight"]
        return {"wkv": torch.stack((value, torch.ones_like(value), log_weight))}

    def parameters_of(self, state: Tensors, position: int) -> Tensors:
        a, b, p = state["wkv"]
        b = b.clamp_min(torch.finfo(b.dtype).tiny)
        return {"value": a / b, "log_weight": p + b.log()}

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
        mix = shares(self.mixer.mix, MIXED, self.mixer_norm, current=True, halved=self.halved)
        mixed, mixer_shift = normed_mixtures(self.mixer_norm, x, mix, old.get("mixer_shift"), lengths, resets)
        y, wkv = self.mixer(dict(zip(MIXED, mixed, strict=True)), old.get("wkv"), lengths, resets)
        x = x + self.dropout(y).to(x.dtype)
        mix = shares(self.ffn.mix, FFN_MIXED, self.ffn_norm, current=True, halved=self.halved)
        mixed, ffn_shift = normed_mixtures(self.ffn_norm, x, mix, old.get("ffn_shift"), lengths, resets)
        x = x + self.dropout(self.ffn(*mixed)).to(x.dtype)
        if mixer_shift is None or ffn_shift is None or wkv is None:
            return x, None, carry
        return x, {"mixer_shift": mixer_shift, "ffn_shift": ffn_shift, "wkv": wkv}, carry

    @classmethod
    def input_norm(cls, config: Rwkv4Config) -> nn.Module:
        return LayerNorm(config.channels)

    @classmethod
    def set_initial_values(cls, model: Model) -> None:
        set_initial_values(model)

    @classmethod
    def training_loss(cls, config: Rwkv4Config, loss: Tensor, logits: Tensor) -> Tensor:
        """Return the mean cross-entropy with the gradient of L2Wrap."""
        return l2wrap(loss, logits, config.l2wrap)

    @classmethod
    def recipe(cls, config: Rwkv4Config) -> Recipe:
        """Double the learning rate of the decay, triple that of the bonus, and decay embedding and head too."""
        scales = ((".mixer.decay", 2.0), (".mixer.bonus", 3.0))
        return Recipe(lr_scale=scales, decay_all_matrices=True, warmup_floor=0.2)

    @classmethod
    def mixing_flops(cls, config: Rwkv4Config) -> int:
        """Count the operations of `wkv4`: about 20 per channel, with an exponential as one operation."""
        return 20 * config.layers * config.channels

    @classmethod
    def kept(cls, config: Rwkv4Config, rows: int) -> Kept:
        """Count the stored numbers. The C code stores 3 numbers per channel for every 16 tokens."""
        C, hidden = config.channels, config.ffn_hidden
        return Kept(18 * C + 2 * hidden + 3 * C // CHUNK, 6 * C + hidden)

    @classmethod
    def runs_in_c(cls, config: Rwkv4Config, precision: str, device: torch.device) -> bool:
        return fused.trains(precision, device) and KERNELS.compiles()

    @classmethod
    def forms(cls, config: Rwkv4Config, precision: str, device: torch.device, resets: bool = False) -> dict[str, str]:
        shape = (1, config.ctx_len, config.channels)
        if not config.uses("denominator"):
            return {"wkv6": chosen(choose_wkv6, (*shape, 1), precision, device, resets)}
        return {"wkv4": chosen(lambda backend, k, _: choose_backend(backend, k), shape, precision, device, resets)}

    def projections(self) -> dict[tuple[str, str], nn.Linear]:
        found = {("mixer", name): getattr(self.mixer, name) for name in MIXED}
        found |= {("ffn", name): getattr(self.ffn, name) for name in FFN_MIXED}
        return {where: linear for where, linear in found.items() if linear is not None}
