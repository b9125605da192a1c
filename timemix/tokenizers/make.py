"""Tokenizers trained on a text or loaded from a file."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from timemix.errors import DamagedFile, InvalidValue
from timemix.storage.files import LARGEST_OF_TEXT
from timemix.storage.json_files import parse_json
from timemix.tokenizers.base import DOCUMENT_END, KINDS, UNKNOWN, Tokenizer, refuse_surrogates
from timemix.tokenizers.character import ByteTokenizer, CharacterTokenizer
from timemix.tokenizers.document import END_ENTRY, in_order
from timemix.tokenizers.hugging_face import HuggingFaceTokenizer, Unsupported
from timemix.tokenizers.subword import SubwordTokenizer, train_subwords
from timemix.tokenizers.word import WordTokenizer, train_words
from timemix.tokenizers.world import WorldTokenizer


def train_tokenizer(
    kind: str,
    text: str | Iterable[str],
    *,
    vocab_size: int = 4096,
    unknown: str = "error",
    end_of_text: bool = False,
    each: Callable[[Callable[[str], Counter[str]], Iterable[str]], Iterable[Counter[str]]] = map,
) -> Tokenizer:
    """Train a tokenizer on a text.

    Args:
        kind: One of KINDS: "character", "byte", "word" or "subword".
        text: The text, or its parts in order. The text must not be empty. With `end_of_text`, it may contain
            DOCUMENT_END.
        vocab_size: Largest number of tokens of a subword tokenizer (at least 256), or of a word tokenizer with
            unknown="unk". With unknown="unk", a word tokenizer has the most frequent words. A character tokenizer, or a
            word tokenizer with unknown="error", has every distinct character or word of the text, sorted.
        unknown: Treatment of text outside the vocabulary, as in `Tokenizer`. Word tokenizers do not support "byte".
        end_of_text: Whether one of the tokens ends a document. Otherwise, `Tokenizer.end_of_text` is None.
        each: The function `map`, or a parallel `map` that counts words in several processes.

    Returns:
        The tokenizer.

    Raises:
        InvalidValue: The text is empty or has a lone surrogate, or a value is not supported.
    """
    if kind not in KINDS:
        raise InvalidValue(f"kind={kind!r} is not supported; choose {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if unknown not in ("error", "unk", "byte"):
        raise InvalidValue(f"unknown={unknown!r} is not supported; choose error, unk or byte")
    parts = _without_surrogates([text] if isinstance(text, str) else text, DOCUMENT_END if end_of_text else "")
    first = next(parts, "")
    if not first:
        raise InvalidValue(f"the text is empty, so no {kind} tokenizer can be trained on it; give a longer text")
    parts = itertools.chain([first], parts)
    if kind == "character":
        ends = [END_ENTRY] if end_of_text else []
        return CharacterTokenizer(sorted(set().union(*parts) - {DOCUMENT_END}) + ends, unknown)
    if kind == "byte":
        return ByteTokenizer(end_of_text)
    if kind == "word":
        return train_words(parts, vocab_size, unknown, each, end_of_text)
    return train_subwords(parts, vocab_size, end_of_text)


def _without_surrogates(parts: Iterable[str], allowed: str) -> Iterator[str]:
    """Yield the parts that are not empty, and refuse lone surrogates except an allowed one."""
    before = 0
    for part in parts:
        refuse_surrogates(part.replace(allowed, " ") if allowed else part, before)
        before += len(part)
        if part:
            yield part


def tokenizer_from_json(document: str) -> Tokenizer:
    """Create a tokenizer from the result of `Tokenizer.to_json`.

    Args:
        document: The JSON document.

    Returns:
        The tokenizer.
    """
    return _from_document(json.loads(document))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json` that `Tokenizer.save` wrote, or a byte-level `tokenizer.json` of another program.

    Args:
        path: The file.

    Returns:
        The tokenizer.

    Raises:
        FileError: The file is missing, damaged, or from another program.
    """
    document = parse_json(Path(path), "the tokenizer ", LARGEST_OF_TEXT)
    try:
        tokenizer = _from_document(document)
        if not tokenizer.vocab_size:
            raise ValueError("the vocabulary is empty")
        if json.loads(tokenizer.to_json()) != document:
            raise ValueError("the settings differ from the settings of timemix")
    except Unsupported as error:
        raise DamagedFile(
            f"{path} is a tokenizer file of another program that timemix does not support: {error}; give the"
            " tokenizer.json of a run"
        ) from error
    except Exception as error:  # The library raises bare Exception.
        raise DamagedFile(f"{path} is no tokenizer file of timemix; give the tokenizer.json of a run") from error
    return tokenizer


def _from_document(document: dict[str, Any]) -> Tokenizer:
    """Create the tokenizer that a tokenizer.json describes."""
    if document["added_tokens"]:
        return HuggingFaceTokenizer(document)
    model = document["model"]
    entries = in_order(model["vocab"])
    if model["type"] == "WordLevel":
        return WordTokenizer(entries[:-1], "unk") if model["unk_token"] == UNKNOWN else WordTokenizer(entries, "error")
    if model["type"] == "WordPiece":
        return WorldTokenizer.from_vocabulary(entries)
    if document["pre_tokenizer"] is None:
        if model["byte_fallback"]:
            return CharacterTokenizer(entries[:-256], "byte")
        if model["unk_token"] is not None:
            return CharacterTokenizer(entries[:-1], "unk")
        return CharacterTokenizer(entries, "error")
    if document["pre_tokenizer"]["use_regex"]:
        return SubwordTokenizer(entries, model["merges"])
    return ByteTokenizer(END_ENTRY in entries)
