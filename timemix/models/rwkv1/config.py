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
    """Architecture, on which the other options of the model depend."""
    alpha: bool = True
    """Learned alpha_h(u), weight of a source position."""
    beta: bool = True
    """Learned beta_h(t), weight of a target position."""
    gamma: bool = True
    """Learned gamma(t), output weight of a position."""
    weights: Literal["decomposed", "free"] = "decomposed"
    """Form of W: decomposed, f_h(t-u) alpha_h(u) beta_h(t); or free, a parameter W_h[t,u] per pair, as in AFT."""
    denominator: Literal["plain", "weighted"] = "plain"
    """Denominator: plain, the running sum of exp(k); or weighted by W = exp(f + alpha + beta), as in AFT."""
    backend: Literal["auto", "dense", "blocked", "spectral", "reference"] = "auto"
    """Backend of wkv; auto: the fastest for the context length."""

    version_1: ClassVar = {
        "mixer": ("TimeMixConfig", ("alpha", "beta", "gamma", "weights", "denominator", "backend")),
        "ffn": ("ChannelMixConfig", ("activation",)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == "free" and self.backend in ("blocked", "spectral"):
            raise InvalidValue(
                f"model.backend is {self.backend!r}, which does not support model.weights free; choose dense"
            )


@dataclass(frozen=True)
class Rwkv1ExpConfig(ShiftedConfig):
    """Architecture and size of `rwkv1_exp`."""

    arch: str = "rwkv1_exp"
    """Architecture, on which the other options of the model depend."""
    exponentials: int = 8
    """K, number of decaying exponentials whose sum is f_h(lag); the state has K numerators per channel."""
    taps: int = 0
    """M, number of first lags at which f_h has a parameter of its own besides."""
    alpha: bool = True
    """Learned alpha_h(u), weight of a source position."""
    beta: bool = True
    """Learned beta_h(t), weight of a target position."""
    gamma: bool = True
    """Learned gamma(t), output weight of a position."""

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
