"""Counts and hash of a text, without saving its tokens."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from timemix.data.config import DataConfig
from timemix.data.corpus import SPLITS, is_corpus, open_corpus
from timemix.data.duplicates import DocumentCounts
from timemix.data.pipeline import Text, encoded, no_counts
from timemix.runtime.progress import ShowProgress
from timemix.storage.json_files import OPTIONAL


@dataclass(frozen=True)
class SplitCounts:
    """Counts of a split: tokens, characters, bytes in UTF-8, documents, and unknown characters or words."""

    tokens: int
    characters: int
    bytes: int
    unknown: int
    documents: int


@dataclass(frozen=True)
class TextDescription:
    """Counts of a text and of the tokens that `prepare` would write."""

    files: int
    """Number of files."""
    characters: int
    bytes: int
    """Number of bytes of the text in UTF-8."""
    distinct_characters: int
    sha256: str
    """Hash of all text, in hexadecimal."""
    held_out: str
    """Description of the validation text, such as "the last 10 % of builtin"."""
    tokenizer: str
    """Kind of the tokenizer."""
    vocab_size: int
    train: SplitCounts
    valid: SplitCounts
    documents: DocumentCounts | None = field(default=None, metadata=OPTIONAL)
    """Counts of the documents of the source, None if it is one document."""
    valid_documents: DocumentCounts | None = field(default=None, metadata=OPTIONAL)
    """Counts of the documents of a validation text with its own source."""


def describe(config: DataConfig, *, progress: ShowProgress = False) -> TextDescription:
    """Tokenize a text without saving the tokens, and return the counts.

    Args:
        config: Source of the text, split and tokenizer.
        progress: Whether to show the progress on standard error, or a function for progress lines.

    Raises:
        TimemixError: The text is not supported, for a reason that `prepare` lists.
    """
    text = Text(config, progress)
    made = text.train_tokenizer(progress)
    counts = {split: no_counts() for split in SPLITS}
    for _ in encoded(text, made, counts, {}, progress):
        pass
    sizes = text.sizes.values()
    return TextDescription(
        files=len(text.files),
        characters=sum(size.characters for size in sizes),
        bytes=sum(size.bytes for size in sizes),
        distinct_characters=len(set().union(*(size.alphabet for size in sizes))),
        sha256=text.sha256,
        held_out=text.held_out,
        tokenizer=made.kind,
        vocab_size=made.vocab_size,
        train=SplitCounts(**counts["train"]),
        valid=SplitCounts(**counts["valid"]),
        documents=text.documents.get("train"),
        valid_documents=text.documents.get("valid"),
    )


def text_hash(config: DataConfig) -> str:
    """Return a hash of the text that a config names, or of the tokens if the config names a prepared folder.

    Args:
        config: Source of the text and split.

    Returns:
        The sha256, in hexadecimal.

    Raises:
        TimemixError: The text is not supported, for a reason that `prepare` lists.
    """
    if not is_corpus(Path(config.source)):
        return Text(config, False).hash
    info = open_corpus(Path(config.source)).info
    splits = [info.split(split) for split in SPLITS]
    hashes = [split.sha256 for split in splits]
    hashes += [split.counted.sha256 for split in splits if split.counted is not None]
    return hashlib.sha256("\0".join(hashes).encode()).hexdigest()
