"""Settings of the attention baselines of 2021: `mha_rotary`, `mha_shift`, `mha_pro`."""

from dataclasses import dataclass
from typing import ClassVar

from timemix.models.config import Initial, ShiftedConfig, check_positive


@dataclass(frozen=True)
class RotaryConfig(ShiftedConfig):
    """Architecture and size of `mha_rotary`: rotary attention with GeGLU."""

    arch: str = "mha_rotary"
    """Architecture, on which the other options of the model depend."""
    token_shift: tuple[float, ...] = ()
    """Fractions of the channels that come from 1, 2, 3 ... tokens back."""
    initial: Initial = "original"
    """Initial values: `original` (2021) or `zero` (late 2021: every block starts as the identity)."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    version_1: ClassVar = {"mixer": ("AttentionConfig", ("rotary_base",)), "ffn": ("GegluConfig", ("activation",))}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rotary_base", self.rotary_base)


@dataclass(frozen=True)
class RotaryShiftConfig(RotaryConfig):
    """Architecture and size of `mha_shift`: `mha_rotary` with token-shift."""

    arch: str = "mha_shift"
    """Architecture, on which the other options of the model depend."""
    token_shift: tuple[float, ...] = (0.5,)
    """Fractions of the channels that come from 1, 2, 3 ... tokens back."""


@dataclass(frozen=True)
class ProConfig(ShiftedConfig):
    """Architecture and size of `mha_pro`: attention times W, talking heads, token-shift, channel-mix."""

    arch: str = "mha_pro"
    """Architecture, on which the other options of the model depend."""
    initial: Initial = "original"
    """Initial values: `original` (2021) or `zero` (late 2021: every block starts as the identity)."""
    alpha: bool = True
    """Learned alpha_h(u), weight of a source position."""
    beta: bool = True
    """Learned beta_h(t), weight of a target position."""
    gamma: bool = True
    """Learned gamma(t), output weight of a position."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    version_1: ClassVar = {
        "mixer": ("ProAttentionConfig", ("alpha", "beta", "gamma", "rotary_base")),
        "ffn": ("ChannelMixConfig", ("activation",)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rotary_base", self.rotary_base)
