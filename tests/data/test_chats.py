"""Conversations: their texts and loss masks in prepared folders, and one sentence for each wrong record."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.commands import run_command
from tests.helpers.preparing import contents, kill_after, started
from tests.helpers.tiers import examples
from tests.helpers.vocabularies import BYTES
from timemix.data import pipeline, shards
from timemix.data import prepare as preparation
from timemix.data.config import DataConfig
from timemix.data.corpus import evenly_spaced, open_corpus
from timemix.data.describe import describe, text_hash
from timemix.data.prepare import hold_out_end, prepare
from timemix.data.sources import read_source
from timemix.data.templates import WORLD, Message
from timemix.errors import DamagedFile, InvalidValue
from timemix.tokenizers.make import train_tokenizer
from timemix.tokenizers.world import WorldTokenizer

TINY_WORLD = WorldTokenizer([*BYTES, b"User", b"User:", b": ", b"\n\n", b" a", b"Assistant"], 300)


def chat(*turns, system=None):
    """Return a conversation: messages of the user and the assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


CHATS = [
    chat(
        f"What is {i}+{i % 7}?",
        f"It is {i + i % 7}.",
        "Zé?",
        f"No, 鱼\n\n{i}.",
        system=("Be short." if i % 3 else None),
    )
    for i in range(20)
]


def write_chats(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def config_of(path, **options):
    return DataConfig(str(path), template="world", **options)


def expected(made, records):
    """Return ids and mask of conversations, segment by segment."""
    ids, mask = [], []
    for record in records:
        for text, is_counted in WORLD.segments([Message(each["role"], each["content"]) for each in record["messages"]]):
            ids += made.encode(text).tolist()
            mask += [int(is_counted)] * (len(ids) - len(mask))
        ids.append(made.end_of_text)
        mask.append(1)
    return ids, mask


def check(tokens, made, records):
    ids, mask = expected(made, records)
    assert tokens[:].tolist() == ids
    assert tokens.counted[:].tolist() == mask


@pytest.fixture
def small(monkeypatch):
    """Use pieces of a few characters and files of a few tokens."""

    def pieces_of(characters, shard):
        for module in (pipeline, preparation):
            monkeypatch.setattr(module, "PART", characters)
        monkeypatch.setattr(shards, "SHARD_BYTES", shard)

    return pieces_of


@pytest.mark.parametrize("sizes", [(1 << 20, 1 << 20), (13, 256)])
@pytest.mark.parametrize("kind", ["character", "byte", "subword", "world"])
def test_the_loss_counts_the_answers_and_the_end_of_text(tmp_path, small, kind, sizes):
    small(*sizes)
    path = tmp_path / "chat.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(each) + "\n" for each in CHATS).encode()))
    made = TINY_WORLD if kind == "world" else None
    options = {} if made else {"tokenizer": kind, "vocab_size": 300}
    corpus = prepare(tmp_path / "out", config_of(path, **options), tokenizer=made)
    check(corpus.train, corpus.tokenizer, CHATS[:18])
    check(corpus.valid, corpus.tokenizer, CHATS[18:])
    info = corpus.info.valid
    assert info.counted.tokens == sum(corpus.valid.counted[:])
    answers = [text for each in CHATS[18:] for text, is_counted in segments_of(each) if is_counted]
    assert (info.counted.characters, info.counted.bytes) == (
        sum(map(len, answers)),
        sum(len(text.encode()) for text in answers),
    )
    whole = [text for each in CHATS[18:] for text, _ in segments_of(each)]
    assert (info.characters, info.bytes) == (sum(map(len, whole)), sum(len(text.encode()) for text in whole))
    assert corpus.info.template == "world"
    assert sorted(path.name for path in (tmp_path / "out").glob("train-*")) == sorted(
        f"train{name}-{i:05}.bin" for name in ("", "-loss") for i in range(len(corpus.info.train.shards))
    )


def segments_of(record):
    return WORLD.segments([Message(each["role"], each["content"]) for each in record["messages"]])


CONTENTS = st.text("ab:\n é鱼User", min_size=1, max_size=9).filter(str.strip)


@given(
    chats=st.lists(st.lists(CONTENTS, min_size=2, max_size=4).filter(lambda turns: len(turns) % 2 == 0), min_size=1),
    part=st.integers(1, 9),
    kind=st.sampled_from(["character", "subword", "world"]),
)
@examples(12, fast=6)
def test_any_conversations_in_any_pieces(tmp_path_factory, chats, part, kind):
    folder = tmp_path_factory.mktemp("chats")
    records = [chat(*turns) for turns in chats]
    path = write_chats(folder / "chat.jsonl", records)
    options = {} if kind == "world" else {"tokenizer": kind, "vocab_size": 300}
    made = TINY_WORLD if kind == "world" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PART", part)
        corpus = prepare(folder / "out", config_of(path, valid_fraction=0, **options), tokenizer=made)
    check(corpus.train, corpus.tokenizer, records)


def test_prompt_and_completion_are_one_turn(tmp_path):
    records = [{"prompt": f"{i}?", "completion": f"{i}!", "source": "x"} for i in range(4)]
    one = prepare(tmp_path / "a", config_of(write_chats(tmp_path / "a.jsonl", records), hold_out="end"))
    other = [chat(f"{i}?", f"{i}!") for i in range(4)]
    check(one.train, one.tokenizer, other[: one.info.train.documents])


@pytest.mark.parametrize("shape", ["messages", "prompt"])
def test_conversations_in_parquet(tmp_path, shape):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    if shape == "messages":
        records, plain = CHATS, CHATS
    else:
        records = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(9)]
        plain = [chat(each["prompt"], each["completion"]) for each in records]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "chat.parquet")
    corpus = prepare(tmp_path / "out", config_of(tmp_path / "chat.parquet", valid_fraction=0))
    check(corpus.train, corpus.tokenizer, plain)
    with pytest.raises(InvalidValue, match=rf"chat.parquet has no 'text', but '{shape}', as conversations have"):
        prepare(tmp_path / "text", DataConfig(str(tmp_path / "chat.parquet")))
    with gzip.open(tmp_path / "chat.parquet.gz", "wb") as file:
        file.write((tmp_path / "chat.parquet").read_bytes())
    with pytest.raises(InvalidValue, match=r"chat.parquet.gz is a compressed Parquet file; decompress it"):
        prepare(tmp_path / "text", config_of(tmp_path / "chat.parquet.gz"))
    parquet.write_table(pyarrow.Table.from_pylist([{"a": "b"}]), tmp_path / "other.parquet")
    with pytest.raises(InvalidValue, match="has neither a column 'messages' nor 'prompt' and 'completion'"):
        prepare(tmp_path / "text", config_of(tmp_path / "other.parquet"))
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": "b"}]), tmp_path / "wrong.parquet")
    with pytest.raises(InvalidValue, match="row 1, has 'messages' as a text; it must be a list of at least one"):
        prepare(tmp_path / "text", config_of(tmp_path / "wrong.parquet"))


def test_dates_and_equal_columns_instead_of_conversations_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array(["a"])
    far = pyarrow.table({"prompt": texts, "completion": pyarrow.array([2**60], pyarrow.timestamp("us"))})
    parquet.write_table(far, tmp_path / "far.parquet")
    with pytest.raises(InvalidValue, match="has 'prompt' or 'completion' of a wrong type: date value out of range"):
        prepare(tmp_path / "out", config_of(tmp_path / "far.parquet"))
    twice = pyarrow.Table.from_arrays([texts] * 3, names=["prompt", "completion", "prompt"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(InvalidValue, match="has 2 columns 'prompt'; rename all but one of these columns"):
        prepare(tmp_path / "out", config_of(tmp_path / "twice.parquet"))


def test_one_conversation_cannot_be_held_out(tmp_path):
    path = write_chats(tmp_path / "one.jsonl", CHATS[:1])
    with pytest.raises(InvalidValue, match=r"set data.valid, or set data.valid_fraction to 0$"):
        prepare(tmp_path / "out", config_of(path))


def test_thinned_shuffled_and_held_out_parts_keep_their_masks(tmp_path):
    path = write_chats(tmp_path / "chat.jsonl", CHATS)
    whole = prepare(tmp_path / "whole", config_of(path))
    thin = prepare(tmp_path / "thin", config_of(path, valid_tokens=50))
    for ours, theirs in ((thin.valid, evenly_spaced(whole.valid, 50)), (thin.train, whole.train)):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ours.counted, theirs.counted)
    assert thin.info.valid.counted.tokens == thin.valid.counted[:].sum()
    shuffled = prepare(tmp_path / "shuffled", config_of(path, shuffle=3))
    ends = np.flatnonzero(shuffled.train[:] == shuffled.tokenizer.end_of_text) + 1
    texts = [shuffled.tokenizer.decode(part) for part in np.split(shuffled.train[:], ends)[:-1]]
    order = [next(i for i, each in enumerate(CHATS) if "".join(t for t, _ in segments_of(each)) == x) for x in texts]
    assert sorted(order) == list(range(18))
    assert order != list(range(18))
    check(shuffled.train, shuffled.tokenizer, [CHATS[i] for i in order])
    assert replace(shuffled.info.train.counted, sha256="", characters=0, bytes=0) == replace(
        whole.info.train.counted, sha256="", characters=0, bytes=0
    )
    held = hold_out_end(whole, tmp_path / "held", share=0.3)
    cut = len(held.train)
    for ours, theirs in ((held.train, whole.train.part(slice(cut))), (held.valid, whole.train.part(slice(cut, None)))):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(ours.counted, theirs.counted)
    assert held.info.template == "world"


@pytest.mark.slow
def test_a_killed_preparation_resumes_with_its_mask(tmp_path):
    path = write_chats(tmp_path / "chat.jsonl", CHATS)

    def begin(out):
        return started(path, tmp_path / out, 100, template="world")

    whole = begin("whole").communicate()[0].split()
    assert len(whole) > 5
    kill_after(begin("killed"), 3)
    assert list((tmp_path / ".killed.unfinished").glob("train-loss-*.bin"))
    rest = begin("killed").communicate()[0].split()
    assert len(rest) < len(whole)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def stopped(out, config, monkeypatch, files):
    """Begin to prepare a folder, and stop after a number of token files."""
    finish = shards.ShardWriter._finish

    def stops(self):
        finish(self)
        if len(self.shards) == files:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "_finish", stops)
        with pytest.raises(KeyboardInterrupt):
            prepare(out, config)


def test_a_preparation_resumes_within_answers_and_between_them(tmp_path, small, monkeypatch):
    small(13, 40)
    config = config_of(write_chats(tmp_path / "chat.jsonl", CHATS[:3]), valid_fraction=0)
    for files in range(1, 6):
        stopped(tmp_path / str(files), config, monkeypatch, files)
        corpus = prepare(tmp_path / str(files), config)
        check(corpus.train, corpus.tokenizer, CHATS[:3])


def test_a_resumed_preparation_finds_a_damaged_mask(tmp_path, small, monkeypatch):
    small(50, 100)
    path = write_chats(tmp_path / "chat.jsonl", CHATS)
    stopped(tmp_path / "out", config_of(path), monkeypatch, 3)
    mask = tmp_path / ".out.unfinished" / "train-loss-00001.bin"
    mask.write_bytes(bytes(1 - byte for byte in mask.read_bytes()))
    prepare(tmp_path / "out", config_of(path))
    prepare(tmp_path / "fresh", config_of(path))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_several_processes_give_what_one_gives(tmp_path, small, monkeypatch):
    small(40, 1 << 20)
    path = write_chats(tmp_path / "chat.jsonl", CHATS)
    prepare(tmp_path / "one", config_of(path))
    monkeypatch.setattr(pipeline, "PROCESSES_FROM", 1)
    monkeypatch.setattr(pipeline, "cores", lambda: 2)
    prepare(tmp_path / "two", config_of(path))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_damaged_mask_is_refused(tmp_path):
    path = write_chats(tmp_path / "chat.jsonl", CHATS)
    prepare(tmp_path / "out", config_of(path))
    mask, info = tmp_path / "out" / "train-loss-00000.bin", tmp_path / "out" / "data.json"
    right = mask.read_bytes()
    for wrong in (right[:-1], bytes([1]) + right[1:], bytes([2]) + right[1:]):
        mask.write_bytes(wrong)
        with pytest.raises(DamagedFile, match=r"train-loss-00000.bin is damaged"):
            open_corpus(tmp_path / "out")
    mask.write_bytes(right)
    data = json.loads(info.read_text())
    del data["train"]["counted"]
    info.write_text(json.dumps(data))
    with pytest.raises(DamagedFile, match="data.json is damaged: only a part of train has a loss mask"):
        open_corpus(tmp_path / "out")
    mask.unlink()


def test_counts_and_hashes_of_a_description(tmp_path):
    path = write_chats(tmp_path / "chat.jsonl", CHATS)
    corpus = prepare(tmp_path / "out", config_of(path))
    found = describe(config_of(path))
    assert (found.train.tokens, found.valid.tokens) == (corpus.info.train.tokens, corpus.info.valid.tokens)
    assert found.train.documents == 18
    texts = ["".join(text for text, _ in segments_of(each)) for each in CHATS]
    assert found.characters == len("".join(texts))
    assert found.distinct_characters == len(set("".join(texts)))
    # The same tokens without a mask are other training data.
    write_lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text(write_lines)
    plain = prepare(tmp_path / "plain", DataConfig(str(tmp_path / "text.jsonl")))
    assert plain.info.train.sha256 == corpus.info.train.sha256
    assert text_hash(DataConfig(str(tmp_path / "plain"))) != text_hash(DataConfig(str(tmp_path / "out")))
    assert "counted" not in (tmp_path / "plain" / "data.json").read_text()


def of(**fields):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | fields]}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "a"}, "has 'messages' as a text; it must be a list of at least one message"),
        ({"messages": []}, "has 'messages' as an empty list; it must be a list of at least one message"),
        ({"messages": {"role": "user"}}, "has 'messages' as an object; it must be a list of at least one message"),
        ({"messages": ["a"]}, "has messages[0] as a text; it must be an object with 'role' and 'content'"),
        ({"messages": [{"content": "a"}]}, "has no 'role' in messages[0]; known: content"),
        (
            {"messages": [{"role": "user", "contents": "a"}]},
            "has no 'content' in messages[0]; did you mean 'contents'",
        ),
        (
            of(role="tool"),
            "has the role 'tool' in messages[1]; it must be system, user or assistant",
        ),
        (of(role=None), "has the role null in messages[1]; it must be system"),
        (of(role=["user"]), "has the role as a list of parts in messages[1]; it must be"),
        (of(content=None), "has 'messages[1].content' null; it must be a text"),
        (of(content=3), "has 'messages[1].content' as a number; it must be a text"),
        (
            of(content=[{"type": "text", "text": "b"}]),
            "has 'messages[1].content' as a list of parts; it must be a text",
        ),
        (
            of(content="\ud800"),
            "has the lone surrogate U+D800 in 'messages[1].content'; remove it",
        ),
        (of(content="\udc01"), "has the lone surrogate U+DC01 in 'messages[1].content'; remove it"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "has a conversation without an answer to learn: no message of the assistant has text; remove it",
        ),
        (
            chat("a", "b", "c"),
            "has a conversation without an answer to learn: the last message is of the user, not of the assistant;",
        ),
        ({"text": "a"}, "has neither 'messages' nor 'prompt' and 'completion', which data.template needs in every rec"),
        ({"prompt": "a"}, "has 'completion' null; it must be a text"),
        ({"prompt": ["a"], "completion": "b"}, "has 'prompt' as a list of parts; it must be a text"),
        ([], "is no JSON object; correct or remove the line"),
    ],
)
def test_a_wrong_record_is_one_sentence_with_its_line(tmp_path, record, words):
    path = write_chats(tmp_path / "chat.jsonl", [CHATS[0], record, CHATS[1]])
    with pytest.raises((InvalidValue, DamagedFile)) as error:
        prepare(tmp_path / "out", config_of(path))
    assert f"{path}, line 2, {words}" in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["chat.jsonl"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("text.txt", (), "text.txt is plain text, but --data.template needs conversations in .jsonl, .ndjson or"),
        ("builtin", (), "builtin has no conversations; leave --data.template out, or name a file of conversations"),
        (
            "chat.jsonl",
            ("--data.text-key", "a"),
            "--data.text-key='a' contradicts --data.template='world': each",
        ),
        ("chat.jsonl", ("--data.end-of-text", "False"), "--data.end-of-text=False contradicts --data.template='world'"),
        ("chat.jsonl", ("--data.template", "chatml"), "--data.template is 'chatml'; known: world"),
    ],
)
def test_a_template_for_other_text_is_one_sentence(tmp_path, monkeypatch, capsys, name, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a b c\n" * 50)
    write_chats(tmp_path / "chat.jsonl", CHATS)
    status, _, errors = run_command(capsys, "data", name, "--data.template", "world", *options)
    assert status == 2
    assert words in errors


def test_a_chat_without_a_template_names_the_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_chats(tmp_path / "chat.jsonl", CHATS)
    status, _, errors = run_command(capsys, "data", "chat.jsonl")
    assert status == 2
    assert errors == (
        "timemix: chat.jsonl, line 1, has no 'text', but 'messages', as conversations have; set --data.template to"
        " world, or --data.text-key to the key of a text\n"
    )


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    path = write_chats(tmp_path / "chat.jsonl", CHATS)
    made = train_tokenizer("byte", "a")
    with pytest.raises(
        InvalidValue, match="data.template='world' needs an end-of-text token, but the byte tokenizer has none;"
    ):
        prepare(tmp_path / "out", config_of(path), tokenizer=made)


def test_a_word_tokenizer_is_refused(tmp_path):
    config = replace(config_of(write_chats(tmp_path / "chat.jsonl", CHATS)), tokenizer="word")
    with pytest.raises(InvalidValue, match="data.template='world' needs case and spaces, which a word tokenizer loses"):
        prepare(tmp_path / "out", config)


def test_other_text_has_no_mask(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"a {i}"}) + "\n" for i in range(30)))
    corpus = prepare(tmp_path / "out", DataConfig(str(tmp_path / "text.jsonl")))
    assert corpus.train.counted is None
    assert corpus.info.train.counted is None
    assert not list((tmp_path / "out").glob("*-loss-*"))
    assert read_source(str(tmp_path / "text.jsonl")).text.startswith("a 0\na 1\n")


@pytest.mark.parametrize("end_of_text", [False, True])
def test_loss_marks_in_other_text_are_refused(tmp_path, end_of_text):
    """The encoding utf-7 can spell lone surrogates."""
    (tmp_path / "text.txt").write_bytes(b"one +3AE- two\n" * 20)
    config = DataConfig(str(tmp_path / "text.txt"), encoding="utf-7", end_of_text=end_of_text)
    with pytest.raises(InvalidValue, match=r"has a lone surrogate, U\+DC01, at character 4, which UTF-8 cannot encode"):
        prepare(tmp_path / "out", config)
