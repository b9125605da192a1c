"""The tokenizer of byte-level subwords."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from timemix.errors import InvalidValue
from timemix.runtime.processes import interruptible
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.document import BYTE_LEVEL, byte_symbols, in_order, pair_encoding, written_document
from timemix.tokenizers.pieces import PIECE, WORD_END, pieces

LONGEST_WORD = 1024
"""Largest number of characters of a word in training. Training time grows with the square of the length of a word."""

_LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD + 1}}}|\s{{{LONGEST_WORD + 1}}}")

_SPLITTING = pre_tokenizers.ByteLevel(add_prefix_space=False)


class SubwordTokenizer(Tokenizer):
    """Tokenizer whose tokens are frequent byte sequences within words (byte-level byte pair encoding).

    Args:
        symbols: Tokens in the order of their ids, with a printable character for each byte.
        merges: Pairs of symbols that are merged, in order.
    """

    kind = "subword"
    border = WORD_END

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
        def encodings() -> Any:
            return self._library.encode_batch_fast(batch)

        found = interruptible(encodings) if sum(map(len, batch)) > PIECE else encodings()
        return [np.array(encoding.ids, self.dtype) for encoding in found]


def train_subwords(parts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """Train a subword tokenizer of at most `vocab_size` tokens on the parts of a text."""
    if vocab_size < 256:
        raise InvalidValue(f"data.vocab_size is {vocab_size}; a subword vocabulary needs at least 256, for all bytes")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = _SPLITTING
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=byte_symbols(), special_tokens=[], show_progress=False
    )
    texts = (text for piece in pieces(parts) for text in _without_long_words(piece))
    interruptible(lambda: library.train_from_iterator(texts, trainer))
    model = json.loads(library.to_str())["model"]
    return SubwordTokenizer(in_order(model["vocab"]), model["merges"])


def _without_long_words(piece: str) -> Iterator[str]:
    """Yield the text in parts, with a cut after every LONGEST_WORD characters of a long word."""
    start = 0
    # Splitting is slow and long words are rare, so the text is split only if a search finds a long word.
    if _LONG_RUN.search(piece):
        for _, (begin, end) in _SPLITTING.pre_tokenize_str(piece):
            for cut in range(begin + LONGEST_WORD, end, LONGEST_WORD):
                yield piece[start:cut]
                start = cut
    yield piece[start:]
