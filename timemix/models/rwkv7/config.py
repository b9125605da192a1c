"""Settings of `rwkv7`."""

import math
from dataclasses import dataclass
from typing import ClassVar

from timemix.errors import InvalidValue
from timemix.models.config import HeadsConfig, Ideas, check_positive
from timemix.storage.settings import check_range


@dataclass(frozen=True)
class Rwkv7Config(Ideas, HeadsConfig):
    """Settings of the architecture `rwkv7`."""

    arch: str = "rwkv7"
    ffn_ratio: float = 4.0
    """Hidden size of the feed-forward sublayer as a multiple of --model.channels, above 0, at most 1000."""
    decay_rank: int = 0
    """Rank of the low-rank map to the decay, at least 0. 0: 2.5 sqrt(--model.channels), rounded to a multiple
    of 32."""
    rate_rank: int = 0
    """Rank of the low-rank map to the in-context learning rate, at least 0. 0: 2.5 sqrt(--model.channels),
    rounded to a multiple of 32."""
    residual_rank: int = 0
    """Rank of the low-rank map to the value residual, at least 0. 0: 1.7 sqrt(--model.channels), rounded to a multiple
    of 32."""
    gate_rank: int = 0
    """Rank of the low-rank map to the gate, at least 0. 0: 5 sqrt(--model.channels), rounded to a multiple of 32."""
    group_norm_eps: float = 64e-5
    """Constant that the norm of each head's output adds to the variance, above 0."""
    l2wrap: float = 1e-4
    """Weight of L2Wrap, a gradient that keeps the largest logit of each token near 0, at least 0 (0: no L2Wrap)."""
    without: tuple[str, ...] = ()
    """Ideas that the model leaves out, none, one or more of: token_shift, delta_rule, token_decay,
    value_residual, gate, head_norm, bonus.
    Default: a whole model. Only whole models generate in compiled C. Only whole models can be exported
    to pth, gguf and the native form of hf."""

    ideas: ClassVar = ("token_shift", "delta_rule", "token_decay", "value_residual", "gate", "head_norm", "bonus")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_ideas()
        if not 0 < self.ffn_ratio <= 1000 or self.ffn_hidden < 1:
            raise InvalidValue(f"model.ffn_ratio is {self.ffn_ratio}; it must be from 1 / model.channels to 1000")
        for name in ("decay_rank", "rate_rank", "residual_rank", "gate_rank"):
            check_range(f"model.{name}", getattr(self, name), 0, 2**16)
        check_positive("group_norm_eps", self.group_norm_eps)
        if not 0 <= self.l2wrap < math.inf:
            raise InvalidValue(f"model.l2wrap is {self.l2wrap}; it must be at least 0 and finite")

    def size_words(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} heads, {self.channels} channels, ffn_ratio {self.ffn_ratio:.4g},"
            f" ctx_len {self.ctx_len}, vocabulary {self.vocab_size}"
        )

    @property
    def ffn_hidden(self) -> int:
        """Hidden size F of the feed-forward sublayer."""
        return round(self.ffn_ratio * self.channels)

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the low-rank maps by name: "decay", "rate", "residual" and "gate"."""
        defaults = {"decay": 2.5, "rate": 2.5, "residual": 1.7, "gate": 5.0}
        return {
            name: getattr(self, f"{name}_rank") or max(32, 32 * round(factor * math.sqrt(self.channels) / 32))
            for name, factor in defaults.items()
        }
