"""Settings of the attention baselines of 2021: `mha_rotary`, `mha_shift`, `mha_pro`."""

from dataclasses import dataclass
from typing import ClassVar

from timemix.models.config import Initial, ShiftedConfig, check_positive


@dataclass(frozen=True)
class RotaryConfig(ShiftedConfig):
    """Settings of the architecture `mha_rotary`: rotary attention with GeGLU."""

    arch: str = "mha_rotary"
    token_shift: tuple[float, ...] = ()
    initial: Initial = "original"
    rotary_base: float = 10000.0
    """Base of the rotary frequencies, above 0."""

    version_1: ClassVar = {"mixer": ("AttentionConfig", ("rotary_base",)), "ffn": ("GegluConfig", ("activation",))}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rotary_base", self.rotary_base)


@dataclass(frozen=True)
class RotaryShiftConfig(RotaryConfig):
    """Settings of the architecture `mha_shift`: `mha_rotary` with token-shift."""

    arch: str = "mha_shift"
    token_shift: tuple[float, ...] = (0.5,)


@dataclass(frozen=True)
class ProConfig(ShiftedConfig):
    """Settings of the architecture `mha_pro`: attention times W, talking heads, token-shift, channel-mix."""

    arch: str = "mha_pro"
    initial: Initial = "original"
    alpha: bool = True
    """Learned weight alpha_h(u) of each source position u."""
    beta: bool = True
    """Learned weight beta_h(t) of each target position t."""
    gamma: bool = True
    """Learned weight gamma(t) of the output at each position t."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies, above 0."""

    version_1: ClassVar = {
        "mixer": ("ProAttentionConfig", ("alpha", "beta", "gamma", "rotary_base")),
        "ffn": ("ChannelMixConfig", ("activation",)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rotary_base", self.rotary_base)
