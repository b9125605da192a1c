"""The one exception that a person can cause."""

import difflib
import typing

LONGEST = 1000
"""Characters of a message at most."""


class UserError(Exception):
    """Something outside the program is wrong: a path, a value, a file, a prompt.

    The message is one sentence that names the thing and the way out. The command line prints it
    without a traceback and exits with status 2. What it quotes of a file keeps it neither from being one line,
    without control characters, nor short: the middle of a long one is left out.
    """

    def __init__(self, sentence: str) -> None:
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence)
        if len(shown) > LONGEST:
            shown = f"{shown[: LONGEST // 2 - 5]} ... {shown[-LONGEST // 2 :]}"
        super().__init__(shown)


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """End of an error sentence: the nearest right name, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
