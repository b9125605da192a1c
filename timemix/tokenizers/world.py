"""The tokenizer of the RWKV World models, whose vocabulary comes from a file."""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timemix.errors import DamagedFile, InvalidValue
from timemix.storage.files import LARGEST, read_lines
from timemix.tokenizers.base import DOCUMENT_END, Tokenizer
from timemix.tokenizers.document import BYTE_LEVEL, END_ENTRY, byte_symbols, decoders, numbered, written_document
from timemix.tokenizers.longest_match import LongestMatch
from timemix.tokenizers.stream import pieces_of

VOCAB_SIZE = 65536
"""Number of rows of the embedding of the published models."""

_SYMBOLS = dict(enumerate(byte_symbols()))
_BYTES = {ord(symbol): byte for byte, symbol in _SYMBOLS.items()}

# A space is not the symbol of a byte, so these entries match no text.
_UNUSED = "<unused {}>"
_EMPTY = re.compile("<(end of text|unused [0-9]+)>")

_LINE = re.compile(r"([1-9][0-9]{0,8}) (.{1,4096}) ([1-9][0-9]{0,3})\r?\n?")
_TEXT_ESCAPE = r"""\\(?:[\\'"ntr]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"""
_BYTE_ESCAPE = r"""\\(?:[\\'"ntr]|x[0-9a-f]{2})"""
_LITERAL = re.compile(
    rf"""'(?:[^'\\\x00-\x1f]|{_TEXT_ESCAPE})*'|"(?:[^"\\\x00-\x1f]|{_TEXT_ESCAPE})*\""""
    rf"""|b'(?:[ -&(-\[\]-~]|{_BYTE_ESCAPE})*'|b"(?:[ !#-\[\]-~]|{_BYTE_ESCAPE})*\""""
)


class WorldTokenizer(Tokenizer):
    """Tokenizer of the RWKV World models. Each token is the longest entry of the vocabulary that matches.

    The tokens of a text are the tokens of its UTF-8 bytes. Every byte is an entry, so any bytes can be encoded.

    Args:
        tokens: Bytes of the tokens with the ids 1, 2, ... Id 0 is the end of a text.
        vocab_size: Number of ids, at least len(tokens) + 1. Id 0 and the ids after the tokens decode to nothing.

    Raises:
        InvalidValue: A token is empty or repeated, a byte is missing, or `vocab_size` is too small.
    """

    kind = "world"
    end_of_text = 0

    def __init__(self, tokens: Sequence[bytes], vocab_size: int = VOCAB_SIZE) -> None:
        if len(tokens) >= vocab_size:
            raise InvalidValue(f"vocab_size={vocab_size} is too small; {len(tokens)} tokens and id 0 need more")
        if len({b"", *tokens}) <= len(tokens):
            raise InvalidValue("a token is empty or repeated; give distinct tokens")
        if missing := {bytes([byte]) for byte in range(256)}.difference(tokens):
            raise InvalidValue(f"no token is the byte {min(missing)!r}; add the missing bytes")
        pieces = [b"", *tokens, *[b""] * (vocab_size - 1 - len(tokens))]
        super().__init__("byte", pieces, _document(tokens, vocab_size))
        self.border = _border(tokens)
        self._longest_match = LongestMatch(pieces)
        # In this vocabulary, the bytes of DOCUMENT_END are the token 0.
        self._match_of_documents = LongestMatch([DOCUMENT_END.encode("utf-8", "surrogatepass"), *pieces[1:]])

    @classmethod
    def from_vocabulary(cls, entries: Sequence[str]) -> "WorldTokenizer":
        """Create the tokenizer of a `tokenizer.json`.

        Args:
            entries: Entries of the vocabulary, in the order of their ids.
        """
        tokens = [entry.translate(_BYTES).encode("latin-1") for entry in entries if not _EMPTY.fullmatch(entry)]
        return cls(tokens, len(entries))

    def _encode(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        if DOCUMENT_END not in text:
            return self._longest_match.encode(text.encode()), Counter()
        return self._match_of_documents.encode(text.encode("utf-8", "surrogatepass")), Counter()

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Encode any bytes, which need not be UTF-8.

        Args:
            data: The bytes.

        Returns:
            Token ids (tokens,), of `self.dtype`.

        Raises:
            InvalidValue: `data` is not of type bytes.
        """
        if not isinstance(data, bytes):
            raise InvalidValue(f"data is of type {type(data).__name__}; it must be bytes")
        return self._longest_match.encode(data).astype(self.dtype)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Decode token ids to bytes. Decoding is the inverse of `encode_bytes`.

        Args:
            ids: Token ids (tokens,).

        Raises:
            InvalidValue: An id is outside the vocabulary.
        """
        return b"".join(pieces_of(np.asarray(ids), self._pieces))


def _document(tokens: Sequence[bytes], vocab_size: int) -> dict[str, Any]:
    """Return the content of the `tokenizer.json`. Without a prefix, WordPiece is longest match."""
    unused = map(_UNUSED.format, range(len(tokens) + 1, vocab_size))
    entries = [END_ENTRY, *(token.decode("latin-1").translate(_SYMBOLS) for token in tokens), *unused]
    model = {
        "type": "WordPiece",
        "unk_token": END_ENTRY,
        "continuing_subword_prefix": "",
        # The whole text is one word.
        "max_input_chars_per_word": 2**53,
        "vocab": numbered(entries),
    }
    nothing = {"type": "Replace", "pattern": {"Regex": f"^{_EMPTY.pattern}$"}, "content": ""}
    return written_document(model, decoders(nothing, BYTE_LEVEL), pre_tokenizer=BYTE_LEVEL)


def _border(tokens: Sequence[bytes]) -> re.Pattern[str]:
    """Return a pattern of characters that end a token in every text: before a space or a newline, and newlines.

    If no token contains two successive bytes, a token ends between these bytes in every text. The pattern matches ASCII
    characters, which are single bytes.
    """
    text = np.frombuffer(b"".join(tokens), np.uint8)
    joined = np.zeros((256, 256), bool)
    is_inside = np.ones(len(text), bool)
    is_inside[np.cumsum([len(token) for token in tokens]) - 1] = False
    joined[text[:-1][is_inside[:-1]], text[1:][is_inside[:-1]]] = True
    found = []
    for right in " \n":
        if lefts := _characters(~joined[:128, ord(right)]):
            found.append(f"[{lefts}](?={right})")
    rights = _characters(~joined[ord("\n"), :128])
    # The first byte of a character that is not ASCII is in the range 0xC2 to 0xF4.
    rights += "" if joined[ord("\n"), 0xC2:0xF5].any() else "\\u0080-\\U0010ffff"
    if rights:
        found.append(rf"\n(?=[{rights}])")
    # The pattern [^\s\S] matches nothing.
    return re.compile("|".join(found) or r"[^\s\S]")


def _characters(mask: np.ndarray) -> str:
    """Return the ASCII characters of a mask (128,), escaped for a character class."""
    return "".join(f"\\x{character:02x}" for character in np.flatnonzero(mask))


def read_world(path: Path, vocab_size: int = VOCAB_SIZE) -> WorldTokenizer:
    """Read a vocabulary file of the World tokenizer, such as rwkv_vocab_v20230424.txt.

    Each line is `ID LITERAL LENGTH`: the id, which counts the lines from 1, the token as a literal of Python (str or
    bytes), and the length of the token in bytes.

    Args:
        path: The file, with LF or CRLF line ends.
        vocab_size: Number of ids, at least the number of lines + 1.

    Raises:
        FileError: The file cannot be read or is no such vocabulary.
    """
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(read_lines(path, LARGEST), 1):
        try:
            token = _token(line, number)
            if number >= vocab_size:
                raise ValueError(f"line {number} exceeds the {vocab_size - 1} ids of the vocabulary")
            if line_of.setdefault(token, number) != number:
                raise ValueError(f"line {number} repeats the token of line {line_of[token]}")
        except ValueError as error:
            raise DamagedFile(f"{path} is no World vocabulary: {error}; restore the file") from error
    try:
        return WorldTokenizer(list(line_of), vocab_size)
    except InvalidValue as error:
        raise DamagedFile(f"{path} is no World vocabulary: {error}") from error


def _token(line: bytes, number: int) -> bytes:
    """Return the token of a line of a vocabulary file, or raise ValueError with the reason why there is none."""
    try:
        found = _LINE.fullmatch(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} is not UTF-8") from error
    if found is None or not _LITERAL.fullmatch(found[2]):
        shown = line[:40].rstrip(b"\r\n").decode(errors="replace")
        raise ValueError(f"line {number} is {shown!r}, not an id, a literal of str or bytes, and a length")
    if int(found[1]) != number:
        raise ValueError(f"line {number} has the id {found[1]} instead of {number}")
    try:
        literal = ast.literal_eval(found[2])
        token = literal if isinstance(literal, bytes) else literal.encode()
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"line {number} has the token {found[2][:40]}, which is no text") from error
    if len(token) != int(found[3]):
        raise ValueError(f"line {number} has a token of {len(token)} bytes, but the length {found[3]}")
    return token
