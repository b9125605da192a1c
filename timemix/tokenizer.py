"""Text to token ids and back: characters, bytes, words, subwords.

Every kind saves itself as a `tokenizer.json` that the `tokenizers` library opens with the same ids. The
kind and what happens to unknown text are read back from that file's structure.
"""

import codecs
import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from timemix.errors import UserError
from timemix.files import parse_json, write_text

KINDS = ("character", "byte", "word", "subword")
UNKNOWN = "<unk>"

# The single characters that the 2021 code sets apart from words.
STANDING_ALONE = "\n.,?!:;-—|'\"`()0123456789[]{}=+*\\/~&$#%"
WORD = re.compile(f"[{re.escape(STANDING_ALONE)}]|[^ {re.escape(STANDING_ALONE)}]+")

PIECE = 1 << 16
"""Characters encoded at a time, at least."""

PART = 1 << 20
"""Characters that a process is given at a time, at least."""


class Tokenizer(ABC):
    """Text to ids and back. `train_tokenizer` and `load_tokenizer` make one.

    kind: one of KINDS.
    unknown: what becomes of text outside the vocabulary: "error"; "unk", the one token <unk>; or "byte", its
        UTF-8 bytes. A byte or subword vocabulary holds all bytes, so its policy is "byte" always.
    vocab_size: number of tokens; ids are 0 to vocab_size - 1.
    dtype: smallest unsigned type that holds every id.
    hash: SHA-256, in hexadecimal, of `to_json()`: equal for tokenizers that give equal ids.
    """

    kind: str
    # Words are decoded with a space between two, except after a newline.
    spaced = False

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

        Raises UserError for a lone surrogate, and under unknown="error" for characters or words outside the
        vocabulary.
        """
        ids, unknown = self.encode_counted(text)
        self.refuse(unknown)
        return ids

    def refuse(self, unknown: Counter[str]) -> None:
        """Raises UserError, which names them, where there are `unknown` characters or words and none may be."""
        if unknown and self.unknown == "error":
            raise UserError(
                f"the vocabulary has no {_names(unknown)}; leave {'it' if len(unknown) == 1 else 'them'} out of"
                " the text, or train with --data.unknown unk"
            )

    def encode_lenient(self, text: str) -> tuple[np.ndarray, int]:
        """Ids of `text`, 1-D, of `self.dtype`, and the number of unknown characters (or words) in it.

        For evaluation: under unknown="error" these are left out. Raises UserError for a lone surrogate.
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
        again). Raises UserError for an id outside the vocabulary.
        """
        return "".join(self.texts([np.asarray(ids)]))

    def texts(self, blocks: Iterable[np.ndarray]) -> Iterator[str]:
        """The text of ids that come in blocks (tokens,), in as many parts and one more."""
        stream = self.stream()
        for ids in blocks:
            yield stream.push_all(ids)
        yield stream.flush()

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
        """Writes `tokenizer.json`: whole or not at all. Raises UserError where it cannot be written."""
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

        Raises UserError for an id outside the vocabulary.
        """
        if not 0 <= token < len(self._pieces):
            raise UserError(f"token {token} is outside the vocabulary of {len(self._pieces)}")
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
            raise UserError(f"token {ids[outside][0]} is outside the vocabulary of {len(self._pieces)}")
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


class CharacterTokenizer(Tokenizer):
    """A token is a character. Ids follow the order of `characters`; then <unk>, or the 256 bytes."""

    kind = "character"

    def __init__(self, characters: Sequence[str], unknown: str) -> None:
        entries = {character: character.encode() for character in characters}
        decoder: dict[str, Any] = {"type": "Fuse"}
        if unknown == "unk":
            entries[UNKNOWN] = UNKNOWN.encode()
        elif unknown == "byte":
            entries |= {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
            decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, decoder]}
        # Pair encoding without merges: its tokens are characters.
        model = pair_encoding(
            list(entries), unk_token=UNKNOWN if unknown == "unk" else None, byte_fallback=unknown == "byte"
        )
        super().__init__(unknown, list(entries.values()), written_document(model, decoder))
        self._first_extra = len(characters)
        self._id_of_code_point = np.full(0x110000, -1, np.int32)
        self._id_of_code_point[[ord(character) for character in characters]] = np.arange(len(characters))

    def _encode(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        unknown: Counter[str] = Counter()
        ids = [np.empty(0, self.dtype)]
        for start in range(0, len(text), PIECE):
            codes = np.frombuffer(text[start : start + PIECE].encode("utf-32-le"), "<u4")
            piece = self._id_of_code_point[codes]
            missing = piece < 0
            if missing.any():
                lost = codes[missing].tobytes().decode("utf-32-le")
                unknown.update(lost)
                if self.unknown == "error":
                    piece = piece[~missing]
                elif self.unknown == "unk":
                    piece[missing] = self._first_extra
                else:
                    piece = self._with_bytes(piece, missing, lost)
            ids.append(piece.astype(self.dtype))
        return np.concatenate(ids), unknown

    def _with_bytes(self, ids: np.ndarray, missing: np.ndarray, lost: str) -> np.ndarray:
        """`ids` with the UTF-8 bytes of the `lost` characters in the `missing` places."""
        lengths = np.ones(len(ids), np.int64)
        lengths[missing] = [len(character.encode()) for character in lost]
        is_byte = np.repeat(missing, lengths)
        spread = np.repeat(ids, lengths)
        spread[is_byte] = self._first_extra + np.frombuffer(lost.encode(), np.uint8).astype(np.int32)
        return spread


class ByteTokenizer(Tokenizer):
    """A token is a byte of the text's UTF-8; its id is the byte's value."""

    kind = "byte"

    def __init__(self) -> None:
        model = pair_encoding(byte_symbols())
        pieces = [bytes([byte]) for byte in range(256)]
        super().__init__("byte", pieces, written_document(model, BYTE_LEVEL, pre_tokenizer=BYTE_LEVEL))

    def _encode(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        return np.frombuffer(text.encode(), np.uint8).copy(), Counter()


class WordTokenizer(Tokenizer):
    """A token is a lower-case word or one of STANDING_ALONE; <unk> comes last. The 2021 code's rule.

    Decoding puts a space between tokens, none after a newline: case and spacing are not restored.
    """

    kind = "word"
    spaced = True

    def __init__(self, words: Sequence[str], unknown: str) -> None:
        entries = [*words, UNKNOWN] if unknown == "unk" else list(words)
        model = {
            "type": "WordLevel",
            "vocab": numbered(entries),
            # The library wants a name in any case; [ and ] stand alone, so this one is no word.
            "unk_token": UNKNOWN if unknown == "unk" else "[UNK]",
        }
        alone = {
            "type": "Split",
            "pattern": {"Regex": f"[{re.escape(STANDING_ALONE)}]"},
            "behavior": "Isolated",
            "invert": False,
        }
        spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
        join = [
            # This joins with spaces; # stands alone, so no word begins with the prefix.
            {"type": "WordPiece", "prefix": "##", "cleanup": False},
            {"type": "Fuse"},
            {"type": "Replace", "pattern": {"String": "\n "}, "content": "\n"},
        ]
        document = written_document(
            model,
            {"type": "Sequence", "decoders": join},
            pre_tokenizer={"type": "Sequence", "pretokenizers": [alone, spaces]},
            normalizer={"type": "Lowercase"},
        )
        super().__init__(unknown, [word.encode() for word in entries], document)
        self._id_of_word = numbered(entries)

    def _encode(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        unknown: Counter[str] = Counter()
        ids = [np.empty(0, self.dtype)]
        for words in _words(text):
            piece = np.array([self._id_of_word.get(word, -1) for word in words], np.int64)
            missing = piece < 0
            if missing.any():
                unknown.update(words[i] for i in np.flatnonzero(missing))
                if self.unknown == "unk":
                    piece[missing] = self.vocab_size - 1
                else:
                    piece = piece[~missing]
            ids.append(piece.astype(self.dtype))
        return np.concatenate(ids), unknown


class SubwordTokenizer(Tokenizer):
    """A token is a frequent sequence of UTF-8 bytes, within a word: byte-level byte pair encoding."""

    kind = "subword"

    def __init__(self, symbols: Sequence[str], merges: Sequence[Sequence[str]]) -> None:
        model = pair_encoding(symbols, merges=merges)
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        pieces = [bytes(byte_of[character] for character in symbol) for symbol in symbols]
        pre_tokenizer = BYTE_LEVEL | {"use_regex": True}
        super().__init__("byte", pieces, written_document(model, BYTE_LEVEL, pre_tokenizer=pre_tokenizer))
        self._library = tokenizers.Tokenizer.from_str(self._json)

    def _encode(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        ids = [np.empty(0, self.dtype)]
        batch: list[str] = []
        for piece in pieces([text]):
            batch.append(piece)
            if len(batch) == 64:
                ids += self._encode_batch(batch)
                batch = []
        return np.concatenate(ids + self._encode_batch(batch)), Counter()

    def _encode_batch(self, batch: list[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, self.dtype) for encoding in self._library.encode_batch_fast(batch)]


def train_tokenizer(
    kind: str,
    text: str | Iterable[str],
    *,
    vocab_size: int = 4096,
    unknown: str = "error",
    each: Callable[[Callable[[str], Counter[str]], Iterable[str]], Iterable[Counter[str]]] = map,
) -> Tokenizer:
    """A tokenizer whose vocabulary comes from `text`, a string or its parts in order.

    vocab_size: tokens, at most; for subwords, and for words with unknown="unk" (the most frequent ones).
        Otherwise the vocabulary is every distinct character or word of the text, in sorted order.
    unknown: see Tokenizer; "byte" is not for words.
    each: `map`, or the like in several processes, for counting words.

    Raises UserError when the text is empty or holds a lone surrogate, or when a choice cannot be served.
    """
    if kind not in KINDS:
        raise UserError(f"there is no tokenizer {kind!r}; choose one of {', '.join(KINDS)}")
    if unknown not in ("error", "unk", "byte"):
        raise UserError(f"there is no choice {unknown!r} for unknown text; choose error, unk or byte")
    parts = _without_surrogates([text] if isinstance(text, str) else text)
    first = next(parts, "")
    if not first:
        raise UserError(f"a {kind} tokenizer cannot be made from an empty text; give a text to train it on")
    parts = itertools.chain([first], parts)
    if kind == "character":
        return CharacterTokenizer(sorted(set().union(*parts)), unknown)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "word":
        return train_words(parts, vocab_size, unknown, each)
    return train_subwords(parts, vocab_size)


def _without_surrogates(parts: Iterable[str]) -> Iterator[str]:
    """The parts that are not empty."""
    before = 0
    for part in parts:
        refuse_surrogates(part, before)
        before += len(part)
        if part:
            yield part


def train_words(parts: Iterable[str], vocab_size: int, unknown: str, each: Callable) -> WordTokenizer:
    if unknown == "byte":
        raise UserError("a word tokenizer cannot spell unknown words as bytes; choose --data.unknown unk or error")
    counts: Counter[str] = Counter()
    for counted in each(count_words, pieces(parts, PART)):
        counts.update(counted)
    if not counts:
        raise UserError("a word tokenizer cannot be made from a text of spaces; give a text with words")
    if unknown == "error":
        return WordTokenizer(sorted(counts), unknown)
    # A text may spell its own unknown words like this.
    del counts[UNKNOWN]
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: vocab_size - 1]
    return WordTokenizer(sorted(frequent), unknown)


def count_words(text: str) -> Counter[str]:
    """How often each word comes in a text, by the 2021 code's rule."""
    return Counter(itertools.chain.from_iterable(_words(text)))


def train_subwords(parts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    if vocab_size < 256:
        raise UserError(f"a subword vocabulary of {vocab_size} cannot hold the 256 bytes; raise --data.vocab-size")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=byte_symbols(), special_tokens=[], show_progress=False
    )
    library.train_from_iterator(pieces(parts), trainer)
    model = json.loads(library.to_str())["model"]
    return SubwordTokenizer(in_order(model["vocab"]), model["merges"])


def tokenizer_from_json(document: str) -> Tokenizer:
    """The tokenizer of a `to_json()`."""
    return _from_document(json.loads(document))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json` that `Tokenizer.save` wrote.

    Raises UserError when the file is missing, damaged, or made by another program.
    """
    document = parse_json(Path(path), "the tokenizer ")
    try:
        tokenizer = _from_document(document)
        if not tokenizer.vocab_size:
            raise ValueError("an empty vocabulary")
        if json.loads(tokenizer.to_json()) != document:
            raise ValueError("other settings than ours")
    except Exception as error:  # The library raises bare Exception.
        raise UserError(f"{path} is not a tokenizer that timemix wrote; give a tokenizer.json of a run") from error
    return tokenizer


def _from_document(document: dict[str, Any]) -> Tokenizer:
    model = document["model"]
    entries = in_order(model["vocab"])
    if model["type"] == "WordLevel":
        return WordTokenizer(entries[:-1], "unk") if model["unk_token"] == UNKNOWN else WordTokenizer(entries, "error")
    if document["pre_tokenizer"] is None:
        if model["byte_fallback"]:
            return CharacterTokenizer(entries[:-256], "byte")
        if model["unk_token"] is not None:
            return CharacterTokenizer(entries[:-1], "unk")
        return CharacterTokenizer(entries, "error")
    if document["pre_tokenizer"]["use_regex"]:
        return SubwordTokenizer(entries, model["merges"])
    return ByteTokenizer()


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def written_document(
    model: dict[str, Any],
    decoder: dict[str, Any],
    *,
    pre_tokenizer: dict[str, Any] | None = None,
    normalizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A tokenizer.json of the `tokenizers` library."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def pair_encoding(
    symbols: Sequence[str],
    *,
    merges: Sequence[Sequence[str]] = (),
    unk_token: str | None = None,
    byte_fallback: bool = False,
) -> dict[str, Any]:
    """The model part of a tokenizer.json for byte pair encoding."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": numbered(symbols),
        "merges": list(merges),
    }


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, by byte value."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def numbered(entries: Sequence[str]) -> dict[str, int]:
    return {entry: i for i, entry in enumerate(entries)}


def in_order(vocabulary: dict[str, int]) -> list[str]:
    return sorted(vocabulary, key=vocabulary.__getitem__)


_BORDER = re.compile(r"\S(?=[ \n])")


def pieces(parts: Iterable[str], size: int | None = None) -> Iterator[str]:
    """The text of `parts`, cut where a space or newline follows something else, into `size` characters or a few more.

    No word, and no match of the byte-level splitting rule, reaches over such a place, and none looks back: the ids of
    the pieces are those of the text. `size` None: PIECE. The places do not depend on the parts. A text without such
    a place is one piece, in memory, however long.
    """
    size = PIECE if size is None else size
    rest, searched = "", 0
    for part in parts:
        rest += part
        start = 0
        while match := _BORDER.search(rest, max(start + size, searched)):
            yield rest[start : match.end()]
            start = match.end()
        rest = rest[start:]
        # Whether the last character is such a place shows the next part.
        searched = max(0, len(rest) - 1)
    if rest:
        yield rest


def equal_pieces(parts: Iterable[str], size: int) -> Iterator[str]:
    """The text of `parts` in pieces of `size` characters, the last one shorter."""
    rest = ""
    for part in parts:
        rest += part
        whole = len(rest) - len(rest) % size
        for start in range(0, whole, size):
            yield rest[start : start + size]
        rest = rest[whole:]
    if rest:
        yield rest


def _words(text: str) -> Iterator[list[str]]:
    """The words of `text` in lists, by the 2021 code's rule."""
    for piece in pieces([text]):
        yield WORD.findall(_lower(piece))


def _lower(text: str) -> str:
    """Lower case of each character by itself, as the `tokenizers` library has it (str.lower looks around sigma)."""
    if text.isascii():
        return text.lower()
    lowercase = normalizers.Lowercase()
    return text.translate({ord(character): lowercase.normalize_str(character) for character in set(text)})


def refuse_surrogates(text: str, before: int = 0) -> bytes:
    """UTF-8 of a text, which `before` characters precede; raises UserError for a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {before + error.start}:"
            " UTF-8 cannot hold it; remove it"
        ) from error


def _names(unknown: Counter[str], limit: int = 8) -> str:
    """The first few unknown characters or words, for a sentence."""
    names = [f"{name!r} (U+{ord(name):04X})" if len(name) == 1 else repr(name) for name in list(unknown)[:limit]]
    if len(unknown) > limit:
        return f"{', '.join(names)} and {len(unknown) - limit} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
