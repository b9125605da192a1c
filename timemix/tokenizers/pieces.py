"""Division of long texts into pieces. Encoding the pieces one by one gives the same ids as encoding the whole text."""

import re
from collections.abc import Iterable, Iterator

PIECE = 1 << 16
"""Least number of characters that are encoded at a time."""

PART = 1 << 20
"""Least number of characters that a process gets at a time."""


WORD_END = re.compile(r"\S(?=[ \n])")
"""A non-space character before a space or newline. No word, and no match of the byte-level splitting rule, extends
across the end of this character or depends on text before this end."""


def pieces(parts: Iterable[str], size: int | None = None, border: re.Pattern[str] = WORD_END) -> Iterator[str]:
    """Cut a text into pieces of at least `size` characters.

    A cut follows a match of `border`. No token extends across a cut or depends on text before the cut, so joining the
    ids of the pieces gives the ids of the whole text. The cuts do not depend on the division of the text into `parts`.
    A text without a possible cut is one piece in memory, even if the text is very long.

    Args:
        parts: Parts of the text, in order.
        size: Least number of characters of a piece, or None for PIECE characters.
        border: Pattern of one character, which may look ahead at two more characters.

    Yields:
        The pieces, in order.
    """
    size = PIECE if size is None else size
    rest, searched = "", 0
    for part in parts:
        rest += part
        start = 0
        while match := border.search(rest, max(start + size, searched)):
            yield rest[start : match.end()]
            start = match.end()
        rest = rest[start:]
        # Only the next part of the text shows whether a cut can follow one of the last two characters of this part.
        searched = max(0, len(rest) - 2)
    if rest:
        yield rest


def equal_pieces(parts: Iterable[str], size: int) -> Iterator[str]:
    """Yield the text of `parts` in pieces of `size` characters. The last piece may be shorter."""
    rest = ""
    for part in parts:
        rest += part
        whole = len(rest) - len(rest) % size
        for start in range(0, whole, size):
            yield rest[start : start + size]
        rest = rest[whole:]
    if rest:
        yield rest
