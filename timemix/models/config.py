"""Base classes of model settings, from which each architecture derives a class.

This module does not import PyTorch.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from timemix.errors import InvalidValue, nearest
from timemix.storage.settings import LARGEST_VOCABULARY, check_range, nearest_divisors

Initial = Literal["zero", "original"]
Recompute = Literal["none", "cheap", "all"]
Activation = Literal["gelu", "mish", "relu2", "silu"]

MOST_FRACTIONS = 1000
# The limits of sizes are far above all useful values. A wrong size from a damaged file is rejected before memory is
# allocated.
_LARGEST = {"vocab_size": LARGEST_VOCABULARY, "ctx_len": 2**20, "layers": 1000, "heads": 2**16, "channels": 2**16}


@dataclass(frozen=True)
class ModelConfig:
    """The settings that every model has: architecture and size."""

    arch: str = ""
    """Architecture of the model. Each architecture has additional model options."""
    vocab_size: int = 256
    """Vocabulary size in tokens, from 1 to 16777216. Training sets the vocabulary size from the tokenizer."""
    ctx_len: int = 64
    """Context length in tokens, from 1 to 1048576."""
    layers: int = 4
    """Number of blocks, from 1 to 1000."""
    channels: int = 128
    """Width of the model, from 1 to 65536."""
    dropout: float = 0.0
    """Dropout of the embedding and of the output of each sublayer, from 0 up to but not including 1."""

    version_1: ClassVar[dict[str, tuple[str, tuple[str, ...]]] | None] = None
    """Class names of `mixer` and `ffn` in format version 1, with the fields of each class in order.
    None for newer architectures."""

    def __post_init__(self) -> None:
        for name, most in _LARGEST.items():
            if hasattr(self, name):
                check_range(f"model.{name}", getattr(self, name), 1, most)
        if not 0 <= self.dropout < 1:
            raise InvalidValue(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")

    def size_words(self) -> str:
        """Describe the size of the model in words.

        Returns:
            Text such as "4 layers, 128 channels, ctx_len 64, vocabulary 256".
        """
        return f"{self.layers} layers, {self.channels} channels, ctx_len {self.ctx_len}, vocabulary {self.vocab_size}"

    def tiny(self) -> Self:
        """Return the settings of a tiny model of this architecture, for a warm-up step that loads and compiles code.

        Returns:
            Settings with one layer and ctx_len 8.
        """
        return replace(self, layers=1, ctx_len=8)


def check_heads(heads: int, channels: int) -> None:
    """Check that the number of heads divides the number of channels.

    Args:
        heads: Number of heads, at least 1.
        channels: Number of channels, at least 1.

    Raises:
        InvalidValue: The number of heads does not divide the number of channels.
    """
    if channels % heads:
        raise InvalidValue(
            f"model.heads={heads} does not divide model.channels={channels};"
            f" nearest divisors: {nearest_divisors(heads, channels)}"
        )


def check_positive(name: str, value: float) -> None:
    """Check that a setting of a model is above 0 and finite.

    Args:
        name: Name of the setting, without "model.".
        value: Value of the setting.

    Raises:
        InvalidValue: The value is not above 0, or is not finite.
    """
    if not 0 < value < float("inf"):
        raise InvalidValue(f"model.{name} is {value}; it must be above 0 and finite")


class Ideas:
    """The part of a model's settings that leaves out ideas of the architecture, to measure what an idea is worth.

    A model without an idea has none of its parameters. A class derived from this class has a field `without`.
    """

    ideas: ClassVar[tuple[str, ...]] = ()
    """Names that `without` may have."""
    without: tuple[str, ...]

    def uses(self, idea: str) -> bool:
        """Return whether the model has an idea.

        Args:
            idea: Name of the idea.
        """
        return idea not in self.without

    def check_ideas(self) -> None:
        """Check the names in `without`.

        Raises:
            InvalidValue: A name is unknown, or is there twice.
        """
        for name in self.without:
            if name not in self.ideas:
                raise InvalidValue(f"model.without has the unknown name {name!r}{nearest(name, self.ideas)}")
        if len(set(self.without)) < len(self.without):
            raise InvalidValue(f"model.without is {list(self.without)}, with a repeated name; give each name once")


@dataclass(frozen=True)
class HeadsConfig(ModelConfig):
    """The settings of a model with heads of equal size."""

    heads: int = 4
    """Number of heads, at least 1. --model.heads must divide --model.channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.heads, self.channels)

    def tiny(self) -> Self:
        return replace(self, layers=1, ctx_len=8, channels=4 * self.heads)

    @property
    def head_size(self) -> int:
        """Number N of channels of a head."""
        return self.channels // self.heads


@dataclass(frozen=True)
class ShiftedConfig(HeadsConfig):
    """The settings that the models of 2021 share: heads, a gated feed-forward sublayer, token-shift, initial values."""

    ffn_ratio: float = 3.0
    """Hidden size of the feed-forward sublayer, as a multiple of --model.channels.
    The multiple is from 1 / --model.channels to 1000."""
    token_shift: tuple[float, ...] = (0.5,)
    """Fractions of the channels that each sublayer takes from 1, 2, 3 ... tokens back, each from 0 to 1, with a sum of
    at most 1. The other channels are those of the current token. `0.5 0.25` takes half of the channels from 1 token
    back and a quarter from 2 tokens back; 0 turns token-shift off."""
    token_shift_top: tuple[float, ...] | None = None
    """Fractions as in --model.token-shift for the last layer, each from 0 to 1, with a sum of at most 1.
    --model.token-shift then holds for the first layer, and the layers between are interpolated.
    Default: equal in all layers."""
    initial: Initial = "zero"
    """Initial values: `original` (2021), or `zero` (late 2021). With `zero`, every block starts as the identity."""
    activation: Activation = "gelu"
    """Activation of the feed-forward sublayer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ffn_ratio <= 1000 or self.ffn_hidden < 1:
            raise InvalidValue(f"model.ffn_ratio is {self.ffn_ratio}; it must be from 1 / model.channels to 1000")
        for name in ("token_shift", "token_shift_top"):
            fractions = getattr(self, name) or ()
            if len(fractions) > MOST_FRACTIONS:
                raise InvalidValue(f"model.{name} has {len(fractions)} fractions; at most {MOST_FRACTIONS} are allowed")
            if any(not 0 <= x <= 1 for x in fractions) or sum(fractions) > 1 + 1e-9:
                raise InvalidValue(
                    f"model.{name} is {list(fractions)}; fractions must be from 0 to 1, and their sum at most 1"
                )

    def size_words(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} heads, {self.channels} channels, ffn_ratio {self.ffn_ratio},"
            f" ctx_len {self.ctx_len}, vocabulary {self.vocab_size}"
        )

    @property
    def ffn_hidden(self) -> int:
        """Hidden size F of the feed-forward sublayer."""
        return int(self.ffn_ratio * self.channels)
