"""Text to token ids and back: characters, bytes, words, subwords.

Every kind saves itself as a `tokenizer.json` that the `tokenizers` library opens with the same ids. The
kind and what happens to unknown text are read back from that file's structure.
"""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timemix.errors import InvalidValue
from timemix.storage.files import write_text
from timemix.tokenizers.pieces import pieces

KINDS = ("character", "byte", "word", "subword")
UNKNOWN = "<unk>"


class Tokenizer(ABC):
    """Text to ids and back. `train_tokenizer` and `load_tokenizer` make one.

    kind: one of KINDS.
    unknown: what becomes of text outside the vocabulary: "error"; "unk", the one token <unk>; or "byte", its
        UTF-8 bytes. A byte or subword vocabulary holds all bytes, so its policy is "byte" always.
    vocab_size: number of tokens; ids are 0 to vocab_size - 1.
    dtype: smallest unsigned type that holds every id.
    hash: SHA-256, in hexadecimal, of `to_json()`: equal for tokenizers that give equal ids.
    end_of_text: id of the token that ends a text, None where there is none.
    """

    kind: str
    # Words are decoded with a space between two, except after a newline.
    spaced = False
    # The token that ends a text, None where the vocabulary has none; generation stops before it.
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
        """Ids of `text`, and how often each unknown character or word was met.

        Under "error" the unknown ones are left out of the ids.
        """

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, 1-D, of `self.dtype`.

        Raises InvalidValue for another type or a lone surrogate, and under unknown="error" for characters or words
        outside the vocabulary.
        """
        if not isinstance(text, str):
            raise InvalidValue(f"text is of type {type(text).__name__}; it must be a str")
        ids, unknown = self.encode_counted(text)
        self.refuse(unknown)
        return ids

    def refuse(self, unknown: Counter[str], *, is_new: bool = False) -> None:
        """Raises InvalidValue, which names them, where there are `unknown` characters or words and none may be.

        `is_new`: no model has this vocabulary yet, so the sentence names the setting that makes another one.
        """
        if unknown and self.unknown == "error":
            other = "choose data.unknown unk" if is_new else "take a model that was trained with data.unknown unk"
            raise InvalidValue(
                f"the vocabulary has no {_names(unknown)}; leave {'it' if len(unknown) == 1 else 'them'} out of"
                f" the text, or {other}"
            )

    def encode_lenient(self, text: str) -> tuple[np.ndarray, int]:
        """Ids of `text`, 1-D, of `self.dtype`, and the number of unknown characters (or words) in it.

        For evaluation: under unknown="error" these are left out. Raises TimemixError for a lone surrogate.
        """
        ids, unknown = self.encode_counted(text)
        return ids, unknown.total()

    def encode_counted(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        """Ids of `text` and how often each unknown character or word was met, as `encode_lenient` takes them."""
        refuse_surrogates(text)
        ids, unknown = self._encode(text)
        return ids.astype(self.dtype, copy=False), unknown

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        The inverse of `encode`, except that words do not restore case and spacing (but encode to the same ids
        again). Raises TimemixError for an id outside the vocabulary.
        """
        return "".join(self.texts([np.asarray(ids)]))

    def texts(self, blocks: Iterable[np.ndarray]) -> Iterator[str]:
        """The text of ids that come in blocks (tokens,), in as many parts and one more."""
        stream = self.stream()
        for ids in blocks:
            yield stream.push_all(ids)
        yield stream.flush()

    def spelled_size(self, blocks: Iterable[np.ndarray]) -> tuple[int, int]:
        """Characters and UTF-8 bytes of the tokens themselves, from blocks of ids (tokens,).

        <unk> counts as one of each, since its text is not known; the spaces between words do not count. A character in
        several tokens belongs to the one with its first byte.
        """
        pieces = [*self._pieces[:-1], b"?"] if self.unknown == "unk" else self._pieces
        # UTF-8: the bytes 10xxxxxx continue a character.
        starts = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces], np.int64)
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        counts = sum((np.bincount(ids, minlength=len(pieces)) for ids in blocks), np.zeros(len(pieces), np.int64))
        return int(counts @ starts), int(counts @ lengths)

    def first_size(self, text: str) -> tuple[int, int]:
        """Characters and UTF-8 bytes of the part of a text that its first token stands for."""
        ids, _ = self.encode_counted(next(pieces([text]), ""))
        if self.unknown != "unk" or ids[:1].tolist() != [self.vocab_size - 1]:
            return self.spelled_size([ids[:1]])
        unit = self._first_unit(text)
        return len(unit), len(unit.encode())

    def _first_unit(self, text: str) -> str:
        """The character or word at the beginning of a text."""
        return text[:1]

    def stream(self) -> "StreamDecoder":
        """Decodes one token at a time."""
        return StreamDecoder(self._pieces, self.spaced)

    def differences(self, other: "Tokenizer") -> str:
        """What two vocabularies do not share, for a sentence: characters (or words) that only one of them has."""
        if self.kind != other.kind:
            return f"one is of kind {self.kind}, the other {other.kind}"
        ours, theirs = set(self._pieces), set(other._pieces)
        parts = [
            f"{where} {_names(Counter(piece.decode('utf-8', 'replace') for piece in sorted(pieces)))}"
            for where, pieces in (("only the first has", ours - theirs), ("only the second has", theirs - ours))
            if pieces
        ]
        return ", ".join(parts) or "the same entries under other numbers, or another way with unknown text"

    def to_json(self) -> str:
        """Content of `tokenizer.json`."""
        return self._json

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`: whole or not at all. Raises TimemixError where it cannot be written."""
        write_text(Path(path), self._json)


class StreamDecoder:
    """Tokens to text as they come. What `push` and the last `flush` give, joined, equals `decode`."""

    def __init__(self, pieces: Sequence[bytes], spaced: bool) -> None:
        self._pieces = pieces
        self._spaced = spaced
        self._space_due = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that is complete with `token`: never half a UTF-8 character, so it may be empty.

        Raises InvalidValue for an id outside the vocabulary.
        """
        if not 0 <= token < len(self._pieces):
            raise InvalidValue(f"token {token} is outside the vocabulary of {len(self._pieces)}")
        piece = self._pieces[token]
        if not self._spaced:
            return self._utf8.decode(piece)
        space = b" " if self._space_due else b""
        self._space_due = piece != b"\n"
        return self._utf8.decode(space + piece)

    def push_all(self, ids: np.ndarray) -> str:
        """What `push` gives for all of `ids` (tokens,), joined."""
        outside = (ids < 0) | (ids >= len(self._pieces))
        if outside.any():
            raise InvalidValue(f"token {ids[outside][0]} is outside the vocabulary of {len(self._pieces)}")
        found = [self._pieces[token] for token in ids.astype(np.int64).tolist()]
        if not self._spaced or not found:
            return self._utf8.decode(b"".join(found))
        # No word has a space or newline in it.
        joined = b" ".join([b"", *found] if self._space_due else found).replace(b"\n ", b"\n")
        self._space_due = found[-1] != b"\n"
        return self._utf8.decode(joined)

    def flush(self) -> str:
        """U+FFFD where the last character is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def refuse_surrogates(text: str, before: int = 0) -> bytes:
    """UTF-8 of a text, which `before` characters precede; raises InvalidValue for a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValue(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {before + error.start}:"
            " UTF-8 cannot hold it; remove it"
        ) from error


def _names(unknown: Counter[str], limit: int = 8) -> str:
    """The first few unknown characters or words, for a sentence."""
    names = [f"{name!r} (U+{ord(name):04X})" if len(name) == 1 else repr(name) for name in list(unknown)[:limit]]
    if len(unknown) > limit:
        return f"{', '.join(names)} and {len(unknown) - limit} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
