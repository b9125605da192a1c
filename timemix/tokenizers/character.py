"""Tokenizers whose tokens are characters or bytes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from timemix.tokenizers.base import DOCUMENT_END, UNKNOWN, Tokenizer
from timemix.tokenizers.document import (
    BYTE_LEVEL,
    DECODED_END,
    END_ENTRY,
    byte_symbols,
    decoders,
    pair_encoding,
    written_document,
)
from timemix.tokenizers.pieces import PIECE


class CharacterTokenizer(Tokenizer):
    """Tokenizer whose tokens are characters.

    Args:
        characters: The characters, in the order of their ids, and perhaps END_ENTRY.
        unknown: "error", "unk" (<unk> becomes the last entry) or "byte" (the 256 bytes become the last entries).
    """

    kind = "character"

    def __init__(self, characters: Sequence[str], unknown: str) -> None:
        has_end = END_ENTRY in characters
        entries = {character: b"" if character == END_ENTRY else character.encode() for character in characters}
        steps: list[dict[str, Any]] = [DECODED_END] if has_end else []
        if unknown == "unk":
            entries[UNKNOWN] = UNKNOWN.encode()
        elif unknown == "byte":
            entries |= {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
            steps.append({"type": "ByteFallback"})
        # Byte pair encoding without merges makes each character one token.
        model = pair_encoding(
            list(entries), unk_token=UNKNOWN if unknown == "unk" else None, byte_fallback=unknown == "byte"
        )
        decoder = decoders(*steps, {"type": "Fuse"})
        super().__init__(unknown, list(entries.values()), written_document(model, decoder))
        self.end_of_text = characters.index(END_ENTRY) if has_end else None
        self._first_extra = len(characters)
        self._id_of_code_point = np.full(0x110000, -1, np.int32)
        codes = [ord(DOCUMENT_END if character == END_ENTRY else character) for character in characters]
        self._id_of_code_point[codes] = np.arange(len(characters))

    def _encode(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        unknown: Counter[str] = Counter()
        ids = [np.empty(0, self.dtype)]
        for start in range(0, len(text), PIECE):
            codes = np.frombuffer(text[start : start + PIECE].encode("utf-32-le", "surrogatepass"), "<u4")
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
        """Replace missing characters by the ids of their UTF-8 bytes.

        Args:
            ids: Ids of all characters (characters,).
            missing: Mask of the characters that the vocabulary lacks (characters,), bool.
            lost: The missing characters, in order.

        Returns:
            Ids (tokens,).
        """
        lengths = np.ones(len(ids), np.int64)
        lengths[missing] = [len(character.encode()) for character in lost]
        is_byte = np.repeat(missing, lengths)
        spread = np.repeat(ids, lengths)
        spread[is_byte] = self._first_extra + np.frombuffer(lost.encode(), np.uint8).astype(np.int32)
        return spread


class ByteTokenizer(Tokenizer):
    """Tokenizer whose tokens are UTF-8 bytes. The id of a token is the value of the byte.

    Args:
        end_of_text: Whether token 256 ends a document.
    """

    kind = "byte"

    def __init__(self, end_of_text: bool = False) -> None:
        symbols, pieces = byte_symbols(), [bytes([byte]) for byte in range(256)]
        decoder: list[dict[str, Any]] = [BYTE_LEVEL]
        if end_of_text:
            self.end_of_text = len(pieces)
            symbols, pieces, decoder = [*symbols, END_ENTRY], [*pieces, b""], [DECODED_END, *decoder]
        model = pair_encoding(symbols)
        super().__init__("byte", pieces, written_document(model, decoders(*decoder), pre_tokenizer=BYTE_LEVEL))

    def _encode(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        ids = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        if self.end_of_text is None or DOCUMENT_END not in text:
            return ids.copy(), Counter()
        # A surrogate has three bytes, the first is 0xED and the second at least 0xA0, as in no other character.
        starts = np.flatnonzero((ids[:-1] == 0xED) & (ids[1:] >= 0xA0))
        ids = ids.astype(self.dtype)
        ids[starts] = self.end_of_text
        return np.delete(ids, np.concatenate([starts + 1, starts + 2])), Counter()
