"""Settings of a text: its source, its split, and how it becomes tokens."""

from dataclasses import dataclass
from typing import Literal

from timemix.errors import InvalidValue
from timemix.storage.settings import LARGEST_VOCABULARY, check_range

TokenizerKind = Literal["character", "byte", "word", "subword"]
Unknown = Literal["error", "unk", "byte"]


@dataclass(frozen=True)
class DataConfig:
    """Text, its split, and how it becomes tokens."""

    source: str = "builtin"
    """A file, folder, glob, prepared folder, `builtin`, or a named download (`timemix data --help`)."""
    valid: str | None = None
    """Source of the validation text; None: the end of the source."""
    valid_fraction: float = 0.1
    """Share of the source, at its end, held out for validation when `valid` is not given."""
    encoding: str = "utf-8"
    """Encoding of the text files: any that Python knows."""
    tokenizer: TokenizerKind = "character"
    """What a token is."""
    vocab_size: int = 4096
    """Largest vocabulary of a subword or word tokenizer."""
    unknown: Unknown = "error"
    """What encodes text outside the vocabulary: nothing, <unk>, or its bytes."""
    valid_tokens: int | None = None
    """Keep at most this many tokens of the held-out text, in 20 pieces spread evenly over it; None: all."""
    order: Literal["random", "epoch"] = "random"
    """Batches: windows at random places, or each window once per epoch."""

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise InvalidValue(f"data.valid_fraction={self.valid_fraction} is not in [0, 1)")
        check_range("data.vocab_size", self.vocab_size, 1, LARGEST_VOCABULARY)
        if self.valid_tokens is not None:
            check_range("data.valid_tokens", self.valid_tokens, 1, 2**63 - 1)
