"""Time-mix with learned tables over lags (RWKV-LM 0.01, doi 10.5281/zenodo.5196577)."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.config import ModelConfig, ShiftedConfig
from timemix.models.layers.linear import Linear, are_plain, joint_linear, side_by_side
from timemix.models.layers.tables import time_gamma, time_table, times_gamma
from timemix.models.rwkv1.config import Rwkv1Config, Rwkv1ExpConfig
from timemix.ops.common import fused
from timemix.ops.rwkv1.api import gated_wkv1, wkv1
from timemix.ops.rwkv1.parallel import MIXES
from timemix.ops.rwkv1.state import Wkv1State, wkv1_state


def fusible(config: ModelConfig) -> bool:
    """Return whether the C kernels can compute a time-mix with these settings, except for the matrix products."""
    if isinstance(config, Rwkv1Config):
        return config.denominator == "plain" and config.backend in ("auto", *MIXES)
    return isinstance(config, Rwkv1ExpConfig)


class Projections(Protocol):
    """The linear maps and tables that both time-mix classes have."""

    @property
    def config(self) -> ShiftedConfig: ...

    key: Linear
    value: Linear
    receptance: Linear
    output: Linear
    alpha: nn.Parameter | None
    beta: nn.Parameter | None
    gamma: nn.Parameter | None


def is_plain(mixer: Projections) -> bool:
    """Return whether `fused_time_mix` computes a time-mix, because its linear maps have no adapters."""
    return are_plain(mixer.key, mixer.value, mixer.receptance, mixer.output)


def fused_time_mix(mixer: Projections, x: Tensor, f: Tensor, backend: str = "auto") -> Tensor:
    """Compute a time-mix from position 0 with the C kernels of `ops.common.fused`.

    Args:
        mixer: The time-mix.
        x: Input (B, T, C) in float32 or bfloat16.
        f: Weights by lag or by pair of positions, as in `wkv1`.
        backend: Backend, as in `wkv1`.

    Returns:
        Output (B, T, C).
    """
    weight, bias = side_by_side(mixer.key, mixer.value, mixer.receptance)
    # (B, T, C) -> (B, T, 3 C)
    kvr = F.linear(x, weight.to(x.dtype))
    y = gated_wkv1(kvr, bias, f, mixer.alpha, mixer.beta, mixer.config.heads, backend=backend)
    if mixer.gamma is None:
        result: Tensor = mixer.output(y)
        return result
    return fused.scaled(F.linear(y, mixer.output.weight), mixer.output.bias, mixer.gamma)


class TimeMix(nn.Module):
    """The time-mix gamma(t) * output(sigmoid(receptance) * wkv1(key, value)).

    The state holds the tensors of `ops.rwkv1.Wkv1State` without the position.
    """

    def __init__(self, config: Rwkv1Config) -> None:
        super().__init__()
        self.config = config
        C = config.channels
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.receptance = Linear(C, C)
        self.output = Linear(C, C)
        # A free W includes alpha and beta. With a weighted denominator, beta cancels between numerator and denominator.
        free = config.weights == "free"
        self.f = nn.Parameter(torch.ones(config.heads, *[config.ctx_len] * (2 if free else 1)))
        self.alpha = time_table(config, config.alpha and not free)
        self.beta = time_table(config, config.beta and not free and config.denominator == "plain")
        self.gamma = time_gamma(config, config.gamma)

    def init_state(self, batch_size: int) -> dict[str, Tensor]:
        """Create the state before the first token, for B rows."""
        config = self.config
        state = wkv1_state(
            batch_size,
            config.heads,
            config.head_size,
            config.ctx_len,
            denominator=config.denominator,
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
        """Map x (B, T, C) to (B, T, C), and return the next state. `Block.forward` documents the arguments."""
        config = self.config
        if state is None and fusible(config) and fused.serves(x) and is_plain(self):
            return fused_time_mix(self, x, self.f, config.backend), None
        # (B, T, H, N)
        heads = (*x.shape[:2], config.heads, config.head_size)
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
            denominator=config.denominator,
            backend=config.backend,
        )
        y = self.output(r.sigmoid() * y.flatten(2))
        y = times_gamma(y, self.gamma, position)
        if past is None:
            return y, None
        return y, {"numerators": past.numerators, "denominators": past.denominators}
