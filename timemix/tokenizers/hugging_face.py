"""Byte-level tokenizers of other programs, in the `tokenizer.json` of the `tokenizers` library.

The tokenizer of the RWKV-4 models that were trained on the Pile (GPT-NeoX) is one of these.
"""

import re
from collections import Counter
from typing import Any

import numpy as np
import tokenizers

from timemix.errors import InvalidValue
from timemix.tokenizers.base import DOCUMENT_END, Tokenizer, join_documents
from timemix.tokenizers.document import byte_symbols
from timemix.tokenizers.pieces import WORD_END, pieces

END_OF_TEXT = "<|endoftext|>"
_UNUSED = "<|unused_{}|>"
_BORDERS = (re.compile(r"[^\W_](?= [^\W_]|\n|[。，！？])"), re.compile(r"[^\W_](?= [^\W_])"))
"""A letter or digit before a space and a word, before a newline, or before a mark of Chinese. The splitting rules of
other programs differ in punctuation, but all of them split here. A tokenizer that puts a space before each text can be
cut only before a space."""
_PROBE = "one two\nthree 12 345\n6 é ä\n木 木。木，Wort！a？b"
"""Text with all kinds of borders."""


class Unsupported(ValueError):
    """The reason why a tokenizer of another program is not supported, as a clause."""


class HuggingFaceTokenizer(Tokenizer):
    """Tokenizer of another program, whose tokens are the tokens of the `tokenizers` library.

    Args:
        document: Content of the `tokenizer.json`, with at least one added token. timemix's own files have none.

    Raises:
        Unsupported: The tokenizer is not byte-level, two tokens have one id, the ids have gaps, it has no added token,
            an added token has several words, or the tokens of a word depend on the words before it.
    """

    kind = "hugging_face"
    border: re.Pattern[str]

    def __init__(self, document: dict[str, Any]) -> None:
        model = document["model"]
        added = {each["id"]: each for each in document["added_tokens"]}
        if not added:
            raise Unsupported("the tokenizer has no added token")
        if len(added) < len(document["added_tokens"]) or len(set(model["vocab"].values())) < len(model["vocab"]):
            raise Unsupported("two tokens have one id")
        # The library ends the process after a merge whose token it cuts inside a character.
        if any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")):
            raise Unsupported("the tokenizer has affixes or dropout, which byte-level tokenizers do not have")
        # A token of byte-level byte pair encoding has a printable character for each byte.
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        # An entry of the vocabulary that is an added token may have other characters.
        entries = {text: i for text, i in model["vocab"].items() if i not in added}
        spelled = {i: bytes(byte_of[character] for character in text) for text, i in entries.items()}
        spelled |= {i: b"" if each["special"] else each["content"].encode() for i, each in added.items()}
        if spelled.keys() != set(range(len(spelled))):
            raise Unsupported("the ids of the tokens have gaps")
        if not (_has_byte_level(document["pre_tokenizer"]) and _has_byte_level(document["decoder"])):
            raise Unsupported("the tokenizer is not byte-level")
        if model["type"] != "BPE":
            raise Unsupported("the tokenizer is no byte pair encoding")
        if any(WORD_END.search(each["content"]) for each in added.values()):
            raise Unsupported("an added token has several words")
        super().__init__("byte", [spelled[i] for i in range(len(spelled))], document)
        self.document = document
        self.end_of_text = next((i for i, each in added.items() if each["content"] == END_OF_TEXT), None)
        self._library = tokenizers.Tokenizer.from_str(self._json)
        if any(self._library.token_to_id(each["content"]) != i for i, each in added.items()):
            raise Unsupported("an added token has another id in the vocabulary")
        self._library.no_truncation()
        self._library.no_padding()
        # As in all tokenizers of timemix, no word of a text becomes the end-of-text token.
        self._library.encode_special_tokens = True
        borders = [border for border in _BORDERS if self._splits_at(border)]
        if not borders:
            raise Unsupported("the tokens of a word depend on the words before it")
        self.border = borders[0]
        self._adds_space = self._split("a") != ["a"]

    def first_size(self, text: str) -> tuple[int, int]:
        """Count the characters and UTF-8 bytes that the first token of a text represents, as in `Tokenizer`."""
        characters, size = super().first_size(text)
        # A space that the tokenizer puts before the text is no part of the text.
        added = self._adds_space and text[:1] not in ("", " ")
        return characters - added, size - added

    def padded(self, vocab_size: int) -> "HuggingFaceTokenizer":
        """Return the tokenizer with more ids, which decode to nothing.

        Args:
            vocab_size: Number of ids, at least the number of tokens.

        Raises:
            InvalidValue: The tokenizer has more tokens.
        """
        if vocab_size < self.vocab_size:
            raise InvalidValue(f"vocab_size={vocab_size} is too small for a tokenizer of {self.vocab_size} tokens")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        unused = [
            {"id": i, "content": _UNUSED.format(i), **flags, "special": True}
            for i in range(self.vocab_size, vocab_size)
        ]
        return HuggingFaceTokenizer(self.document | {"added_tokens": self.document["added_tokens"] + unused})

    def _encode(self, text: str) -> tuple[np.ndarray, Counter[str]]:
        found = [np.empty(0, self.dtype)]
        for piece in pieces([text], border=self.border):
            documents = self._library.encode_batch_fast(piece.split(DOCUMENT_END), add_special_tokens=False)
            found.append(np.array(join_documents([each.ids for each in documents], self.end_of_text), self.dtype))
        return np.concatenate(found), Counter()

    def _splits_at(self, border: re.Pattern[str]) -> bool:
        """Return whether the tokenizer encodes the text after a border as it encodes this text alone."""
        cuts = [match.end() for match in border.finditer(_PROBE)]
        return all(self._split(_PROBE) == self._split(_PROBE[:cut]) + self._split(_PROBE[cut:]) for cut in cuts)

    def _split(self, text: str) -> list[str]:
        """Return the parts of a text that the tokenizer encodes one by one."""
        normalizer, splitter = self._library.normalizer, self._library.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [part for part, _ in splitter.pre_tokenize_str(text)]


def _has_byte_level(part: dict[str, Any] | None) -> bool:
    """Return whether a pre-tokenizer or a decoder converts between bytes and characters."""
    parts = (part or {}).get("pretokenizers", [part or {}])
    return any(each.get("type") == "ByteLevel" for each in parts)
