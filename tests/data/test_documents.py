"""Documents: an end-of-text token after each, whole documents held out, and a random order of documents."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.commands import run_command
from tests.helpers.tiers import examples
from timemix.data import prepare as preparation
from timemix.data import shards
from timemix.data.config import DataConfig
from timemix.data.corpus import open_corpus
from timemix.data.describe import describe
from timemix.data.prepare import hold_out_end, prepare
from timemix.errors import InvalidValue
from timemix.tokenizers.make import train_tokenizer
from timemix.tokenizers.world import WorldTokenizer

WORLD = WorldTokenizer([bytes([byte]) for byte in range(256)], 300)


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def documents(tokens, tokenizer):
    """Return the text of each document in the tokens of a split."""
    ids = tokens[:]
    ends = np.flatnonzero(ids == tokenizer.end_of_text) + 1
    assert not len(ids) or ends[-1] == len(ids)
    return [tokenizer.decode(part) for part in np.split(ids, ends)[:-1]]


def parts_of(corpus):
    return [documents(tokens, corpus.tokenizer) for tokens in (corpus.train, corpus.valid)]


@pytest.mark.parametrize("kind", ["character", "byte", "subword"])
def test_each_record_is_a_document(tmp_path, kind):
    texts = [f"Line {i}\nof é鱼\n" for i in range(20)] + [""]
    config = DataConfig(write_lines(tmp_path / "a.jsonl", texts), tokenizer=kind, vocab_size=300)
    corpus = prepare(tmp_path / "out", config)
    assert parts_of(corpus) == [texts[:18], texts[18:20]]
    train, valid = corpus.info.train, corpus.info.valid
    assert (train.documents, valid.documents) == (18, 2)
    assert train.characters == sum(map(len, texts[:18]))
    assert train.bytes == sum(len(text.encode()) for text in texts[:18])
    assert corpus.info.held_out == "the last 10 % of a.jsonl"
    described = describe(config)
    assert (described.train.tokens, described.train.documents) == (train.tokens, 18)
    assert described.characters == train.characters + valid.characters


def test_words_of_documents(tmp_path):
    config = DataConfig(write_lines(tmp_path / "a.jsonl", ["one two", "two", "one"]), tokenizer="word")
    corpus = prepare(tmp_path / "out", config)
    assert corpus.train[:].tolist() == [0, 1, 2, 1, 2]
    assert corpus.info.train.first == (3, 3)
    assert corpus.valid[:].tolist() == [0, 2]


def test_files_of_plain_text_are_documents_if_asked(tmp_path):
    texts = {f"{i:02}.txt": f"text {i}\n" for i in range(20)}
    (tmp_path / "books").mkdir()
    for name, text in texts.items():
        (tmp_path / "books" / name).write_text(text)
    config = DataConfig(str(tmp_path / "books"), tokenizer="byte", end_of_text=True)
    train, valid = parts_of(prepare(tmp_path / "out", config))
    assert len(valid) == 2
    assert sorted(train + valid) == sorted(texts.values())
    plain = prepare(tmp_path / "plain", DataConfig(str(tmp_path / "books"), tokenizer="byte"))
    assert plain.tokenizer.end_of_text is None
    assert plain.info.train.documents == 0


def test_files_of_both_kinds(tmp_path):
    (tmp_path / "b").mkdir()
    write_lines(tmp_path / "b" / "a.jsonl", ["one", "two\n"])
    (tmp_path / "b" / "b.txt").write_text("three")
    (tmp_path / "v.txt").write_text("four\nfive")
    config = DataConfig(str(tmp_path / "b"), valid=str(tmp_path / "v.txt"), tokenizer="byte")
    assert parts_of(prepare(tmp_path / "out", config)) == [["one", "two\n", "three"], ["four\nfive"]]


@examples(30, fast=15)
@given(
    files=st.lists(st.lists(st.text("abc\n", min_size=1, max_size=30), max_size=8), min_size=1, max_size=6),
    share=st.sampled_from([0.01, 0.1, 0.5, 0.9]),
    hold_out=st.sampled_from(["each", "end", "documents"]),
    shuffle=st.sampled_from([None, 0, 7]),
)
def test_every_document_is_whole_and_in_one_split(tmp_path_factory, files, share, hold_out, shuffle):
    folder = tmp_path_factory.mktemp("files")
    whole = [f"{n}{text}{n}" for n, text in enumerate(text for texts in files for text in texts)]
    begin = 0
    for number, texts in enumerate(files):
        write_lines(folder / f"{number}.jsonl", whole[begin : begin + len(texts)])
        begin += len(texts)
    config = DataConfig(str(folder), tokenizer="byte", valid_fraction=share, hold_out=hold_out, shuffle=shuffle)
    if len(whole) < 2:
        with pytest.raises(InvalidValue, match=r"has only one document|is empty"):
            prepare(folder / "out", config)
        return
    train, valid = parts_of(prepare(folder / "out", config))
    assert train
    assert valid
    assert sorted(train + valid) == sorted(whole)
    assert valid == [text for text in whole if text in set(valid)]
    assert shuffle is not None or train == [text for text in whole if text in set(train)]
    if hold_out == "documents":
        assert len(valid) == min(max(round(share * len(whole)), 1), len(whole) - 1)
    else:
        longest = max(map(len, whole)) + 1
        held_out = sum(len(text) + 1 for text in valid)
        assert abs(held_out - share * sum(len(text) + 1 for text in whole)) <= longest
    if hold_out == "end":
        assert valid == whole[-len(valid) :]


def test_the_order_depends_on_the_seed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 64)
    source = write_lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(40)])
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        corpus = prepare(tmp_path / name, DataConfig(source, tokenizer="byte", shuffle=seed))
        assert corpus.info.train.documents == 36
        assert corpus.info.train.first == (1, 1)
        orders.append(parts_of(corpus)[0])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != sorted(orders[0], key=lambda text: int(text.split()[1]))


def test_a_stop_while_shuffling_loses_nothing(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(40)])
    config = DataConfig(source, tokenizer="byte", shuffle=1)
    whole = prepare(tmp_path / "whole", config)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(preparation, "_starts", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    assert prepare(tmp_path / "out", config).info.train == whole.info.train


def test_part_of_the_held_out_documents(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [f"document {i:02}" for i in range(40)])
    config = DataConfig(source, tokenizer="byte", valid_fraction=0.5, valid_tokens=60)
    corpus = prepare(tmp_path / "out", config)
    assert corpus.info.valid.tokens == 60
    assert corpus.info.valid.documents == (corpus.valid[:] == 256).sum() > 0
    tuning = hold_out_end(corpus, tmp_path / "tuning", share=0.2)
    assert tuning.info.train.documents + tuning.info.valid.documents == corpus.info.train.documents


def test_the_tokenizer_decides_if_the_field_does_not(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    world = prepare(tmp_path / "world", DataConfig(source), tokenizer=WORLD)
    assert parts_of(world) == [["one", "two"], ["three"]]
    plain = prepare(tmp_path / "plain", DataConfig(source), tokenizer=train_tokenizer("byte", "a"))
    assert plain.tokenizer.decode(plain.train[:]) == "one\ntwo\nthr"
    without_end = train_tokenizer("byte", "a")
    for name, value in (("end_of_text", True), ("hold_out", "documents"), ("shuffle", 1)):
        sentence = f"data.{name}={value!r} needs an end-of-text token, but the byte tokenizer has none; leave"
        with pytest.raises(InvalidValue, match=sentence):
            prepare(tmp_path / "no", DataConfig(source, **{name: value}), tokenizer=without_end)
    off = prepare(tmp_path / "off", DataConfig(source, end_of_text=False), tokenizer=WORLD)
    assert off.tokenizer.decode(off.train[:]) == "one\ntwo\nthr"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--data.hold-out", "documents"],
            "--data.hold-out='documents' needs ends of documents, but a.txt has none; set",
        ),
        (["--data.shuffle", "1"], "--data.shuffle=1 needs ends of documents, but a.txt has none; set --data.end-of"),
        (["--data.end-of-text", "True"], "a.txt has only one document, so that none can be held out; set --data.valid"),
        (["--data.shuffle", "-1"], "--data.shuffle"),
    ],
)
def test_refused_settings(tmp_path, capsys, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one two three " * 9)
    status, _, err = run_command(capsys, "data", "a.txt", *options)
    assert status == 2
    assert sentence in err


def test_the_command_prints_the_number_of_documents(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", ["one two"] * 30)
    status, out, _ = run_command(capsys, "data", "a.jsonl", "--out", "tokens", "--data.shuffle", "3")
    assert status == 0
    assert re.search("^train documents +27$", out, re.MULTILINE)
    (tmp_path / "a.txt").write_text("one two " * 30)
    assert "documents" not in run_command(capsys, "data", "a.txt")[1]
    assert open_corpus(tmp_path / "tokens").info.valid.documents == 3
