"""Settings of the data: text source, train and validation split, tokenizer and order of batches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from timemix.errors import InvalidValue
from timemix.storage.settings import LARGEST_VOCABULARY, check_range

TokenizerKind = Literal["character", "byte", "word", "subword", "world", "hugging_face"]
HoldOut = Literal["each", "end", "documents"]
DropDuplicates = Literal["none", "exact", "near"]
Unknown = Literal["error", "unk", "byte"]
Order = Literal["random", "epoch", "carried"]
Template = Literal["world"]


@dataclass(frozen=True)
class DataConfig:
    """Settings of the text, its split and its tokenizer."""

    source: str = "builtin"
    """Text: file, folder, glob, prepared folder, `-` (stdin), `builtin`, a download, or a dataset of Hugging Face
    (`hf:NAME`); see timemix data --help."""
    valid: str | None = None
    """Validation text, a source like --data.source. Default: the share --data.valid-fraction of the training text."""
    valid_fraction: float = 0.1
    """Share of the training text to hold out if --data.valid is not given, from 0 to below 1."""
    hold_out: HoldOut = "each"
    """Place of the held-out share: `each` is the end of each file, `end` is the end of the whole text, `documents` are
    random documents. With --data.end-of-text, `each` and `end` also hold out whole documents."""
    encoding: str = "utf-8"
    """Encoding of the text files, by its Python name."""
    keep_nul: bool = False
    """Acceptance of NUL characters in text. Default: a file with NUL is an error, or is skipped in a folder."""
    text_key: str | None = None
    """Key of the text in .jsonl and .ndjson files, or column of .parquet, .csv and .tsv files.
    Default: text; .csv and .tsv files are then plain text."""
    template: Template | None = None
    """Chat template for records with `messages`, or with `prompt` and `completion`. The loss counts only the
    messages of the assistant. Default: the records have texts."""
    end_of_text: bool | None = None
    """Token after each document. A document is a record of a .jsonl, .ndjson, .parquet, .csv or .tsv file, or a whole
    file of plain text. Default: True if the source has records, and the tokenizer has an end-of-text token or is
    new."""
    shuffle: int | None = None
    """Seed, at least 0, of a random order of the training documents. Default: the order of the source."""
    drop_duplicates: DropDuplicates = "none"
    """Documents to drop: `exact` drops empty documents and repetitions of an earlier document, `near` also documents
    that are similar to an earlier one. timemix then reads the text once more."""
    tokenizer: TokenizerKind = "character"
    """Unit of text that one token represents."""
    vocab_size: int = 4096
    """Largest size of a subword vocabulary, or of a word vocabulary with --data.unknown unk, from 1 to 16777216
    tokens."""
    vocabulary: str | None = None
    """Vocabulary of --data.tokenizer world: file, folder or download (rwkv_vocab_v20230424). Default: the file of the
    package rwkv or pyrwkv-tokenizer. For --data.tokenizer hugging_face: a byte-level tokenizer.json."""
    unknown: Unknown = "error"
    """Treatment of text outside the vocabulary: an error, the token <unk>, or byte tokens."""
    valid_tokens: int | None = None
    """Largest number of held-out tokens, at least 1, in 20 evenly spaced pieces. Default: all."""
    order: Order = "random"
    """Order of the training windows: `random` positions; `epoch`: adjacent windows from a new starting point, each once
    per epoch, which leaves out up to two windows of the text; or `carried`: each row of a batch continues the text and
    the state of this row in the last batch, for architectures with unbounded context. The presets demo, cpu-small,
    record and rwkv7-small choose epoch. Only training uses the order."""
    cross_documents: bool = True
    """Whether a token of a window depends on the documents before its own document, in training and validation.
    The value False needs a tokenizer with an end-of-text token."""

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise InvalidValue(
                f"data.valid_fraction={self.valid_fraction} is out of range; give a number from 0 to below 1"
            )
        if self.template is not None:
            for name, is_wrong in (("text_key", self.text_key is not None), ("end_of_text", self.end_of_text is False)):
                if is_wrong:
                    raise InvalidValue(
                        f"data.{name}={getattr(self, name)!r} contradicts data.template={self.template!r}: each record"
                        f" is a conversation, which an end-of-text token ends; leave data.{name} out"
                    )
        if self.shuffle is not None:
            check_range("data.shuffle", self.shuffle, 0, 2**63 - 1)
        check_range("data.vocab_size", self.vocab_size, 1, LARGEST_VOCABULARY)
        if self.valid_tokens is not None:
            check_range("data.valid_tokens", self.valid_tokens, 1, 2**63 - 1)

    def contradictions(self, found: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        """Yield each setting that differs from the value of existing data and from its default.

        Args:
            found: Values of the existing data, by name of the setting.

        Yields:
            Name of the setting, its value here, and the value of the existing data.
        """
        for name, own in found.items():
            if (asked := getattr(self, name)) not in (own, getattr(DataConfig, name)):
                yield name, asked, own

    def with_source(self, source: str) -> "DataConfig":
        """Return settings for another text, with the same `order` and `cross_documents`, which training uses.

        Args:
            source: The text.
        """
        return DataConfig(source=source, order=self.order, cross_documents=self.cross_documents)
