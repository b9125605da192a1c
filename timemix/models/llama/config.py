"""Settings of `llama`."""

from dataclasses import dataclass

from timemix.errors import InvalidValue
from timemix.models.config import HeadsConfig, check_positive
from timemix.storage.settings import check_range


@dataclass(frozen=True)
class LlamaConfig(HeadsConfig):
    """Settings of the architecture `llama`."""

    arch: str = "llama"
    heads: int = 4
    """Number of query heads, at least 1. --model.heads must divide --model.channels."""
    kv_heads: int = 0
    """Number of key and value heads, from 0 to --model.heads, which it must divide. 0: as many as --model.heads."""
    ffn_ratio: float = 8 / 3
    """Hidden size of the feed-forward sublayer as a multiple of --model.channels, above 0, at most 1000."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies, above 0."""
    norm_eps: float = 1e-5
    """Constant that RMSNorm adds to the mean square, above 0."""
    initial_std: float = 0.02
    """Standard deviation of the initial weights, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.kv_heads", self.kv_heads, 0, self.heads)
        if self.kv_heads and self.heads % self.kv_heads:
            divisors = ", ".join(str(h) for h in range(1, self.heads + 1) if self.heads % h == 0)
            raise InvalidValue(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}; divisors: {divisors}"
            )
        if self.head_size % 2:
            raise InvalidValue(
                f"model.heads={self.heads} with model.channels={self.channels} gives heads of the odd size"
                f" {self.head_size}; rotary positions need an even size"
            )
        if not 0 < self.ffn_ratio <= 1000:
            raise InvalidValue(f"model.ffn_ratio is {self.ffn_ratio}; it must be above 0 and at most 1000")
        for name in ("rotary_base", "norm_eps", "initial_std"):
            check_positive(name, getattr(self, name))

    def size_words(self) -> str:
        grouped = f" ({self.kv_heads} of keys and values)" if self.kv_heads else ""
        return (
            f"{self.layers} layers, {self.heads} heads{grouped}, {self.channels} channels, ffn_ratio"
            f" {self.ffn_ratio:.4g}, ctx_len {self.ctx_len}, vocabulary {self.vocab_size}"
        )

    @property
    def groups(self) -> int:
        """Number G of query heads that share a key and value head."""
        return self.heads // (self.kv_heads or self.heads)

    @property
    def ffn_hidden(self) -> int:
        """Hidden size of the feed-forward sublayer."""
        return max(8, round(self.ffn_ratio * self.channels / 8) * 8)
