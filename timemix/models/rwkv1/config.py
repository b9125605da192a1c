"""Settings of the 2021 RWKV, with tables over lags (`rwkv1`) or with sums of exponentials (`rwkv1_exp`)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from timemix.errors import InvalidValue
from timemix.models.config import ShiftedConfig
from timemix.storage.settings import check_range


@dataclass(frozen=True)
class Rwkv1Config(ShiftedConfig):
    """Architecture and size of `rwkv1`."""

    arch: str = "rwkv1"
    """Architecture; the options below depend on it."""
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
    """Form in which wkv is computed; auto takes the fastest for the context length."""

    version_1: ClassVar = {
        "mixer": ("TimeMixConfig", ("alpha", "beta", "gamma", "weights", "denominator", "backend")),
        "ffn": ("ChannelMixConfig", ("activation",)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == "free" and self.backend in ("blocked", "spectral"):
            raise InvalidValue(f"model.backend={self.backend!r} needs decomposed weights; free ones take dense")


@dataclass(frozen=True)
class Rwkv1ExpConfig(ShiftedConfig):
    """Architecture and size of `rwkv1_exp`."""

    arch: str = "rwkv1_exp"
    """Architecture; the options below depend on it."""
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

    version_1: ClassVar = {
        "mixer": ("ExpTimeMixConfig", ("exponentials", "taps", "alpha", "beta", "gamma")),
        "ffn": ("ChannelMixConfig", ("activation",)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.exponentials", self.exponentials, 1, self.ctx_len)
        check_range("model.taps", self.taps, 0, self.ctx_len)

    def tiny(self) -> Self:
        return replace(self, layers=1, ctx_len=8, channels=4 * self.heads, exponentials=1, taps=0)
