"""Tokenizers: round trips, ids equal to those of the `tokenizers` library, and errors that name bad input."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tiers import examples
from timemix.errors import CannotWrite, DamagedFile, InvalidValue, MissingFile
from timemix.storage.files import LARGEST
from timemix.tokenizers.base import KINDS
from timemix.tokenizers.make import load_tokenizer, train_tokenizer
from timemix.tokenizers.pieces import PIECE
from timemix.tokenizers.world import WorldTokenizer

SAMPLE = (
    "The cat, the dog; 'tis 42% of $9.99 - [it's] {a=b}*c\\d/e~f&g#h|i—j\"k`l!?\n"
    "二千年前、人々は山を越えた。\r\nÀ l'été, İstanbul und Straße, ΟΔΟΣ\tπας \ufeff x\0y  z   \n\n"
    "emoji 🐈‍⬛ 👩‍🚀🏽 math 𝔸 plane-15 \U000f0000 end"
)
FROM_ANY_PLANE = st.text(st.characters(codec="utf-8"), max_size=60) | st.text("aé鱼🐈\0\r\n\ufeff .'A", max_size=60)
SURROGATES = st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF, categories=["Cs"])

# Every kind of tokenizer with every policy for unknown text that it supports.
CHOICES = [
    ("character", "error"),
    ("character", "unk"),
    ("character", "byte"),
    ("byte", "error"),
    ("word", "error"),
    ("word", "unk"),
    ("subword", "error"),
    ("world", "error"),
]


def train(kind, unknown="error", text=SAMPLE):
    if kind == "world":
        longer = dict.fromkeys(text[i : i + n].encode() for n in (2, 3, 4) for i in range(len(text) - n + 1))
        return WorldTokenizer([bytes([byte]) for byte in range(256)] + [*longer], vocab_size=1000)
    return train_tokenizer(kind, text, vocab_size=400, unknown=unknown)


TRAINED = {choice: train(*choice) for choice in CHOICES}
LIBRARY = {choice: tokenizers.Tokenizer.from_str(made.to_json()) for choice, made in TRAINED.items()}
each_choice = pytest.mark.parametrize("choice", CHOICES, ids="-".join)


def split_2021(text):
    """Return words by the original's rule: spaces around separate symbols, runs of spaces merged, split at spaces."""
    alone = r"(\n|\.|\,|\?|\!|\:|\;|\-|\—|\||\'|\"|\`|\(|\)|[0-9]|\[|\]|\{|\}|\=|\+|\*|\\|\/|\~|\&|\$|\#|\%)"
    return [word for word in re.sub(" +", " ", re.sub(alone, r" \g<0> ", text)).lower().split(" ") if word]


@each_choice
@pytest.mark.parametrize(
    "text", [SAMPLE, "", "the cat.\r\n\r\nThe  DOG", "二千年前", "🐈‍⬛ 👩‍🚀🏽", "\n\n a", " ", "\ufeffThe\0"]
)
def test_ids_are_those_of_the_library(choice, text):
    kind, unknown = choice
    tokenizer = TRAINED[choice]
    lenient, count = tokenizer.encode_lenient(text)
    if kind == "word" and unknown == "error" and count:
        pytest.skip("the library cannot leave an unknown word out")
    assert lenient.tolist() == LIBRARY[choice].encode(text).ids
    assert tokenizer.decode(lenient) == LIBRARY[choice].decode(lenient.tolist())


@each_choice
@examples(60)
@given(text=FROM_ANY_PLANE)
def test_any_text_comes_back_or_is_named(choice, text):
    kind, unknown = choice
    tokenizer = TRAINED[choice]
    lenient, count = tokenizer.encode_lenient(text)
    if count and unknown == "error":
        with pytest.raises(InvalidValue, match="the vocabulary has no"):
            tokenizer.encode(text)
        return
    ids = tokenizer.encode(text)
    assert np.array_equal(ids, lenient)
    assert ids.dtype == tokenizer.dtype
    decoded = tokenizer.decode(ids)
    assert ids.tolist() == LIBRARY[choice].encode(text).ids
    if kind == "word":
        assert np.array_equal(tokenizer.encode(decoded), ids)
    elif unknown != "unk" or not count:
        assert decoded == text


@each_choice
@examples(20)
@given(before=FROM_ANY_PLANE, surrogate=SURROGATES, after=FROM_ANY_PLANE)
def test_lone_surrogates_are_refused(choice, before, surrogate, after):
    text = before + surrogate + after
    sentence = f"lone surrogate, U\\+{ord(surrogate):04X}( \\(the byte .*\\))?, at character {len(before)},"
    acts = [TRAINED[choice].encode, TRAINED[choice].encode_lenient]
    if choice[0] in KINDS:
        acts.append(lambda t: train(*choice, t))
    for act in acts:
        with pytest.raises(InvalidValue, match=sentence):
            act(text)


@each_choice
@examples(60)
@given(data=st.data())
def test_streaming_gives_whole_characters_and_the_same_text(choice, data):
    tokenizer = TRAINED[choice]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


def test_a_character_is_held_back_until_its_last_byte():
    stream = TRAINED["byte", "error"].stream()
    assert [stream.push(byte) for byte in "é🐈".encode()] == ["", "é", "", "", "", "🐈"]
    assert [stream.push(0xF0), stream.flush()] == ["", "\ufffd"]
    assert TRAINED["byte", "error"].decode([0x41, 0xFF, 0x42]) == "A\ufffdB"


def test_character_ids_follow_the_order_of_the_alphabet():
    tokenizer = train("character", text="hello 二é")
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("ehlo é二").tolist() == [1, 2, 3, 4, 0, 5, 6]
    assert tokenizer.dtype == np.uint8


def test_unknown_characters():
    with pytest.raises(
        InvalidValue, match=re.escape("the vocabulary has no 'é' (U+00E9) and '鱼' (U+9C7C); leave them")
    ):
        train("character", text="abc").encode("aé鱼é")
    ids, count = train("character", text="abc").encode_lenient("aé鱼éc")
    assert (ids.tolist(), count) == ([0, 2], 3)
    unk = train("character", "unk", "abc")
    assert unk.vocab_size == 4
    assert unk.encode("aéc").tolist() == [0, 3, 2]
    byte = train("character", "byte", "abc")
    assert byte.vocab_size == 259
    assert byte.encode("aéb鱼").tolist() == [0, 3 + 0xC3, 3 + 0xA9, 1, 3 + 0xE9, 3 + 0xB1, 3 + 0xBC]
    assert byte.encode_lenient("aéb鱼")[1] == 2


def test_many_unknown_characters_are_counted_in_the_sentence():
    with pytest.raises(
        InvalidValue,
        match="'h' .* and 18 more; leave them out of the text, or train a new model from random weights with",
    ):
        train("character", text=" ").encode("".join(map(chr, range(97, 123))))


def test_an_unknown_backslash_is_quoted_once():
    with pytest.raises(InvalidValue, match=re.escape(r"the vocabulary has no '\' (U+005C) and '\x07' (U+0007); leave")):
        train("character", text="abc").encode("a\\\a")
    with pytest.raises(InvalidValue, match=re.escape(r"""the vocabulary has no "'" (U+0027); leave it""")):
        train("character", text="abc").encode("a'")


def test_byte_ids_are_the_bytes():
    assert TRAINED["byte", "error"].encode("aé🐈").tolist() == list("aé🐈".encode())


def test_words_are_split_as_in_2021():
    # Python's lower() of a whole text has a final sigma of its own.
    text = SAMPLE.replace("ΟΔΟΣ", "")
    tokenizer = train("word", text=text)
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(split_2021(text)).replace("\n ", "\n")
    assert train("word", text="Don't stop!\nGo  on.").to_json().count('"don"') == 1


def test_words_decode_with_spaces_between_and_none_after_a_newline():
    tokenizer = train("word", text="Go on, cat!\nNow.\n\nEnd")
    assert tokenizer.decode(tokenizer.encode("go ON,cat\n\nend .")) == "go on , cat \n\nend ."
    with pytest.raises(InvalidValue, match="the vocabulary has no 'stop' and 'dog'; leave them out"):
        tokenizer.encode("stop dog stop go")


def test_the_most_frequent_words_are_kept():
    tokenizer = train_tokenizer("word", "a a a b b c d <unk> <unk> <unk>", vocab_size=3, unknown="unk")
    assert tokenizer.encode("b c a <unk>").tolist() == [1, 2, 0, 2]
    assert tokenizer.encode_lenient("b c a d")[1] == 2
    assert tokenizer.decode([0, 2, 1]) == "a <unk> b"


LONG = (SAMPLE + " it's  \n\n  we'll\t\t x\x1c y\u2003 z\u00a0 \n" + "喵" * 50 + "\n") * (2 * PIECE // len(SAMPLE))


@pytest.mark.parametrize("choice", [("subword", "error"), ("word", "unk"), ("character", "byte")], ids="-".join)
def test_encoding_in_pieces_equals_encoding_at_once(choice):
    assert len(LONG) > 2 * PIECE
    assert TRAINED[choice].encode(LONG).tolist() == LIBRARY[choice].encode(LONG).ids


# Runs of spaces and newlines are tokens of this tokenizer, so a cut inside a run changes the ids.
SPACED = train_tokenizer("subword", "a  b   a \n\n  a's \n   1.\n\n\n b    \n a\t\t " * 50, vocab_size=300)
PARTS = ["   ", " ", "\n\n", "\n", "\t", "\u00a0", "\x1c", "\u2003", "a", "b", "'s", "é", "1", ".", "鱼"]
SPACED_LIBRARY = tokenizers.Tokenizer.from_str(SPACED.to_json())


@examples(200)
@given(text=st.lists(st.sampled_from(PARTS), max_size=30).map("".join), piece=st.integers(1, 20))
def test_no_subword_reaches_over_a_cut(text, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timemix.tokenizers.pieces.PIECE", piece)
        ids = SPACED.encode(text)
    assert ids.tolist() == SPACED_LIBRARY.encode(text).ids


def test_subwords_are_trained_the_same_every_time():
    text = SAMPLE * 5
    assert train("subword", text=text).hash == train("subword", text=text).hash
    tokenizer = train_tokenizer("subword", "low lower lowest " * 20, vocab_size=260)
    assert tokenizer.vocab_size == 260
    assert tokenizer.dtype == np.uint16
    assert len(tokenizer.encode("low low")) < len("low low")


@each_choice
def test_saved_and_loaded(choice, tmp_path):
    tokenizer = TRAINED[choice]
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (loaded.kind, loaded.unknown, loaded.vocab_size, loaded.hash) == (
        tokenizer.kind,
        tokenizer.unknown,
        tokenizer.vocab_size,
        tokenizer.hash,
    )
    assert np.array_equal(loaded.encode(SAMPLE), tokenizer.encode(SAMPLE))
    assert tokenizers.Tokenizer.from_file(str(path)).encode(SAMPLE).ids == tokenizer.encode(SAMPLE).tolist()


def test_policy_is_read_back():
    assert [TRAINED[c].unknown for c in CHOICES] == ["error", "unk", "byte", "byte", "error", "unk", "byte", "byte"]
    assert len({tokenizer.hash for tokenizer in TRAINED.values()}) == len(CHOICES)


def test_a_vocabulary_that_could_not_be_loaded_again_is_not_saved(tmp_path, monkeypatch):
    tokenizer = train_tokenizer("word", "one two three")
    size = len(tokenizer.to_json().encode())
    monkeypatch.setattr("timemix.tokenizers.base.LARGEST_OF_TEXT", size - 1)
    with pytest.raises(InvalidValue, match=f"has 3 tokens and needs a file of {size} bytes, more than the"):
        tokenizer.save(tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("timemix.tokenizers.base.LARGEST_OF_TEXT", size)
    tokenizer.save(tmp_path / "tokenizer.json")


def test_a_vocabulary_larger_than_other_json_files_is_loaded(tmp_path):
    words = [chr(0x4E00 + i) + "a" * 40_000 for i in range(900)]
    tokenizer = train_tokenizer("word", " ".join(words))
    tokenizer.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").stat().st_size > LARGEST
    assert load_tokenizer(tmp_path / "tokenizer.json").hash == tokenizer.hash


@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, kept):
    whole = TRAINED["character", "error"].to_json().encode()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(whole[: int(kept * len(whole)) if kept != 1 else 1])
    with pytest.raises(DamagedFile, match=r"tokenizer\.json is damaged"):
        load_tokenizer(path)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    foreign = json.loads(TRAINED["subword", "error"].to_json())
    foreign["normalizer"] = {"type": "Lowercase"}
    broken = json.loads(TRAINED["subword", "error"].to_json())
    broken["model"]["merges"].append(["no", "such"])
    gap = json.loads(TRAINED["character", "error"].to_json())
    gap["model"]["vocab"]["T"] = 999
    for document in ({}, [], 3, {"model": {"type": "BPE", "vocab": {}}}, foreign, broken, gap):
        path.write_text(json.dumps(document))
        with pytest.raises(DamagedFile, match="is no tokenizer file of timemix"):
            load_tokenizer(path)
    with pytest.raises(MissingFile, match="cannot read the tokenizer .*none.json: No such file"):
        load_tokenizer(tmp_path / "none.json")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CannotWrite, match=r"no space left on the device for .*tokenizer\.json"):
        TRAINED["byte", "error"].save(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@each_choice
def test_ids_outside_the_vocabulary_are_refused(choice):
    tokenizer = TRAINED[choice]
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(InvalidValue, match=f"token {token} is outside the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([0, token])


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_text_trains_nothing(kind):
    with pytest.raises(InvalidValue, match=f"the text is empty, so no {kind} tokenizer can be trained on it"):
        train(kind, text="")


def test_unsupported_choices():
    for arguments, sentence in [
        (("letter", "error"), "kind='letter' is not supported; choose character, byte, word or subword"),
        (("byte", "skip"), "unknown='skip' is not supported; choose error, unk or byte"),
        (("word", "byte"), "data.unknown is byte, which a word tokenizer does not support"),
    ]:
        with pytest.raises(InvalidValue, match=sentence):
            train(*arguments)
    with pytest.raises(InvalidValue, match="data.vocab_size is 255; a subword vocabulary needs at least 256"):
        train_tokenizer("subword", "abc", vocab_size=255)
    with pytest.raises(InvalidValue, match="the text has no words"):
        train("word", text="   ")


DNA = "".join(random.Random(0).choices("ACGT", k=200_000))
# Words of random letters and digits between spaces, without long runs of one class.
MIXED = "".join(random.Random(0).choices("abcABC019+/ \n", k=20_000))


@pytest.mark.parametrize(
    "text", [DNA, "a" * 200_000, " " * 200_000, MIXED + DNA[:50_000]], ids=["DNA", "a", " ", "both"]
)
def test_subwords_of_a_text_without_spaces_take_seconds(text):
    """Time is linear in the length of a word; it was quadratic before: 31 s for the first of these texts."""
    began = time.perf_counter()
    tokenizer = train_tokenizer("subword", text, vocab_size=1000)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert time.perf_counter() - began < 8


@pytest.mark.parametrize("text", [SAMPLE * 5, MIXED, "ab " * 3000, "喵" * 1024 + " and " + "a" * 1024])
def test_texts_without_long_words_give_the_subwords_of_the_library(text):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([text], trainer)
    ours = train("subword", text=text)
    assert json.loads(ours.to_json())["model"]["merges"] == json.loads(library.to_str())["model"]["merges"]


INTERRUPTED = """
import random
from timemix.tokenizers.make import train_tokenizer
def parts():
    yield "".join(random.choices("ACGT", k=3_000_000))
    print("read", flush=True)
train_tokenizer("subword", parts())
"""


def test_interrupting_the_training_of_subwords_ends_it():
    child = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.3)
    assert child.poll() is None
    began = time.perf_counter()
    child.send_signal(signal.SIGINT)
    _, printed = child.communicate()
    # Less than 2 s on an idle machine; other processes may take most of the processors.
    assert time.perf_counter() - began < 8
    assert b"KeyboardInterrupt" in printed
