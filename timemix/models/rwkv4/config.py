"""Settings of `rwkv4`."""

import math
from dataclasses import dataclass
from typing import ClassVar

from timemix.errors import InvalidValue
from timemix.models.config import Ideas, ModelConfig


@dataclass(frozen=True)
class Rwkv4Config(Ideas, ModelConfig):
    """Settings of the architecture `rwkv4`."""

    arch: str = "rwkv4"
    ffn_ratio: float = 4.0
    """Hidden size of the feed-forward sublayer as a multiple of --model.channels, above 0, at most 1000."""
    l2wrap: float = 1e-4
    """Weight of L2Wrap, a gradient that keeps the largest logit of each token near 0, at least 0 (0: no L2Wrap)."""
    without: tuple[str, ...] = ()
    """Ideas that the model leaves out, none, one or more of: token_shift, learned_shift, receptance, bonus,
    denominator.
    Default: a whole model. Only whole models generate in compiled C. Only whole models can be exported
    to pth, gguf and the native form of hf."""

    ideas: ClassVar = ("token_shift", "learned_shift", "receptance", "bonus", "denominator")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_ideas()
        if not 0 < self.ffn_ratio <= 1000 or self.ffn_hidden < 1:
            raise InvalidValue(f"model.ffn_ratio is {self.ffn_ratio}; it must be from 1 / model.channels to 1000")
        if not 0 <= self.l2wrap < math.inf:
            raise InvalidValue(f"model.l2wrap is {self.l2wrap}; it must be at least 0 and finite")

    def size_words(self) -> str:
        return (
            f"{self.layers} layers, {self.channels} channels, ffn_ratio {self.ffn_ratio:.4g}, ctx_len {self.ctx_len},"
            f" vocabulary {self.vocab_size}"
        )

    @property
    def ffn_hidden(self) -> int:
        """Hidden size F of the feed-forward sublayer."""
        return round(self.ffn_ratio * self.channels)
