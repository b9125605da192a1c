"""Tokenizers trained on a text, and read from a file."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from timemix.errors import DamagedFile, InvalidValue
from timemix.storage.json_files import parse_json
from timemix.tokenizers.base import KINDS, UNKNOWN, Tokenizer, refuse_surrogates
from timemix.tokenizers.character import ByteTokenizer, CharacterTokenizer
from timemix.tokenizers.document import in_order
from timemix.tokenizers.subword import SubwordTokenizer, train_subwords
from timemix.tokenizers.word import WordTokenizer, train_words


def train_tokenizer(
    kind: str,
    text: str | Iterable[str],
    *,
    vocab_size: int = 4096,
    unknown: str = "error",
    each: Callable[[Callable[[str], Counter[str]], Iterable[str]], Iterable[Counter[str]]] = map,
) -> Tokenizer:
    """A tokenizer whose vocabulary comes from `text`, a string or its parts in order.

    vocab_size: tokens, at most; for subwords, and for words with unknown="unk" (the most frequent ones).
        Otherwise the vocabulary is every distinct character or word of the text, in sorted order.
    unknown: see Tokenizer; "byte" is not for words.
    each: `map`, or the like in several processes, for counting words.

    Raises InvalidValue when the text is empty or holds a lone surrogate, or when a choice cannot be served.
    """
    if kind not in KINDS:
        raise InvalidValue(f"there is no tokenizer {kind!r}; choose one of {', '.join(KINDS)}")
    if unknown not in ("error", "unk", "byte"):
        raise InvalidValue(f"there is no choice {unknown!r} for unknown text; choose error, unk or byte")
    parts = _without_surrogates([text] if isinstance(text, str) else text)
    first = next(parts, "")
    if not first:
        raise InvalidValue(f"a {kind} tokenizer cannot be made from an empty text; give a text to train it on")
    parts = itertools.chain([first], parts)
    if kind == "character":
        return CharacterTokenizer(sorted(set().union(*parts)), unknown)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "word":
        return train_words(parts, vocab_size, unknown, each)
    return train_subwords(parts, vocab_size)


def _without_surrogates(parts: Iterable[str]) -> Iterator[str]:
    """The parts that are not empty."""
    before = 0
    for part in parts:
        refuse_surrogates(part, before)
        before += len(part)
        if part:
            yield part


def tokenizer_from_json(document: str) -> Tokenizer:
    """The tokenizer of a `to_json()`."""
    return _from_document(json.loads(document))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json` that `Tokenizer.save` wrote.

    Raises FileError when the file is missing, damaged, or made by another program.
    """
    document = parse_json(Path(path), "the tokenizer ")
    try:
        tokenizer = _from_document(document)
        if not tokenizer.vocab_size:
            raise ValueError("an empty vocabulary")
        if json.loads(tokenizer.to_json()) != document:
            raise ValueError("other settings than ours")
    except Exception as error:  # The library raises bare Exception.
        raise DamagedFile(f"{path} is not a tokenizer that timemix wrote; give a tokenizer.json of a run") from error
    return tokenizer


def _from_document(document: dict[str, Any]) -> Tokenizer:
    model = document["model"]
    entries = in_order(model["vocab"])
    if model["type"] == "WordLevel":
        return WordTokenizer(entries[:-1], "unk") if model["unk_token"] == UNKNOWN else WordTokenizer(entries, "error")
    if document["pre_tokenizer"] is None:
        if model["byte_fallback"]:
            return CharacterTokenizer(entries[:-256], "byte")
        if model["unk_token"] is not None:
            return CharacterTokenizer(entries[:-1], "unk")
        return CharacterTokenizer(entries, "error")
    if document["pre_tokenizer"]["use_regex"]:
        return SubwordTokenizer(entries, model["merges"])
    return ByteTokenizer()
