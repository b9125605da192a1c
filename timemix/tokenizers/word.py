"""The tokenizer of words, which splits text as the original 2021 code did."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import normalizers

from timemix.errors import InvalidValue
from timemix.tokenizers.base import DOCUMENT_END, UNKNOWN, Tokenizer
from timemix.tokenizers.document import DECODED_END, END_ENTRY, numbered, written_document
from timemix.tokenizers.pieces import PART, WORD_END, pieces

# Each character of STANDING_ALONE is a token by itself, as in the 2021 code.
STANDING_ALONE = "\n.,?!:;-—|'\"`()0123456789[]{}=+*\\/~&$#%"
WORD = re.compile(f"[{re.escape(STANDING_ALONE)}]|[^ {re.escape(STANDING_ALONE)}]+")


class WordTokenizer(Tokenizer):
    """Tokenizer whose tokens are lower-case words and the characters STANDING_ALONE, as in the 2021 code.

    Decoding puts a space between tokens, but no space after a newline. Case and spacing are lost.

    Args:
        words: The words and characters, in the order of their ids, and perhaps END_ENTRY.
        unknown: "error" or "unk" (<unk> becomes the last entry).
    """

    kind = "word"
    border = WORD_END
    spaced = True

    def __init__(self, words: Sequence[str], unknown: str) -> None:
        entries = [*words, UNKNOWN] if unknown == "unk" else list(words)
        model = {
            "type": "WordLevel",
            "vocab": numbered(entries),
            # The library requires an unknown token. [ and ] are tokens by themselves, so [UNK] is never a word.
            "unk_token": UNKNOWN if unknown == "unk" else "[UNK]",
        }
        alone = {
            "type": "Split",
            "pattern": {"Regex": f"[{re.escape(STANDING_ALONE)}]"},
            "behavior": "Isolated",
            "invert": False,
        }
        spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
        has_end = END_ENTRY in entries
        join = [
            *([DECODED_END] if has_end else []),
            # WordPiece joins tokens with spaces. # is a token by itself, so no word begins with the prefix ##.
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
        super().__init__(unknown, [b"" if word == END_ENTRY else word.encode() for word in entries], document)
        self.end_of_text = entries.index(END_ENTRY) if has_end else None
        self._id_of_word = numbered([DOCUMENT_END if word == END_ENTRY else word for word in entries])

    def _first_unit(self, text: str) -> str:
        found = WORD.search(text)
        return found[0] if found else ""

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


def train_words(
    parts: Iterable[str], vocab_size: int, unknown: str, each: Callable[..., Any], end_of_text: bool
) -> WordTokenizer:
    """Train a word tokenizer on the parts of a text. `train_tokenizer` describes the arguments."""
    if unknown == "byte":
        raise InvalidValue("data.unknown is byte, which a word tokenizer does not support; choose unk or error")
    counts: Counter[str] = Counter()
    for counted in each(count_words, pieces(parts, PART)):
        counts.update(counted)
    del counts[DOCUMENT_END]
    if not counts:
        raise InvalidValue("the text has no words, so no word tokenizer can be trained on it; give another text")
    ends = [END_ENTRY] if end_of_text else []
    if unknown == "error":
        return WordTokenizer(sorted(counts) + ends, unknown)
    # The text itself may contain the word <unk>.
    del counts[UNKNOWN]
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: max(0, vocab_size - 1 - len(ends))]
    return WordTokenizer(sorted(frequent) + ends, unknown)


def count_words(text: str) -> Counter[str]:
    """Count the occurrences of each word in a text, with the splitting rule of the 2021 code."""
    return Counter(itertools.chain.from_iterable(_words(text)))


def _words(text: str) -> Iterator[list[str]]:
    """Yield the words of a text in lists, with the splitting rule of the 2021 code. DOCUMENT_END counts as a word."""
    for piece in pieces([text]):
        first, *others = piece.split(DOCUMENT_END)
        words = WORD.findall(_lower(first))
        for document in others:
            words.append(DOCUMENT_END)
            words += WORD.findall(_lower(document))
        yield words


def _lower(text: str) -> str:
    """Lower-case each character by itself, like the `tokenizers` library.

    In contrast, `str.lower` lower-cases a sigma according to its context.
    """
    if text.isascii():
        return text.lower()
    lowercase = normalizers.Lowercase()
    return text.translate({ord(character): lowercase.normalize_str(character) for character in set(text)})
