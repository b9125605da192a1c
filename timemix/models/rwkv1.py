"""The two halves of an rwkv1 block: time-mix and channel-mix (RWKV-LM 0.01, doi 10.5281/zenodo.5196577)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.config import ChannelMixConfig, ExpTimeMixConfig, ModelConfig, TimeMixConfig
from timemix.models.activations import ACTIVATIONS
from timemix.models.linear import Linear, joint_linear, side_by_side
from timemix.ops import Wkv1State, fused, wkv1, wkv1_state
from timemix.ops.spread import broadcast_parameter
from timemix.ops.wkv1 import MIXES, gated_wkv1

if TYPE_CHECKING:
    from timemix.models.rwkv1_exp import ExpTimeMix


def time_table(config: ModelConfig, learned: bool) -> nn.Parameter | None:
    """Table (H, ctx_len) of ones, or None for one that is left out."""
    return nn.Parameter(torch.ones(config.heads, config.ctx_len)) if learned else None


def time_gamma(config: ModelConfig, learned: bool) -> nn.Parameter | None:
    """Output weight of each position (ctx_len,), or None where it is left out."""
    return nn.Parameter(torch.ones(config.ctx_len)) if learned else None


def times_gamma(x: Tensor, gamma: Tensor | None, position: Tensor | None) -> Tensor:
    """x (B, T, C) times gamma at each row's positions; `position` None: all rows start at 0."""
    if gamma is None:
        return x
    T = x.shape[1]
    if position is None:
        return x * broadcast_parameter(gamma[:T, None], x)
    gamma = gamma.to(x.dtype)
    target = position[:, None] + torch.arange(T, device=x.device)
    return x * gamma[target.clamp(max=len(gamma) - 1)][:, :, None]


def fusible(config: ModelConfig) -> bool:
    """Whether a model is one whose halves `ops.fused` has whole."""
    mixer = config.mixer
    if isinstance(mixer, TimeMixConfig):
        return mixer.denominator == "plain" and mixer.backend in ("auto", *MIXES)
    return isinstance(mixer, ExpTimeMixConfig)


def in_c(config: ModelConfig, precision: str, device: torch.device) -> bool:
    """Whether `ops.fused` does all of a training step but its products."""
    return precision in ("float32", "bfloat16") and device.type == "cpu" and fusible(config) and fused.available()


def fused_time_mix(mixer: "TimeMix | ExpTimeMix", x: Tensor, f: Tensor, backend: str = "auto") -> Tensor:
    """What a time-mix does from the first position on, where `ops.fused` serves; f as `wkv1` takes it."""
    weight, bias = side_by_side(mixer.key, mixer.value, mixer.receptance)
    kvr = F.linear(x, weight.to(x.dtype))
    y = gated_wkv1(kvr, bias, f, mixer.alpha, mixer.beta, mixer.config.heads, backend=backend)
    if mixer.gamma is None:
        return mixer.output(y)
    return fused.scaled(F.linear(y, mixer.output.weight), mixer.output.bias, mixer.gamma)


class TimeMix(nn.Module):
    """gamma(t) * output(sigmoid(receptance) * wkv(key, value)).

    State: the tensors of `ops.Wkv1State` without the position.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.mixer, TimeMixConfig)
        self.config, self.mixer = config, config.mixer
        C = config.channels
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.receptance = Linear(C, C)
        self.output = Linear(C, C)
        # A free W holds alpha and beta already; in the weighted form beta cancels between numerator and denominator.
        free = self.mixer.weights == "free"
        self.f = nn.Parameter(torch.ones(config.heads, *[config.ctx_len] * (2 if free else 1)))
        self.alpha = time_table(config, self.mixer.alpha and not free)
        self.beta = time_table(config, self.mixer.beta and not free and self.mixer.denominator == "plain")
        self.gamma = time_gamma(config, self.mixer.gamma)

    def init_state(self, batch_size: int) -> dict[str, Tensor]:
        config = self.config
        state = wkv1_state(
            batch_size,
            config.heads,
            config.head_size,
            config.ctx_len,
            denominator=self.mixer.denominator,
            dtype=torch.promote_types(self.f.dtype, torch.float32),
            device=self.f.device,
        )
        return {"numerators": state.numerators, "denominators": state.denominators}

    def forward(
        self,
        x: Tensor,
        state: dict[str, Tensor] | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """x (B, T, C) to (B, T, C) and the next state."""
        if state is None and fusible(self.config) and fused.serves(x):
            return fused_time_mix(self, x, self.f, self.mixer.backend), None
        heads = (*x.shape[:2], self.config.heads, self.config.head_size)
        past = None
        if state is not None and position is not None:
            past = Wkv1State(state["numerators"], state["denominators"], position)
        k, v, r = joint_linear(x, self.key, self.value, self.receptance)
        y, past = wkv1(
            k.view(heads),
            v.view(heads),
            self.f,
            self.alpha,
            self.beta,
            past,
            lengths=lengths,
            denominator=self.mixer.denominator,
            backend=self.mixer.backend,
        )
        y = self.output(r.sigmoid() * y.flatten(2))
        y = times_gamma(y, self.gamma, position)
        if past is None:
            return y, None
        return y, {"numerators": past.numerators, "denominators": past.denominators}


class ChannelMix(nn.Module):
    """sigmoid(receptance) * output(act(key) * value)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.ffn, ChannelMixConfig)
        self.activation = config.ffn.activation
        C, hidden = config.channels, config.ffn_hidden
        self.key = Linear(C, hidden)
        self.value = Linear(C, hidden)
        self.output = Linear(hidden, C)
        self.receptance = Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) to (B, T, C)."""
        if fused.serves(x):
            weight, bias = side_by_side(self.key, self.value, self.receptance)
            hidden, gate = fused.gates(F.linear(x, weight.to(x.dtype)), bias, x.shape[-1], self.activation)
            return fused.scaled(F.linear(hidden, self.output.weight), self.output.bias, gate)
        k, v, r = joint_linear(x, self.key, self.value, self.receptance)
        return r.sigmoid() * self.output(ACTIVATIONS[self.activation](k) * v)
