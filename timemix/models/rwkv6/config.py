"""Settings of `rwkv5` and `rwkv6`."""

import math
from dataclasses import dataclass
from typing import ClassVar

from timemix.errors import InvalidValue
from timemix.models.config import HeadsConfig, Ideas, check_positive
from timemix.storage.settings import check_range


@dataclass(frozen=True)
class Rwkv5Config(Ideas, HeadsConfig):
    """Settings of the architecture `rwkv5`, which is version 5.2 of RWKV."""

    arch: str = "rwkv5"
    ffn_ratio: float = 0.0
    """Hidden size of the feed-forward sublayer as a multiple of --model.channels, at least 0, at most 1000.
    0: 3.5, where the hidden size is rounded down to a multiple of 32."""
    group_norm_eps: float = 64e-5
    """Constant that the norm of each head's output adds to the variance, above 0."""
    l2wrap: float = 1e-4
    """Weight of L2Wrap, a gradient that keeps the largest logit of each token near 0, at least 0 (0: no L2Wrap)."""
    without: tuple[str, ...] = ()
    """Ideas that the model leaves out, none, one or more of: token_shift, gate, head_norm, bonus.
    Default: a whole model. Only whole models, and models that leave out only the gate, generate in compiled C.
    Only whole models can be exported to pth, gguf and the native form of hf."""

    ideas: ClassVar[tuple[str, ...]] = ("token_shift", "gate", "head_norm", "bonus")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_ideas()
        if not 0 <= self.ffn_ratio <= 1000 or self.ffn_hidden < 1:
            raise InvalidValue(f"model.ffn_ratio is {self.ffn_ratio}; it must be 0, or from 1 / model.channels to 1000")
        check_positive("group_norm_eps", self.group_norm_eps)
        if not 0 <= self.l2wrap < math.inf:
            raise InvalidValue(f"model.l2wrap is {self.l2wrap}; it must be at least 0 and finite")

    def size_words(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} heads, {self.channels} channels, hidden size {self.ffn_hidden},"
            f" ctx_len {self.ctx_len}, vocabulary {self.vocab_size}"
        )

    @property
    def ffn_hidden(self) -> int:
        """Hidden size F of the feed-forward sublayer."""
        if self.ffn_ratio == 0:
            return max(32, int(3.5 * self.channels) // 32 * 32)
        return round(self.ffn_ratio * self.channels)


@dataclass(frozen=True)
class Rwkv6Config(Rwkv5Config):
    """Settings of the architecture `rwkv6`."""

    arch: str = "rwkv6"
    mixture_rank: int = 32
    """Rank of the low-rank map to each of the five mixtures, at least 1."""
    decay_rank: int = 64
    """Rank of the low-rank map to the decay, at least 1."""
    without: tuple[str, ...] = ()
    """Ideas that the model leaves out, none, one or more of: token_shift, token_mixtures, token_decay, gate,
    head_norm, bonus.
    Default: a whole model. Only whole models generate in compiled C. Only whole models can be exported
    to pth, gguf and the native form of hf."""

    ideas: ClassVar = ("token_shift", "token_mixtures", "token_decay", "gate", "head_norm", "bonus")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mixture_rank", "decay_rank"):
            check_range(f"model.{name}", getattr(self, name), 1, 2**16)
