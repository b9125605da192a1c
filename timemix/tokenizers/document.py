"""The parts of a tokenizer.json, in the format of the `tokenizers` library."""

from collections.abc import Sequence
from typing import Any

END_ENTRY = "<end of text>"
"""Entry of the token that ends a document. No text has this token: the entry is neither one character nor one word, and
its space is not the symbol of a byte."""

DECODED_END = {"type": "Replace", "pattern": {"Regex": f"^{END_ENTRY}$"}, "content": ""}
"""Decoder that decodes END_ENTRY to nothing."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def written_document(
    model: dict[str, Any],
    decoder: dict[str, Any],
    *,
    pre_tokenizer: dict[str, Any] | None = None,
    normalizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of a tokenizer.json of the `tokenizers` library."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def pair_encoding(
    symbols: Sequence[str],
    *,
    merges: Sequence[Sequence[str]] = (),
    unk_token: str | None = None,
    byte_fallback: bool = False,
) -> dict[str, Any]:
    """Return the model part of a tokenizer.json for byte pair encoding."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": numbered(symbols),
        "merges": list(merges),
    }


def byte_symbols() -> list[str]:
    """Return the printable characters for the 256 bytes in byte-level vocabularies, in order of byte value."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def decoders(*parts: dict[str, Any]) -> dict[str, Any]:
    """Return the decoder that applies other decoders, one after another."""
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "decoders": list(parts)}


def numbered(entries: Sequence[str]) -> dict[str, int]:
    """Return a dictionary from each entry to its id, which is its index."""
    return {entry: i for i, entry in enumerate(entries)}


def in_order(vocabulary: dict[str, int]) -> list[str]:
    """Return the entries of a vocabulary by ascending id."""
    return sorted(vocabulary, key=vocabulary.__getitem__)
