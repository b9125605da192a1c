"""Settings of a model: architecture and size, without importing torch."""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from timemix.errors import UserError, nearest
from timemix.storage.settings import LARGEST_VOCABULARY, check_range

Initial = Literal["zero", "original"]


Recompute = Literal["none", "cheap", "all"]


@dataclass(frozen=True)
class TimeMixConfig:
    """Mixer of `rwkv1`."""

    alpha: bool = True
    """Learn alpha_h(u), the weight of a source position."""
    beta: bool = True
    """Learn beta_h(t), the weight of a target position."""
    gamma: bool = True
    """Learn gamma(t), the output weight of a position."""
    weights: Literal["decomposed", "free"] = "decomposed"
    """decomposed: f_h(t-u) alpha_h(u) beta_h(t); free: one number W_h[t,u] for each pair, as in AFT."""
    denominator: Literal["plain", "weighted"] = "plain"
    """plain: running sum of exp(k); weighted: W = exp(f + alpha + beta) in it too (AFT's form)."""
    backend: Literal["auto", "dense", "blocked", "spectral", "reference"] = "auto"
    """How wkv is computed; auto takes the fastest that serves."""

    def __post_init__(self) -> None:
        if self.weights == "free" and self.backend in ("blocked", "spectral"):
            raise UserError(f"model.mixer.backend {self.backend} needs decomposed weights; free ones take dense")


@dataclass(frozen=True)
class ExpTimeMixConfig:
    """Mixer of `rwkv1_exp`."""

    exponentials: int = 8
    """K: decaying exponentials whose sum is f_h(lag); the state has so many numerators for each channel."""
    taps: int = 0
    """M: lags at which f_h has a number of its own besides."""
    alpha: bool = True
    """Learn alpha_h(u), the weight of a source position."""
    beta: bool = True
    """Learn beta_h(t), the weight of a target position."""
    gamma: bool = True
    """Learn gamma(t), the output weight of a position."""


@dataclass(frozen=True)
class AttentionConfig:
    """Mixer of `mha_rotary` and `mha_shift`."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        _check_rotary_base(self.rotary_base)


@dataclass(frozen=True)
class ProAttentionConfig:
    """Mixer of `mha_pro`."""

    alpha: bool = True
    """Learn alpha_h(u), the weight of a source position."""
    beta: bool = True
    """Learn beta_h(t), the weight of a target position."""
    gamma: bool = True
    """Learn gamma(t), the output weight of a position."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        _check_rotary_base(self.rotary_base)


@dataclass(frozen=True)
class ChannelMixConfig:
    """Feed-forward half of `rwkv1`, `rwkv1_exp` and `mha_pro`."""

    activation: Literal["gelu", "mish", "relu2", "silu"] = "gelu"
    """Activation of the key branch."""


@dataclass(frozen=True)
class GegluConfig:
    """Feed-forward half of `mha_rotary` and `mha_shift`."""

    activation: Literal["gelu", "mish", "relu2", "silu"] = "gelu"
    """Activation of the gating branch."""


MixerConfig = TimeMixConfig | ExpTimeMixConfig | AttentionConfig | ProAttentionConfig
FfnConfig = ChannelMixConfig | GegluConfig


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and size."""

    arch: str = "rwkv1"
    """Architecture: rwkv1, rwkv1_exp, mha_rotary, mha_shift or mha_pro."""
    vocab_size: int = 256
    """Entries of the vocabulary; training sets it from the tokenizer."""
    ctx_len: int = 64
    """Context length in tokens."""
    layers: int = 4
    """Number of blocks."""
    heads: int = 4
    """Number of heads; divides channels."""
    channels: int = 128
    """Width of the model."""
    ffn_ratio: float = 3.0
    """Hidden size of the feed-forward half, as a multiple of channels."""
    token_shift: tuple[float, ...] = (0.5,)
    """Fractions of the channels taken from 1, 2, 3 ... tokens back."""
    token_shift_top: tuple[float, ...] | None = None
    """The same for the last layer, interpolated over the layers between; None: as token_shift."""
    dropout: float = 0.0
    """Dropout of the embedding and of the output of each half of a block."""
    initial: Initial = "zero"
    """Initial values: `original` (2021) or `zero` (late 2021: every block starts as the identity)."""
    mixer: MixerConfig = field(default_factory=TimeMixConfig)
    ffn: FfnConfig = field(default_factory=ChannelMixConfig)

    def __post_init__(self) -> None:
        if self.arch not in _ARCHITECTURE_PARTS:
            raise UserError(f"unknown architecture {self.arch!r}{nearest(self.arch, _ARCHITECTURE_PARTS)}")
        mixer, ffn = _ARCHITECTURE_PARTS[self.arch]
        if type(self.mixer) is not mixer or type(self.ffn) is not ffn:
            raise UserError(f"architecture {self.arch} takes {mixer.__name__} and {ffn.__name__}")
        for name, most in LARGEST_MODEL.items():
            check_range(f"model.{name}", getattr(self, name), 1, most)
        if self.channels % self.heads:
            divisors = [h for h in range(1, self.channels + 1) if self.channels % h == 0]
            close = min(divisors, key=lambda h: abs(h - self.heads))
            raise UserError(
                f"model.heads {self.heads} does not divide model.channels {self.channels};"
                f" the nearest that does is {close}"
            )
        if isinstance(self.mixer, ExpTimeMixConfig):
            check_range("model.mixer.exponentials", self.mixer.exponentials, 1, self.ctx_len)
            check_range("model.mixer.taps", self.mixer.taps, 0, self.ctx_len)
        if not 0 < self.ffn_ratio <= 1000 or self.ffn_hidden < 1:
            raise UserError(f"model.ffn_ratio {self.ffn_ratio} gives the feed-forward half no sensible size")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout {self.dropout} is not in [0, 1)")
        for name in ("token_shift", "token_shift_top"):
            fractions = getattr(self, name) or ()
            if len(fractions) > MOST_FRACTIONS:
                raise UserError(f"model.{name} has {len(fractions)} fractions; it may have {MOST_FRACTIONS}")
            if any(not 0 <= x <= 1 for x in fractions) or sum(fractions) > 1 + 1e-9:
                raise UserError(f"model.{name} {list(fractions)}: fractions lie in [0, 1] and sum to at most 1")

    @staticmethod
    def narrowed(data: dict[str, Any]) -> dict[str, Any]:
        """Types of the fields that depend on the architecture which `data` names."""
        arch = data.get("arch", "rwkv1")
        if not isinstance(arch, str) or arch not in _ARCHITECTURE_PARTS:
            raise UserError(f"unknown architecture {arch!r}{nearest(str(arch), ARCHITECTURES)}")
        mixer, ffn = _ARCHITECTURE_PARTS[arch]
        return {"mixer": mixer, "ffn": ffn}

    @property
    def head_size(self) -> int:
        return self.channels // self.heads

    @property
    def ffn_hidden(self) -> int:
        return int(self.ffn_ratio * self.channels)


_ARCHITECTURE_PARTS: dict[str, tuple[type[MixerConfig], type[FfnConfig]]] = {
    "rwkv1": (TimeMixConfig, ChannelMixConfig),
    "rwkv1_exp": (ExpTimeMixConfig, ChannelMixConfig),
    "mha_rotary": (AttentionConfig, GegluConfig),
    "mha_shift": (AttentionConfig, GegluConfig),
    "mha_pro": (ProAttentionConfig, ChannelMixConfig),
}
ARCHITECTURES = tuple(_ARCHITECTURE_PARTS)
ENDLESS = ("rwkv1_exp",)
"""Architectures whose context has no end: their state has one size at any position."""

# Far above what this program serves; what a damaged file asks for is refused before it is tried.
LARGEST_MODEL = {"vocab_size": LARGEST_VOCABULARY, "ctx_len": 2**20, "layers": 1000, "heads": 2**16, "channels": 2**16}
MOST_FRACTIONS = 1000


def architecture(arch: str, **fields: Any) -> ModelConfig:
    """Model config of an architecture with its own defaults, `fields` over them.

    Raises UserError for an unknown architecture or a value out of range.
    """
    if arch not in _ARCHITECTURE_PARTS:
        raise UserError(f"unknown architecture {arch!r}{nearest(arch, ARCHITECTURES)}")
    mixer, ffn = _ARCHITECTURE_PARTS[arch]
    own: dict[str, Any] = {"arch": arch, "mixer": mixer(), "ffn": ffn()}
    if not arch.startswith("rwkv1"):
        own["initial"] = "original"
    if arch == "mha_rotary":
        own["token_shift"] = ()
    return ModelConfig(**(own | fields))


def _check_rotary_base(base: float) -> None:
    if not 0 < base <= sys.float_info.max:
        raise UserError(f"model.mixer.rotary_base is {base}; it must be above 0, and finite")
