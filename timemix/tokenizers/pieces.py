"""Long texts cut into pieces that can be encoded one by one, with the same ids as the whole text."""

import re
from collections.abc import Iterable, Iterator

PIECE = 1 << 16
"""Least number of characters that are encoded at a time."""

PART = 1 << 20
"""Least number of characters that a process gets at a time."""


_BORDER = re.compile(r"\S(?=[ \n])")


def pieces(parts: Iterable[str], size: int | None = None) -> Iterator[str]:
    """Cut a text before a space or newline that follows another character, into pieces of `size` characters or more.

    No word, and no match of the byte-level splitting rule, extends across such a border or depends on text before it.
    So the ids of the pieces are the ids of the text. The borders do not depend on how the text is divided into `parts`.
    A text without a border is one piece in memory, however long.

    Args:
        parts: Parts of the text, in order.
        size: Least number of characters of a piece; None: PIECE.

    Yields:
        The pieces, in order.
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
        # The next part decides whether the last character is before a border.
        searched = max(0, len(rest) - 1)
    if rest:
        yield rest


def equal_pieces(parts: Iterable[str], size: int) -> Iterator[str]:
    """Yield the text of `parts` in pieces of `size` characters; the last piece may be shorter."""
    rest = ""
    for part in parts:
        rest += part
        whole = len(rest) - len(rest) % size
        for start in range(0, whole, size):
            yield rest[start : start + size]
        rest = rest[whole:]
    if rest:
        yield rest
