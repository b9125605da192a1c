"""Decoding of token ids, one by one or in blocks, to text."""

import codecs
from collections.abc import Sequence

import numpy as np

from timemix.errors import InvalidValue


class StreamDecoder:
    """Decode tokens one by one.

    The joined results of all `push` calls and a final `flush` equal the result of `Tokenizer.decode`.

    Args:
        pieces: UTF-8 bytes of each token, by id.
        spaced: Whether a space comes between two tokens, except after a newline.
    """

    def __init__(self, pieces: Sequence[bytes], spaced: bool) -> None:
        self._pieces = pieces
        self._spaced = spaced
        self._space_due = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Decode the next token.

        Args:
            token: Token id.

        Returns:
            The text that is complete after the token. The text may be empty.

        Raises:
            InvalidValue: The id is outside the vocabulary.
        """
        piece = piece_of(token, self._pieces)
        if not self._spaced:
            return self._utf8.decode(piece)
        space = b" " if self._space_due else b""
        self._space_due = piece != b"\n"
        return self._utf8.decode(space + piece)

    def push_all(self, ids: np.ndarray) -> str:
        """Decode the next tokens. The result equals the joined results of `push`.

        Args:
            ids: Token ids (tokens,).

        Returns:
            The text that is complete after the tokens.

        Raises:
            InvalidValue: An id is outside the vocabulary.
        """
        found = pieces_of(ids, self._pieces)
        if not self._spaced or not found:
            return self._utf8.decode(b"".join(found))
        # No word contains a space or newline.
        joined = b" ".join([b"", *found] if self._space_due else found).replace(b"\n ", b"\n")
        self._space_due = found[-1] != b"\n"
        return self._utf8.decode(joined)

    def flush(self) -> str:
        """End the text.

        Returns:
            U+FFFD if the last character is incomplete, else an empty string.
        """
        return self._utf8.decode(b"", final=True)


def piece_of(token: int, pieces: Sequence[bytes]) -> bytes:
    """Return the bytes of a token.

    Raises:
        InvalidValue: The id is outside the vocabulary.
    """
    if not 0 <= token < len(pieces):
        raise InvalidValue(f"token {token} is outside the vocabulary of {len(pieces)}; ids start at 0")
    return pieces[token]


def pieces_of(ids: np.ndarray, pieces: Sequence[bytes]) -> list[bytes]:
    """Return the bytes of each token.

    Args:
        ids: Token ids (tokens,).
        pieces: Bytes of each token of the vocabulary, by id.

    Raises:
        InvalidValue: An id is outside the vocabulary.
    """
    outside = (ids < 0) | (ids >= len(pieces))
    if outside.any():
        raise InvalidValue(f"token {ids[outside][0]} is outside the vocabulary of {len(pieces)}; ids start at 0")
    return [pieces[token] for token in ids.astype(np.int64).tolist()]
