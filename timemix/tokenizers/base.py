"""The base class of tokenizers, which map text to token ids and back.

Every tokenizer is saved as a `tokenizer.json`. The `tokenizers` library gives the ids of timemix with this file. The
structure of a `tokenizer.json` determines the kind of the tokenizer and its treatment of unknown text.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timemix.errors import InvalidValue
from timemix.storage.files import LARGEST_OF_TEXT, write_text
from timemix.tokenizers.document import END_ENTRY
from timemix.tokenizers.pieces import PIECE, equal_pieces, pieces
from timemix.tokenizers.stream import StreamDecoder, piece_of

KINDS = ("character", "byte", "word", "subword")
"""The kinds of tokenizers that are trained on a text. The kinds "world" and "hugging_face" are read from files."""

UNKNOWN = "<unk>"

DOCUMENT_END = "\udc00"
"""End of a document in the texts of `Tokenizer.encode_documents`. As a lone surrogate, it is no character of a text."""


class Tokenizer(ABC):
    """Map text to token ids and back. `train_tokenizer` and `load_tokenizer` create a tokenizer.

    Args:
        unknown: Treatment of text outside the vocabulary: "error" (an exception), "unk" (the token <unk>) or "byte"
            (tokens of its UTF-8 bytes). Byte, subword and World tokenizers always have "byte".
        pieces: UTF-8 bytes of each token, by id.
        document: Content of the `tokenizer.json`.

    Attributes:
        kind: One of KINDS, "world" or "hugging_face".
        unknown: The argument `unknown`.
        vocab_size: Number of tokens. Token ids go from 0 to vocab_size - 1.
        dtype: Smallest unsigned numpy type that holds every id.
        hash: SHA-256 of `to_json()` in hexadecimal. Tokenizers that give equal ids have equal hashes.
        spaced: Whether decoding puts a space between two tokens, except after a newline.
        border: Pattern of characters after which `cut` can cut a text, or None for any character.
        end_of_text: Id of the token that ends a document and stops generation, or None if there is no such token. The
            token decodes to nothing, or to a space in a word tokenizer.
    """

    kind: str
    spaced = False
    border: re.Pattern[str] | None = None
    end_of_text: int | None = None

    def __init__(self, unknown: str, pieces: Sequence[bytes], document: dict[str, Any]) -> None:
        self.unknown = unknown
        self.vocab_size = len(pieces)
        self.dtype = np.min_scalar_type(self.vocab_size - 1)
        self._pieces = pieces
        self._json = json.dumps(document, ensure_ascii=False)
        self.hash = hashlib.sha256(self._json.encode()).hexdigest()

    @abstractmethod
    def _encode(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        """Encode a text without surrogates. With unknown="error", leave out unknown characters or words.

        Args:
            text: The text. If the tokenizer has an `end_of_text`, the text may contain DOCUMENT_END.

        Returns:
            Token ids (tokens,), and the number of occurrences of each unknown character or word.
        """

    def encode(self, text: str) -> np.ndarray:
        """Encode a text.

        Args:
            text: The text.

        Returns:
            Token ids (tokens,), of `self.dtype`.

        Raises:
            InvalidValue: `text` is not a str, has a lone surrogate, or has characters or words outside the vocabulary
                while `unknown` is "error".
        """
        if not isinstance(text, str):
            raise InvalidValue(f"text is of type {type(text).__name__}; it must be a str")
        ids, unknown = self.encode_counted(text)
        self.refuse(unknown)
        return ids

    def refuse(self, unknown: Counter[str], *, is_new: bool = False) -> None:
        """Refuse a text with unknown characters or words if `self.unknown` is "error".

        Args:
            unknown: Number of occurrences of each unknown character or word.
            is_new: Whether the vocabulary is new. The message then names the setting that changes the vocabulary.

        Raises:
            InvalidValue: The text has unknown characters or words, which the message names.
        """
        if unknown and self.unknown == "error":
            other = "choose" if is_new else "train a new model from random weights with"
            raise InvalidValue(
                f"the vocabulary has no {_names(unknown)}; leave {'it' if len(unknown) == 1 else 'them'} out of"
                f" the text, or {other} data.unknown unk"
            )

    def encode_lenient(self, text: str) -> tuple[np.ndarray, int]:
        """Encode a text for evaluation. With unknown="error", leave out unknown characters or words.

        Args:
            text: The text.

        Returns:
            Token ids (tokens,), of `self.dtype`, and the number of unknown characters or words in the text.

        Raises:
            InvalidValue: The text has a lone surrogate.
        """
        ids, unknown = self.encode_counted(text)
        return ids, unknown.total()

    def encode_counted(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        """Encode a text as `encode_lenient` does, and count each unknown character or word.

        Args:
            text: The text.

        Returns:
            Token ids (tokens,), of `self.dtype`, and the number of occurrences of each unknown character or word.

        Raises:
            InvalidValue: The text has a lone surrogate.
        """
        refuse_surrogates(text)
        return self.encode_documents(text)

    def encode_documents(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        """Encode documents as `encode_counted` does. The token `end_of_text` ends each document.

        Args:
            text: The documents, with DOCUMENT_END after each document. Without an `end_of_text`, the text must not
                contain DOCUMENT_END. The text has no other surrogates, which this method does not check.

        Returns:
            Token ids (tokens,), of `self.dtype`, and the number of occurrences of each unknown character or word.
        """
        ids, unknown = self._encode(text)
        return ids.astype(self.dtype, copy=False), unknown

    def cut(self, parts: Iterable[str], size: int) -> Iterator[str]:
        """Cut a text into pieces of at least `size` characters. The joined ids of the pieces are the ids of the text.

        Args:
            parts: Parts of the text, in order.
            size: Number of characters. Only the last piece may be shorter.

        Yields:
            The pieces, in order.
        """
        return equal_pieces(parts, size) if self.border is None else pieces(parts, size, self.border)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode token ids to text.

        Decoding is the inverse of `encode`, except that a word tokenizer loses case and spacing.

        Args:
            ids: Token ids (tokens,).

        Returns:
            The text. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            InvalidValue: An id is outside the vocabulary.
        """
        return "".join(self.texts([np.asarray(ids)]))

    def texts(self, blocks: Iterable[np.ndarray]) -> Iterator[str]:
        """Decode token ids that come in blocks.

        Args:
            blocks: Blocks of token ids, each (tokens,).

        Yields:
            The text that is complete after each block, then the rest of the text.

        Raises:
            InvalidValue: An id is outside the vocabulary.
        """
        stream = self.stream()
        for ids in blocks:
            yield stream.push_all(ids)
        yield stream.flush()

    def spelled_size(self, blocks: Iterable[np.ndarray]) -> tuple[int, int]:
        """Count the characters and UTF-8 bytes that tokens represent.

        <unk> counts as one character of one byte, since its text is not known. Spaces between words do not count. A
        character that several tokens encode counts for the token with the first byte of the character.

        Args:
            blocks: Blocks of token ids, each (tokens,).

        Returns:
            Number of characters, and number of bytes.
        """
        pieces = [*self._pieces[:-1], b"?"] if self.unknown == "unk" else self._pieces
        # In UTF-8, a byte 10xxxxxx continues a character.
        starts = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces], np.int64)
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        counts = sum((np.bincount(ids, minlength=len(pieces)) for ids in blocks), np.zeros(len(pieces), np.int64))
        return int(counts @ starts), int(counts @ lengths)

    def first_size(self, text: str) -> tuple[int, int]:
        """Count the characters and UTF-8 bytes that the first token of a text represents.

        Args:
            text: The text.

        Returns:
            Number of characters, and number of bytes. An <unk> token counts as the character or word that it replaces.
        """
        ids, _ = self.encode_counted(next(self.cut([text], PIECE), ""))
        if self.unknown != "unk" or ids[:1].tolist() != [self.vocab_size - 1]:
            return self.spelled_size([ids[:1]])
        unit = self._first_unit(text)
        return len(unit), len(unit.encode())

    def _first_unit(self, text: str) -> str:
        """Return the character or word at the beginning of a text."""
        return text[:1]

    def stream(self) -> StreamDecoder:
        """Create a decoder that takes one token at a time.

        Returns:
            The decoder.
        """
        return StreamDecoder(self._pieces, self.spaced)

    def piece(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, which may be a part of a character.

        Args:
            token: Token id.

        Returns:
            The bytes, without a space between words.

        Raises:
            InvalidValue: The id is outside the vocabulary.
        """
        return piece_of(token, self._pieces)

    def differences(self, other: "Tokenizer") -> str:
        """Describe the differences between two tokenizers, for an error message.

        Args:
            other: The other tokenizer.

        Returns:
            The kinds of the two tokenizers if the kinds differ, otherwise the entries that only one of the two
            vocabularies has.
        """
        if self.kind != other.kind:
            return f"the first tokenizer is of kind {self.kind}, the second of kind {other.kind}"
        ours, theirs = set(self._pieces), set(other._pieces)
        parts = [
            f"{where} {_names(Counter(piece.decode('utf-8', 'replace') or END_ENTRY for piece in sorted(pieces)))}"
            for where, pieces in (
                ("only the first vocabulary has", ours - theirs),
                ("only the second vocabulary has", theirs - ours),
            )
            if pieces
        ]
        return ", ".join(parts) or "the entries have other ids, or unknown text is encoded differently"

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`.

        Returns:
            A JSON document.
        """
        return self._json

    def save(self, path: str | Path) -> None:
        """Save the tokenizer as `tokenizer.json`, in an atomic write.

        Args:
            path: File to write.

        Raises:
            InvalidValue: The file would be larger than `load_tokenizer` supports.
            CannotWrite: The file cannot be written.
        """
        if (size := len(self._json.encode())) > LARGEST_OF_TEXT:
            raise InvalidValue(
                f"the vocabulary has {self.vocab_size:,} tokens and needs a file of {size:,} bytes, more than the"
                f" maximum of {LARGEST_OF_TEXT:,}; choose data.tokenizer subword, or data.unknown unk with a smaller"
                " data.vocab_size"
            )
        write_text(Path(path), self._json)


def join_documents(documents: Sequence[list[int]], end_of_text: int | None) -> list[int]:
    """Join the ids of documents, with the id `end_of_text` between two documents."""
    first, *others = documents
    ids = list(first)
    for document in others:
        assert end_of_text is not None
        ids.append(end_of_text)
        ids += document
    return ids


def refuse_surrogates(text: str, before: int = 0) -> bytes:
    """Encode a text as UTF-8, and refuse a text with a lone surrogate.

    Args:
        text: The text.
        before: Number of characters before `text` in the whole text, for the error message.

    Returns:
        The UTF-8 bytes.

    Raises:
        InvalidValue: The text has a lone surrogate.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python reads a byte that is not UTF-8, such as one of the command line, as one of these surrogates.
        byte = f" (the byte 0x{code - 0xDC00:02X} of a text that is not UTF-8)" if 0xDC80 <= code <= 0xDCFF else ""
        raise InvalidValue(
            f"the text has a lone surrogate, U+{code:04X}{byte}, at character {before + error.start}, which"
            " UTF-8 cannot encode; remove it"
        ) from error


def _names(unknown: Counter[str], limit: int = 8) -> str:
    """List the first few unknown characters or words, for an error message."""
    shown = {name: repr(name).replace(r"\\", "\\") for name in list(unknown)[:limit]}
    names = [f"{text} (U+{ord(name):04X})" if len(name) == 1 else text for name, text in shown.items()]
    if len(unknown) > limit:
        return f"{', '.join(names)} and {len(unknown) - limit} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
