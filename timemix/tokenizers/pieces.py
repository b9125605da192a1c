"""Long texts in pieces that are encoded alone and give the ids of the whole."""

import re
from collections.abc import Iterable, Iterator

PIECE = 1 << 16
"""Characters encoded at a time, at least."""

PART = 1 << 20
"""Characters that a process is given at a time, at least."""


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
