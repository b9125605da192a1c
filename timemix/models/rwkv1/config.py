"""Settings of the 2021 RWKV, with tables over lags (`rwkv1`) or with sums of exponentials (`rwkv1_exp`)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from timemix.errors import InvalidValue
from timemix.models.config import ShiftedConfig
from timemix.storage.settings import check_range


@dataclass(frozen=True)
class Rwkv1Config(ShiftedConfig):
    """Settings of the architecture `rwkv1`."""

    arch: str = "rwkv1"
    alpha: bool = True
    """Learned weight alpha_h(u) of each source position u."""
    beta: bool = True
    """Learned weight beta_h(t) of each target position t."""
    gamma: bool = True
    """Learned weight gamma(t) of the output at each position t."""
    weights: Literal["decomposed", "free"] = "decomposed"
    """Weights W: `decomposed` is f_h(t-u) alpha_h(u) beta_h(t). `free` is a parameter W_h[t,u] for each pair of
    positions, as in AFT."""
    denominator: Literal["plain", "weighted"] = "plain"
    """Denominator: `plain` sums exp(k). `weighted` sums W exp(k) with W = exp(f + alpha + beta), as in AFT."""
    backend: Literal["auto", "dense", "blocked", "spectral", "reference"] = "auto"
    """Backend of the wkv op: `dense` (one matrix product), `blocked` (matrix products of blocks), `spectral` (Fourier
    transforms), `reference` (loops), or `auto`, the fastest for the context length.
    --model.weights free allows only auto, dense and reference."""

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
    """Settings of the architecture `rwkv1_exp`."""

    arch: str = "rwkv1_exp"
    exponentials: int = 8
    """Number K of decaying exponentials in each curve f_h(lag), from 1 to --model.ctx-len."""
    taps: int = 0
    """Number of first lags at which f_h has an additional parameter, from 0 to --model.ctx-len."""
    alpha: bool = True
    """Learned weight alpha_h(u) of each source position u."""
    beta: bool = True
    """Learned weight beta_h(t) of each target position t."""
    gamma: bool = True
    """Learned weight gamma(t) of the output at each position t."""

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
