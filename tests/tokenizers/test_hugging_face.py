"""Byte-level tokenizers of other programs: the ids of the library, streams of bytes, padding, and refused files."""

import json

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import timemix
from tests.helpers.original_code import Golden
from tests.helpers.tiers import examples
from timemix.data.config import DataConfig
from timemix.data.vocabulary import given_tokenizer
from timemix.errors import DamagedFile, InvalidValue
from timemix.interop.importing import import_run
from timemix.tokenizers.hugging_face import HuggingFaceTokenizer
from timemix.tokenizers.make import load_tokenizer

LINES = [
    "the cat sat on the mat and the dog ran\n",
    "def f(x):\n        return x + 1\n",
    "Caf\u00e9 \u9c7c \U0001f600",
] * 3
PARTS = [*LINES, "a", " ", "    ", "\n", "e\u0301", "\u0301", "<|endoftext|>", "\0", "z" * 70]


def library(vocab_size=300):
    """Return a tokenizer with the parts of GPT-NeoX's: byte-level, NFC, special tokens, and tokens of spaces."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|padding|>"],
        show_progress=False,
    )
    made.train_from_iterator(LINES * 3, trainer)
    made.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(8, 1, -1)])
    return made


LIBRARY = library()
# As in all tokenizers of timemix, no word of a text becomes the end-of-text token.
LIBRARY.encode_special_tokens = True
OURS = HuggingFaceTokenizer(json.loads(LIBRARY.to_str()))


@pytest.fixture
def path(tmp_path):
    LIBRARY.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@given(st.lists(st.sampled_from(PARTS)))
@example(["a  " * 40_000])
@examples(60)
def test_ids_are_those_of_the_library(parts):
    text = "".join(parts)
    assert OURS.encode(text).tolist() == LIBRARY.encode(text, add_special_tokens=False).ids


@given(st.text(max_size=30))
@examples(60)
def test_a_stream_gives_the_text_of_the_library(text):
    ids = OURS.encode(text)
    stream = OURS.stream()
    streamed = "".join(stream.push(token) for token in ids.tolist()) + stream.flush()
    assert streamed == OURS.decode(ids) == LIBRARY.decode(ids.tolist(), skip_special_tokens=True)


def test_no_text_becomes_a_special_token():
    ids = OURS.encode("the cat<|endoftext|>")
    assert OURS.end_of_text not in ids.tolist()
    assert OURS.decode(ids) == "the cat<|endoftext|>"


@pytest.mark.parametrize("text", ["a" * 65536 + ".\nb", "a" * 65536 + "...\n\nb c", "a" * 65535 + " b\nc"])
def test_a_long_text_is_cut_where_no_rule_joins(text):
    """Other rules than GPT-2's join punctuation with line ends."""
    made = tokenizers.Tokenizer(models.BPE())
    rule = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    splits = [
        pre_tokenizers.Split(rule, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(splits), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"]
    )
    made.train_from_iterator(["the end.\nA new line...\n\nb. c.\n"] * 9, trainer)
    ours = HuggingFaceTokenizer(json.loads(made.to_str()))
    assert ours.encode(text).tolist() == made.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_that_puts_a_space_before_a_text_is_cut_before_spaces():
    made = library()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    ours = HuggingFaceTokenizer(json.loads(made.to_str()))
    for text in ("a" * 65536 + "\nthe cat", "a" * 65536 + " the cat\nb", "the cat"):
        assert ours.encode(text).tolist() == made.encode(text, add_special_tokens=False).ids


def test_rules_that_join_words_are_refused():
    made = library()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with pytest.raises(ValueError, match="the tokens of a word depend on the words before it"):
        HuggingFaceTokenizer(json.loads(made.to_str()))


def test_saved_and_loaded_again(path, tmp_path):
    loaded = load_tokenizer(path)
    assert (loaded.kind, loaded.vocab_size, loaded.end_of_text) == ("hugging_face", LIBRARY.get_vocab_size(), 0)
    padded = loaded.padded(500)
    padded.save(tmp_path / "padded.json")
    again = load_tokenizer(tmp_path / "padded.json")
    assert again.vocab_size == 500
    assert again.hash == padded.hash
    assert again.decode(np.array([499, 0, 1])) == ""
    text = "".join(LINES)
    assert again.encode(text).tolist() == LIBRARY.encode(text).ids
    with pytest.raises(InvalidValue, match="vocab_size=100 is too small for a tokenizer of"):
        loaded.padded(100)


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder": None},
        {"decoder": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}},
        {"added_tokens": [{"id": 5000, "content": "x", "special": True}]},
        {"added_tokens": 3},
        {"model": {"type": "Unigram", "vocab": {}}},
        {"pre_tokenizer": None},
    ],
)
def test_other_tokenizers_are_refused(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DamagedFile, match="is (no tokenizer file of timemix|a tokenizer file of another)"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["model"]["vocab"].update({"zzzz": 5000}), "the ids of the tokens have gaps"),
        (lambda d: d["model"].update(dropout=0.5), "the tokenizer has affixes or dropout"),
        (lambda d: d.update(decoder=None), "the tokenizer is not byte-level"),
    ],
)
def test_the_reason_of_a_refusal_is_given(path, change, reason):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    expected = f"tokenizer.json is a tokenizer file of another program that timemix does not support: {reason}"
    with pytest.raises(DamagedFile, match=expected):
        load_tokenizer(path)


def test_a_space_before_the_text_does_not_count(path):
    document = json.loads(path.read_text())
    document["pre_tokenizer"]["add_prefix_space"] = True
    adding = HuggingFaceTokenizer(document)
    # The first token of both texts is that of " the", or its first part.
    assert adding.encode("the cat").tolist() == adding.encode(" the cat").tolist()
    (characters, size), (of_spaced, size_of_spaced) = adding.first_size("the cat"), adding.first_size(" the cat")
    assert (characters, size) == (of_spaced - 1, size_of_spaced - 1)
    assert OURS.first_size("the cat") == OURS.spelled_size([OURS.encode("the cat")[:1]])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["model"].update(continuing_subword_prefix="x"),
        lambda d: d["model"].update(end_of_word_suffix="x"),
        lambda d: d["model"].update(dropout=0.5),
        lambda d: d["added_tokens"][0].update(id=3),
        lambda d: d["added_tokens"].append(d["added_tokens"][0] | {"content": "again"}),
        lambda d: d["model"]["vocab"].update({"zzzz": 5}),
    ],
)
def test_damaged_tokenizers_are_refused(path, change):
    """The prefix ended the process inside the library."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(DamagedFile, match="is (no tokenizer file of timemix|a tokenizer file of another)"):
        load_tokenizer(path)


def test_an_import_of_a_model_with_more_rows_than_tokens(path, tmp_path):
    """As the models of the Pile, whose tokenizer.json lies beside the weights."""
    weights = Golden("rwkv4", torch.float32).published("weights")
    (tmp_path / "few").mkdir()
    torch.save(weights, tmp_path / "few/a.pth")
    for name in ("emb.weight", "head.weight"):
        weights[name] = torch.cat([weights[name]] * 9)
    torch.save(weights, tmp_path / "a.pth")
    import_run(tmp_path / "a.pth", tmp_path / "run")
    run = timemix.load(tmp_path / "run")
    assert run.tokenizer.vocab_size == len(weights["emb.weight"]) > LIBRARY.get_vocab_size()
    assert isinstance(timemix.generate(run, "the cat", tokens=30, seed=1)[0], str)
    with pytest.raises(InvalidValue, match=r"has \d+ tokens, but the model in .* has 47; give the tokenizer of this"):
        import_run(tmp_path / "few/a.pth", tmp_path / "other", path)


def test_training_with_such_a_tokenizer(path):
    assert given_tokenizer(DataConfig(tokenizer="hugging_face", vocabulary=str(path)), False).kind == "hugging_face"
    with pytest.raises(InvalidValue, match="data.vocabulary is missing; set it to the tokenizer.json"):
        given_tokenizer(DataConfig(tokenizer="hugging_face"), False)
