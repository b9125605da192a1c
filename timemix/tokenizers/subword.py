"""Tokens that are byte-level subwords."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from timemix.errors import InvalidValue
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.document import BYTE_LEVEL, byte_symbols, in_order, pair_encoding, written_document
from timemix.tokenizers.pieces import pieces


class SubwordTokenizer(Tokenizer):
    """A token is a frequent sequence of UTF-8 bytes, within a word: byte-level byte pair encoding."""

    kind = "subword"

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
        return [np.array(encoding.ids, self.dtype) for encoding in self._library.encode_batch_fast(batch)]


def train_subwords(parts: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    if vocab_size < 256:
        raise InvalidValue(f"a subword vocabulary of {vocab_size} cannot hold the 256 bytes; raise data.vocab_size")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=byte_symbols(), special_tokens=[], show_progress=False
    )
    library.train_from_iterator(pieces(parts), trainer)
    model = json.loads(library.to_str())["model"]
    return SubwordTokenizer(in_order(model["vocab"]), model["merges"])
