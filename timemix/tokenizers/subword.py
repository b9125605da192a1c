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
from timemix.tokenizers.base import DOCUMENT_END, Tokenizer, join_documents
from timemix.tokenizers.document import (
    BYTE_LEVEL,
    DECODED_END,
    END_ENTRY,
    byte_symbols,
    decoders,
    in_order,
    pair_encoding,
    written_document,
)
from timemix.tokenizers.pieces import PIECE, WORD_END, pieces

LONGEST_WORD = 1024
"""Largest number of characters of a word in training. Training time grows with the square of the length of a word."""

_LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD + 1}}}|\s{{{LONGEST_WORD + 1}}}")

_SPLITTING = pre_tokenizers.ByteLevel(add_prefix_space=False)


class SubwordTokenizer(Tokenizer):
    """Tokenizer whose tokens are frequent byte sequences within words (byte-level byte pair encoding).

    Args:
        symbols: Tokens in the order of their ids, with a printable character for each byte, and perhaps END_ENTRY.
        merges: Pairs of symbols that are merged, in order.
    """

    kind = "subword"
    border = WORD_END

    def __init__(self, symbols: Sequence[str], merges: Sequence[Sequence[str]]) -> None:
        model = pair_encoding(symbols, merges=merges)
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        has_end = END_ENTRY in symbols
        pieces = [b"" if symbol == END_ENTRY else bytes(map(byte_of.__getitem__, symbol)) for symbol in symbols]
        pre_tokenizer = BYTE_LEVEL | {"use_regex": True}
        decoder = decoders(*([DECODED_END] if has_end else []), BYTE_LEVEL)
        super().__init__("byte", pieces, written_document(model, decoder, pre_tokenizer=pre_tokenizer))
        self.end_of_text = symbols.index(END_ENTRY) if has_end else None
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
        documents = [piece.split(DOCUMENT_END) for piece in batch]

        def encodings() -> Any:
            return self._library.encode_batch_fast([text for texts in documents for text in texts])

        found = iter(interruptible(encodings) if sum(map(len, batch)) > PIECE else encodings())
        ids = [join_documents([next(found).ids for _ in texts], self.end_of_text) for texts in documents]
        return [np.array(piece, self.dtype) for piece in ids]


def train_subwords(parts: Iterable[str], vocab_size: int, end_of_text: bool) -> SubwordTokenizer:
    """Train a subword tokenizer of at most `vocab_size` tokens on the parts of a text."""
    ends = [END_ENTRY] if end_of_text else []
    least = 256 + len(ends)
    if vocab_size < least:
        needs = "all bytes and the end of text" if ends else "all bytes"
        raise InvalidValue(f"data.vocab_size is {vocab_size}; a subword vocabulary needs at least {least}, for {needs}")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = _SPLITTING
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ends), initial_alphabet=byte_symbols(), special_tokens=[], show_progress=False
    )
    documents = (document for piece in pieces(parts) for document in piece.split(DOCUMENT_END))
    texts = (text for document in documents for text in _without_long_words(document))
    interruptible(lambda: library.train_from_iterator(texts, trainer))
    model = json.loads(library.to_str())["model"]
    return SubwordTokenizer(in_order(model["vocab"]) + ends, model["merges"])


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
