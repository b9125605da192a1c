"""Tokenizers with an end of text: one token after each document, which no text can produce."""

import json
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tiers import examples
from timemix.errors import InvalidValue
from timemix.tokenizers.base import DOCUMENT_END
from timemix.tokenizers.hugging_face import HuggingFaceTokenizer
from timemix.tokenizers.make import load_tokenizer, tokenizer_from_json, train_tokenizer
from timemix.tokenizers.world import WorldTokenizer

TEXT = "The cat, the dog; <end of text> <unk> \udc00It's 42%.\n\n二千年前、é\udc00\udc00 a"
CHOICES = [
    ("character", "error"),
    ("character", "unk"),
    ("character", "byte"),
    ("byte", "byte"),
    ("word", "error"),
    ("word", "unk"),
    ("subword", "byte"),
]
TRAINED = {
    choice: train_tokenizer(choice[0], TEXT, vocab_size=280, unknown=choice[1], end_of_text=True)
    for choice in CHOICES
    if choice[0] != "byte"
} | {("byte", "byte"): train_tokenizer("byte", TEXT, end_of_text=True)}
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
_END = {"id": 280, "content": "<|endoftext|>", **_FLAGS, "special": True}
_PLAIN = json.loads(train_tokenizer("subword", TEXT.replace(DOCUMENT_END, " ") * 9, vocab_size=280).to_json())
OTHERS = {
    ("world", "byte"): WorldTokenizer([bytes([byte]) for byte in range(256)] + [b"he", b" the", "前é".encode()], 300),
    ("hugging_face", "byte"): HuggingFaceTokenizer(_PLAIN | {"added_tokens": [_END]}),
}
ALL = TRAINED | OTHERS
each_choice = pytest.mark.parametrize("choice", ALL, ids="-".join)
DOCUMENTS = st.lists(st.text(st.sampled_from("aThe cat\n .é二前한🐈<>"), max_size=12), max_size=6)


@each_choice
@examples(40)
@given(documents=DOCUMENTS, rest=st.sampled_from(["", "a", "the\n", " é"]), size=st.sampled_from([1, 5, 1000]))
def test_each_document_is_encoded_by_itself(choice, documents, rest, size):
    tokenizer = ALL[choice]
    text = "".join(document + DOCUMENT_END for document in documents) + rest
    expected, unknown = [], 0
    for document in documents:
        ids, count = tokenizer.encode_lenient(document)
        expected += [*ids.tolist(), tokenizer.end_of_text]
        unknown += count
    ids, count = tokenizer.encode_lenient(rest)
    expected += ids.tolist()
    found, counts = tokenizer.encode_documents(text)
    assert found.tolist() == expected
    assert found.dtype == tokenizer.dtype
    assert counts.total() == unknown + count
    pieces = [tokenizer.encode_documents(piece)[0] for piece in tokenizer.cut([text[:3], text[3:]], size)]
    assert np.concatenate([*pieces, np.empty(0, np.int64)]).tolist() == expected


@pytest.mark.parametrize("choice", TRAINED, ids="-".join)
def test_no_text_has_the_end_and_the_end_decodes_to_nothing(choice):
    tokenizer = TRAINED[choice]
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    text = "the <end of text> cat <unk>"
    ids = tokenizer.encode_lenient(text)[0].tolist()
    assert tokenizer.end_of_text not in ids
    assert library.encode(text).ids == ids
    with_ends = [tokenizer.end_of_text, *ids, tokenizer.end_of_text]
    assert tokenizer.decode(with_ends) == library.decode(with_ends, skip_special_tokens=False)
    assert tokenizer.decode(with_ends).strip() == tokenizer.decode(ids).strip()
    assert tokenizer.piece(tokenizer.end_of_text) == b""


@pytest.mark.parametrize("choice", TRAINED, ids="-".join)
def test_the_file_keeps_the_end(choice, tmp_path):
    tokenizer = TRAINED[choice]
    tokenizer.save(tmp_path / "tokenizer.json")
    for same in (load_tokenizer(tmp_path / "tokenizer.json"), tokenizer_from_json(tokenizer.to_json())):
        assert (same.kind, same.unknown, same.hash) == (tokenizer.kind, tokenizer.unknown, tokenizer.hash)
        assert same.end_of_text == tokenizer.end_of_text is not None
        assert same.encode_documents(TEXT)[0].tolist() == tokenizer.encode_documents(TEXT)[0].tolist()


def test_the_end_takes_one_id_after_the_text():
    assert train_tokenizer("character", "ba", end_of_text=True).end_of_text == 2
    assert train_tokenizer("character", "ba", unknown="unk", end_of_text=True).vocab_size == 4
    assert TRAINED["byte", "byte"].end_of_text == 256
    words = train_tokenizer("word", "b b a\udc00a a c", unknown="unk", vocab_size=3, end_of_text=True)
    assert (words.vocab_size, words.end_of_text) == (3, 1)
    assert train_tokenizer("subword", "aaaa" * 9, vocab_size=258, end_of_text=True).end_of_text == 257


def test_no_entry_extends_across_the_end_of_a_document():
    documents = ["one" + DOCUMENT_END, "two" + DOCUMENT_END] * 50
    entries = {
        kind: {made.piece(i) for i in range(made.vocab_size)}
        for kind in ("character", "word", "subword")
        if (made := train_tokenizer(kind, documents, vocab_size=300, end_of_text=True))
    }
    assert entries["character"] == {b"", *(letter.encode() for letter in "onetw")}
    assert entries["word"] == {b"", b"one", b"two"}
    longer = {piece for piece in entries["subword"] if len(piece) > 1}
    assert {b"one", b"two"} <= longer
    assert all(piece in b"one" or piece in b"two" for piece in longer)


def test_the_end_needs_room_in_the_vocabulary():
    with pytest.raises(InvalidValue, match="needs at least 257, for all bytes and the end of text"):
        train_tokenizer("subword", "abc", vocab_size=256, end_of_text=True)


@pytest.mark.parametrize("end_of_text", [False, True])
def test_other_surrogates_are_refused(end_of_text):
    with pytest.raises(InvalidValue, match=re.escape("U+DC01, at character 2,")):
        train_tokenizer("word", ["a", " \udc01"], end_of_text=end_of_text)
