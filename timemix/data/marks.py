"""Marks in the texts of the pipeline: ends of documents, and the parts of a conversation that the loss counts.

Each mark is a lone surrogate, which is no character of a text.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from timemix.data.shards import MASK_TYPE
from timemix.tokenizers.base import DOCUMENT_END, Tokenizer

COUNTED, UNCOUNTED = "\udc01", "\udc02"
"""The loss counts the tokens after COUNTED, and does not count the tokens after UNCOUNTED. No token contains a mark, so
the text before a mark and the text after it have tokens of their own."""

LOSS_MARKS = (COUNTED, UNCOUNTED)

MARKS = (DOCUMENT_END, *LOSS_MARKS)
"""All marks: first the end of a document, then the loss marks."""

MARK_BYTES = len(DOCUMENT_END.encode("utf-8", "surrogatepass"))
"""Number of bytes of each mark."""

_LOSS_MARK = re.compile(f"([{COUNTED}{UNCOUNTED}])")


def without(text: str, some: Sequence[str] = MARKS) -> str:
    """Return a text without some of the marks, by default without all."""
    for mark in some:
        text = text.replace(mark, "")
    return text


def count_marks(text: str) -> int:
    """Return the number of marks in a text."""
    return sum(map(text.count, MARKS))


def newest_loss_mark(text: str, before: str) -> str:
    """Return the last COUNTED or UNCOUNTED in a text, or `before` if there is none."""
    place = max(text.rfind(COUNTED), text.rfind(UNCOUNTED))
    return before if place < 0 else text[place]


def first_unmarked(text: str) -> str:
    """Return the text up to a mark, without the marks before it."""
    segments = re.split(f"[{''.join(MARKS)}]", text)
    return next(filter(None, segments), "")


def encode_marked(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray | None, Counter[str]]:
    """Encode a text that may have marks.

    Args:
        tokenizer: The tokenizer, with an `end_of_text` if the text has DOCUMENT_END.
        text: The text. If it has COUNTED or UNCOUNTED, it begins with one of the two.

    Returns:
        Token ids (tokens,), the loss mask (tokens,), which is None for a text without COUNTED and UNCOUNTED, and the
        number of occurrences of each unknown character or word.
    """
    if not text.startswith(LOSS_MARKS):
        ids, unknown = tokenizer.encode_documents(text)
        return ids, None, unknown
    _, *parts = _LOSS_MARK.split(text)
    found, mask, unknown = [np.empty(0, tokenizer.dtype)], [np.empty(0, MASK_TYPE)], Counter[str]()
    for mark, segment in zip(parts[::2], parts[1::2], strict=True):
        if segment:
            ids, missing = tokenizer.encode_documents(segment)
            found.append(ids)
            mask.append(np.full(len(ids), mark == COUNTED, MASK_TYPE))
            unknown.update(missing)
    return np.concatenate(found), np.concatenate(mask), unknown
