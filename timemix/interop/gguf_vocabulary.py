"""Vocabularies in GGUF that give the ids of timemix in llama.cpp.

llama.cpp has two kinds of tokenizers that fit:

    "rwkv"    the longest entry that matches, over bytes: World, byte and character vocabularies
    "gpt2"    byte pair encoding of the words of GPT-2: subword vocabularies
"""

import json
from dataclasses import dataclass
from typing import Any

from timemix.errors import InvalidValue
from timemix.tokenizers.base import Tokenizer
from timemix.tokenizers.document import byte_symbols

_WAY_OUT = "export the model with --to pth, or train a model with data.tokenizer byte, subword or world"
# UTF-8 never contains this byte.
_NO_TEXT = b"\xff"


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary in GGUF.

    Args:
        model: Kind of the tokenizer in llama.cpp, "rwkv" or "gpt2".
        tokens: Entries, in the order of their ids.
        kinds: Kind of each entry: "NORMAL", "USER_DEFINED" (an entry that no merge makes) or "CONTROL" (an entry that
            decodes to nothing).
        merges: Pairs of entries that are merged, each with a space between, in order. Empty for "rwkv".
        end: Id of the token that ends a text, or None.
    """

    model: str
    tokens: list[str]
    kinds: list[str]
    merges: list[str]
    end: int | None


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary of a tokenizer in GGUF.

    Args:
        tokenizer: The tokenizer.

    Raises:
        InvalidValue: No tokenizer of llama.cpp gives the ids of this tokenizer.
    """
    document = json.loads(tokenizer.to_json())
    if document["model"].get("merges"):
        return _of_pairs(tokenizer, document)
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    if tokenizer.spaced or document["added_tokens"]:
        raise InvalidValue(f"llama.cpp has no tokenizer of the kind {tokenizer.kind}; {_WAY_OUT}")
    if tokenizer.unknown == "unk":
        raise InvalidValue(f"llama.cpp has no tokenizer with data.unknown unk; {_WAY_OUT}")
    if tokenizer.unknown == "error" and max(map(len, pieces)) > 1:
        raise InvalidValue(
            "llama.cpp needs the 256 bytes in a vocabulary with characters outside ASCII; export the model with --to"
            " pth, or train a model with data.unknown byte"
        )
    return _of_matches(pieces, tokenizer.end_of_text)


def _of_matches(pieces: list[bytes], end: int | None) -> Vocabulary:
    """Return a vocabulary whose tokens are the longest entries that match.

    The first of several entries with equal bytes is the token of these bytes. timemix never encodes a text to the
    others, nor to entries without bytes.
    """
    first = {piece: token for token, piece in reversed(list(enumerate(pieces))) if piece}
    is_text = [first.get(piece) == token for token, piece in enumerate(pieces)]
    tokens = [
        _escaped(piece if text else _NO_TEXT + f"<unused {token}>".encode())
        for token, (piece, text) in enumerate(zip(pieces, is_text, strict=True))
    ]
    return Vocabulary("rwkv", tokens, ["NORMAL" if text else "CONTROL" for text in is_text], [], end)


def _escaped(piece: bytes) -> str:
    """Return bytes as llama.cpp reads them: printable ASCII, and an escape sequence for each other byte."""
    return "".join(chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}" for byte in piece)


def _of_pairs(tokenizer: Tokenizer, document: dict[str, Any]) -> Vocabulary:
    """Return a vocabulary of byte pair encoding.

    Raises:
        InvalidValue: The tokenizer splits or changes text in another way than GPT-2.
    """
    model, added = document["model"], {each["id"]: each for each in document["added_tokens"]}
    if not _is_like_gpt2(document):
        raise InvalidValue(
            "llama.cpp splits and merges text as the tokenizer of GPT-2, unlike the tokenizer of this model;"
            f" {_WAY_OUT}"
        )
    entries = {i: text for text, i in model["vocab"].items()} | {i: each["content"] for i, each in added.items()}
    kinds = {i: "CONTROL" if each["special"] else "USER_DEFINED" for i, each in added.items()}
    if tokenizer.end_of_text is not None:
        kinds[tokenizer.end_of_text] = "CONTROL"
    # If a file names no end of text, llama.cpp takes token 11 for it. No text has the token of the byte 0xFF.
    end = model["vocab"][byte_symbols()[0xFF]] if tokenizer.end_of_text is None else tokenizer.end_of_text
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    ids = range(tokenizer.vocab_size)
    return Vocabulary("gpt2", [entries[i] for i in ids], [kinds.get(i, "NORMAL") for i in ids], merges, end)


def _is_like_gpt2(document: dict[str, Any]) -> bool:
    """Return whether a tokenizer of byte pair encoding splits, changes and merges text as the tokenizer of GPT-2."""
    splitting, model = document["pre_tokenizer"] or {}, document["model"]
    return (
        splitting.get("type") == "ByteLevel"
        and splitting.get("use_regex", True)
        and not splitting.get("add_prefix_space")
        and document["normalizer"] is None
        and not model.get("ignore_merges")
        and model["vocab"].keys() >= set(byte_symbols())
        and not any(each[flag] for each in document["added_tokens"] for flag in ("lstrip", "rstrip", "single_word"))
    )
