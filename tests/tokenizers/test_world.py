"""The World tokenizer: longest match by three methods, vocabulary files and their faults, and cuts of long texts."""

import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tiers import examples
from tests.helpers.vocabularies import BYTES, vocabulary_lines
from timemix.data.vocabulary import world_tokenizer
from timemix.errors import DamagedFile, InvalidValue, Unavailable
from timemix.tokenizers.longest_match import LongestMatch
from timemix.tokenizers.make import load_tokenizer
from timemix.tokenizers.world import WorldTokenizer, read_world

LETTERS = "ab \né鱼"


@st.composite
def tokens_and_text(draw):
    """Draw tokens that begin alike and that occur in the text: beginnings of the words of the text."""
    words = draw(st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=8))
    beginnings = {word.encode()[:length] for word in words for length in range(2, 16)} - set(BYTES)
    more = draw(st.lists(st.sampled_from(sorted(beginnings)), unique=True, max_size=12)) if beginnings else []
    return more, "".join(draw(st.lists(st.sampled_from([*words, *LETTERS, "\0"]), max_size=20)))


EIFFEL = "The Eiffel tower is in the city of"
EIFFEL_IDS = [6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706]
EIFFEL_PIECES = ["The", " E", "iffe", "l", " tower", " is", " in", " the", " city", " of"]
MIXED = "I'll 'd test блабла 以下は、]) -> <|endoftext|><|padding|> int"
MIXED_IDS = [
    *(74, 5229, 274, 101, 32223, 5092, 27980, 2795, 27980, 33, 10399, 10258, 10139, 10079, 1682, 3463, 295, 125),
    *(25258, 7588, 2318, 125, 790, 125, 49520, 125, 63, 21888),
]
MIXED_PIECES = [
    *("I", "'ll", " '", "d", " test", " б", "ла", "б", "ла", " ", "以", "下", "は", "、", "])", " ->", " <", "|"),
    *("endo", "fte", "xt", "|", "><", "|", "padding", "|", ">", " int"),
]


def longest_match(text, tokens):
    """Return ids by the definition: at each position, the longest of all tokens that match."""
    ids, position = [], 0
    while position < len(text):
        found = [token for token in tokens if text.startswith(token, position)]
        longest = max(found, key=len)
        ids.append(tokens.index(longest) + 1)
        position += len(longest)
    return ids


def test_the_first_and_last_children_of_a_node_are_found():
    """Code that misses the last child never ends at the byte 255, so this test comes before texts with this byte."""
    match = LongestMatch([b"", *BYTES, b"ab", b"ac", b"ad"])
    assert match.encode_in_c(b"abacadae").tolist() == [257, 258, 259, 98, 102]


@examples(300)
@given(given=tokens_and_text(), end=st.binary(max_size=3), order=st.randoms(use_true_random=False))
def test_c_and_python_find_the_longest_match(given, end, order):
    tokens, text = BYTES + given[0], given[1].encode() + end
    order.shuffle(tokens)
    match = LongestMatch([b"", *tokens, b""])
    expected = longest_match(text, tokens)
    assert match.encode_in_python(text).tolist() == expected
    assert match.encode_in_c(text).tolist() == expected


@examples(100)
@given(given=tokens_and_text(), data=st.binary(max_size=60))
def test_any_bytes_come_back(given, data):
    tokenizer = WorldTokenizer(BYTES + given[0], 300)
    data += given[1].encode()
    ids = tokenizer.encode_bytes(data)
    assert ids.dtype == np.uint16
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode(errors="replace")


@examples(200)
@given(given=tokens_and_text(), size=st.integers(0, 9), cuts=st.lists(st.integers(0, 80), max_size=4))
def test_pieces_give_the_ids_of_the_whole_text(given, size, cuts):
    tokenizer, text = WorldTokenizer(BYTES + given[0], 300), given[1]
    bounds = [0, *sorted(cuts), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(bounds)]
    cut = list(tokenizer.cut(parts, size))
    assert "".join(cut) == text
    ids = [token for piece in cut for token in tokenizer.encode(piece).tolist()]
    assert ids == tokenizer.encode(text).tolist()


def test_a_text_is_cut_where_no_token_reaches():
    tokenizer = WorldTokenizer([*BYTES, b". ", b"\n\n", b"b\n"], 300)
    assert list(tokenizer.cut(["a b. c\n\nab\nd\n鱼e"], 0)) == [
        "a",
        " b. c",
        "\n\n",
        "ab\n",
        "d",
        "\n",
        "鱼e",
    ]
    # The tokens of the bytes 0x1F and 0x20 are neighbours in the vocabulary.
    assert list(tokenizer.cut(["\x1f \n"], 0)) == ["\x1f", " ", "\n"]
    tokenizer = WorldTokenizer([*BYTES, "\n鱼".encode()[:2]], 300)
    assert list(tokenizer.cut(["a\n鱼\nb c"], 0)) == ["a", "\n鱼\n", "b", " c"]
    joined = WorldTokenizer(BYTES + [bytes([left, right]) for left in range(256) for right in b" \n"], 1000)
    assert list(joined.cut(["a b\n c"], 0)) == ["a b\n c"]


def test_a_text_of_several_blocks(monkeypatch):
    match = LongestMatch([b"", *BYTES, b"ab", b"abba"])
    text = b"abbabab\xff" * 50
    whole = match.encode_in_c(text)
    monkeypatch.setattr("timemix.tokenizers.longest_match.BLOCK", 7)
    assert match.encode_in_c(text).tolist() == whole.tolist() == match.encode_in_python(text).tolist()


def test_the_end_of_a_text_and_unused_ids_decode_to_nothing():
    tokenizer = WorldTokenizer(BYTES, 259)
    assert tokenizer.end_of_text == 0
    assert tokenizer.decode([0, 66, 257, 67, 258]) == "AB"
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert library.decode([0, 66, 257, 67, 258]) == "AB"
    for text in ("<end of text>", "<unused 257>", "<unk>"):
        assert library.encode(text).ids == tokenizer.encode(text).tolist() == [byte + 1 for byte in text.encode()]


def test_a_character_of_several_tokens_is_held_back():
    tokenizer = WorldTokenizer([*BYTES, "a🐈".encode()[:3], "é".encode()], 300)
    stream = tokenizer.stream()
    ids = tokenizer.encode("a🐈é").tolist()
    assert ids == [257, 0x90 + 1, 0x88 + 1, 258]
    assert [stream.push(token) for token in ids] == ["a", "", "🐈", "é"]
    assert [stream.push(257), stream.push(0), stream.flush()] == ["a", "", "\ufffd"]


def test_tokens_that_are_no_vocabulary_are_refused():
    for tokens, size, sentence in [
        (BYTES, 256, "vocab_size=256 is too small; 256 tokens and id 0 need more"),
        ([*BYTES, b"ab", b"ab"], 300, "a token is empty or repeated"),
        ([*BYTES, b""], 300, "a token is empty or repeated"),
        (BYTES[:65] + BYTES[66:], 300, "no token is the byte b'A'"),
    ]:
        with pytest.raises(InvalidValue, match=sentence):
            WorldTokenizer(tokens, size)
    with pytest.raises(InvalidValue, match="data is of type str; it must be bytes"):
        WorldTokenizer(BYTES).encode_bytes("text")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_vocabulary_file_is_read(tmp_path, line_end):
    more = [b"it's", b'say "x"', "'\"é".encode(), b"\r\n\t ", b" 1 2 ", b"\\n", "鱼\u2028\x85".encode(), b"\xff'\""]
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(vocabulary_lines(BYTES + more).replace(b"\n", line_end))
    tokenizer = read_world(path)
    assert tokenizer.vocab_size == 65536
    assert tokenizer.hash == WorldTokenizer(BYTES + more).hash
    assert [tokenizer.encode_bytes(token).tolist() for token in more] == [[257 + i] for i in range(len(more))]


FAULTS = {
    "an id is left out": (b"259 'x' 1", "line 258 has the id 259 instead of 258"),
    "a wrong length": (b"258 'abc' 4", "line 258 has a token of 3 bytes, but the length 4"),
    "a repeated token": (b"258 'A' 1", "line 258 repeats the token of line 66"),
    "no literal": (b"258 abc 3", "line 258 is '258 abc 3', not an id, a literal of str or bytes, and a length"),
    "an expression": (b"258 'ab'*9 18", "not an id, a literal"),
    "a call": (b"258 print('x') 1", "not an id, a literal"),
    "two literals": (b"258 'a' 'b' 2", "not an id, a literal"),
    "nested brackets": (b"258 " + b"(" * 3000 + b" 1", "not an id, a literal"),
    "an unknown escape": (rb"258 '\d' 2", "not an id, a literal"),
    "an escape of str in bytes": (rb"258 b'\u0041' 6", "not an id, a literal"),
    "a lone surrogate": (rb"258 '\ud800' 3", "line 258 has the token '.ud800', which is no text"),
    "a character beyond Unicode": (rb"258 '\U00110000' 4", "which is no text"),
    "an empty line": (b"", "line 258 is"),
    "bytes that are not UTF-8": (b"258 '\xff' 3", "line 258 is not UTF-8"),
    "an empty token": (b"258 '' 0", "not an id, a literal"),
    "control characters": (b"258 '\0\x1b[31m' 6", "not an id, a literal"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_vocabulary_file_name_the_line(tmp_path, fault):
    line, sentence = FAULTS[fault]
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(vocabulary_lines([*BYTES, b"ab"]) + line + b"\n")
    with pytest.raises(DamagedFile, match=sentence) as caught:
        read_world(path)
    assert str(caught.value).startswith(f"{path} is no World vocabulary: ")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_other_faulty_files_are_refused_quickly(tmp_path):
    path = tmp_path / "vocabulary.txt"
    began = time.perf_counter()
    for content, sentence in [
        (b"", "no token is the byte"),
        (vocabulary_lines(BYTES[:255]), "no token is the byte b'.xff'"),
        (b"1 '" + b"a" * 2**24, "line 1 is"),
        (b"\n" * 2**24, "line 1 is"),
        (b"1" * 2**20 + b" 'a' 1\n", "line 1 is"),
        (b"\0" * (2**25 + 1), "more than the maximum of 33,554,432 bytes"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=sentence):
            read_world(path)
    path.write_bytes(vocabulary_lines([*BYTES, b"ab", b"cd"]))
    with pytest.raises(DamagedFile, match="line 258 exceeds the 257 ids of the vocabulary"):
        read_world(path, 258)
    assert time.perf_counter() - began < 5


def test_a_damaged_tokenizer_of_a_run_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    document = json.loads(WorldTokenizer([*BYTES, b"ab"], 300).to_json())
    for name in ("A", "<end of text>"):
        vocabulary = {entry: i for entry, i in document["model"]["vocab"].items() if entry != name}
        path.write_text(json.dumps(document | {"model": document["model"] | {"vocab": vocabulary}}))
        with pytest.raises(DamagedFile, match="is no tokenizer file of timemix"):
            load_tokenizer(path)


def test_known_texts_with_a_vocabulary_of_their_tokens():
    tokens = [piece.encode() for piece in dict.fromkeys(EIFFEL_PIECES + MIXED_PIECES) if len(piece.encode()) > 1]
    tokenizer = WorldTokenizer(BYTES + tokens)
    for text, expected in ((EIFFEL, EIFFEL_PIECES), (MIXED, MIXED_PIECES)):
        assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == expected


@pytest.fixture(scope="module")
def published():
    try:
        return world_tokenizer()
    except Unavailable as error:
        pytest.skip(str(error))


def test_known_texts_with_the_published_vocabulary(published):
    assert published.encode(EIFFEL).tolist() == EIFFEL_IDS
    assert published.encode(MIXED).tolist() == MIXED_IDS
    assert [published.encode(text).tolist() for text in ("\n", " ", "\n\n")] == [[11], [33], [261]]


def test_the_published_vocabulary(published, tmp_path):
    assert published.vocab_size == 65536
    assert [published.decode_bytes([byte + 1]) for byte in range(256)] == BYTES
    assert published.decode_bytes([0, *range(65530, 65536)]) == b""
    lengths = [len(published.decode_bytes([token])) for token in range(1, 65530)]
    assert (min(lengths), max(lengths)) == (1, 128)
    # English text can be cut before every space after a word.
    assert list(published.cut(["Two words.\nnew line"], 0)) == ["Two", " words.", "\n", "new", " line"]
    published.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").hash == published.hash
    text = (EIFFEL + MIXED + " 二千年前\r\n\t🐈‍⬛") * 20
    match = LongestMatch([published.decode_bytes([token]) for token in range(65536)])
    assert match.encode_in_python(text.encode()).tolist() == published.encode(text).tolist()


PROGRAM = """
import sys
from tests.helpers.vocabularies import BYTES
from timemix.tokenizers.world import WorldTokenizer
print(WorldTokenizer([*BYTES, b"ab", b"abc"]).encode("abcab").tolist(), "torch" in sys.modules)
"""


@pytest.mark.parametrize("compiler", [None, "/nonexistent/cc"])
def test_encoding_needs_neither_torch_nor_a_compiler(compiler):
    environment = os.environ | ({} if compiler is None else {"CC": compiler})
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "[258, 257] False\n"
    warning = (
        f"the World tokenizer encodes without C code, which is slower (no C compiler was found: CC is {compiler!r})\n"
    )
    assert done.stderr == ("" if compiler is None else warning)
