"""The two halves of an rwkv1 block: time-mix and channel-mix (RWKV-LM 0.01, doi 10.5281/zenodo.5196577)."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.config import ExpTimeMixConfig, ModelConfig, TimeMixConfig
from timemix.models.layers.linear import Linear, joint_linear, side_by_side
from timemix.models.layers.tables import time_gamma, time_table, times_gamma
from timemix.ops.common import fused
from timemix.ops.rwkv1.api import MIXES, Wkv1State, gated_wkv1, wkv1, wkv1_state


def fusible(config: ModelConfig) -> bool:
    """Whether a model is one whose halves `ops.fused` has whole."""
    mixer = config.mixer
    if isinstance(mixer, TimeMixConfig):
        return mixer.denominator == "plain" and mixer.backend in ("auto", *MIXES)
    return isinstance(mixer, ExpTimeMixConfig)


def in_c(config: ModelConfig, precision: str, device: torch.device) -> bool:
    """Whether `ops.fused` does all of a training step but its products."""
    return precision in ("float32", "bfloat16") and device.type == "cpu" and fusible(config) and fused.available()


class Projections(Protocol):
    """The linear maps and tables that a time-mix of either kind has."""

    config: ModelConfig
    key: Linear
    value: Linear
    receptance: Linear
    output: Linear
    alpha: nn.Parameter | None
    beta: nn.Parameter | None
    gamma: nn.Parameter | None


def fused_time_mix(mixer: Projections, x: Tensor, f: Tensor, backend: str = "auto") -> Tensor:
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
