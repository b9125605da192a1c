"""Prepared folders, and batches as a pure function of the step."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.helpers.tiers import examples
from timemix.data.batches import Batches, validation_windows
from timemix.data.config import DataConfig
from timemix.data.corpus import evenly_spaced, is_corpus, open_corpus, open_run_corpus
from timemix.data.describe import describe, text_hash
from timemix.data.downloads import DOWNLOADS, Download
from timemix.data.prepare import hold_out_end, prepare
from timemix.errors import AlreadyExists, CannotWrite, FileError, InvalidValue, MissingFile, Unfit
from timemix.storage.files import LARGEST
from timemix.storage.json_files import to_json

TEXT = "abcdefgh\n" * 10 + "Zé鱼🐈\r\n 12\n"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(TEXT.encode())


def test_a_folder_of_very_many_files_is_opened_or_refused_before_its_tokens_are_written(monkeypatch):
    prepare(Path("out"), DataConfig(source="text.txt"))
    path = Path("out/data.json")
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"files": ["folder/" * 1000] * 5000}))
    assert path.stat().st_size > LARGEST
    assert len(open_corpus(Path("out")).info.files) == 5000
    monkeypatch.setattr("timemix.data.prepare.LARGEST_OF_TEXT", 20)
    with pytest.raises(InvalidValue, match="the text has 1 files, whose paths are too long together for data.json"):
        prepare(Path("other"), DataConfig(source="text.txt"))
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("kind", "unknown"), [("character", "error"), ("character", "byte"), ("byte", "error"), ("subword", "error")]
)
def test_a_prepared_folder_holds_the_text(kind, unknown):
    corpus = prepare(Path("out"), DataConfig(source="text.txt", tokenizer=kind, unknown=unknown, vocab_size=270))
    assert corpus.tokenizer.decode(corpus.train) == TEXT[: int(0.9 * len(TEXT))]
    assert corpus.tokenizer.decode(corpus.valid) == TEXT[int(0.9 * len(TEXT)) :]
    # A view of the file, not a copy in memory.
    assert not corpus.train[:].flags.writeable
    assert corpus.train.dtype == corpus.tokenizer.dtype
    assert Path("out/train-00000.bin").stat().st_size == len(corpus.train) * corpus.tokenizer.dtype.itemsize
    assert corpus.info.train.bytes + corpus.info.valid.bytes == len(TEXT.encode())
    again = open_corpus(Path("out"))
    assert again.tokenizer.hash == corpus.tokenizer.hash
    assert np.array_equal(again.train, corpus.train)
    assert is_corpus(Path("out"))
    assert not is_corpus(Path("."))
    assert not is_corpus(Path("text.txt"))


@given(st.integers(0, 300), st.integers(1, 400), st.integers(1, 30))
def test_spread_takes_pieces_in_order_from_beginning_to_end(tokens, most, pieces):
    ids = np.arange(tokens)
    kept = evenly_spaced(ids, most, pieces)
    assert len(kept) == min(tokens, most)
    assert (np.diff(kept) > 0).all()
    assert (np.diff(kept) > 1).sum() < pieces
    if tokens > most >= pieces > 1:
        assert (kept[0], kept[-1]) == (0, tokens - 1)
    np.testing.assert_array_equal(evenly_spaced(ids, None), ids)


def test_held_out_text_can_be_thinned():
    Path("long.txt").write_text("".join(f"line {i}\n" for i in range(500)))
    whole = prepare(Path("whole"), DataConfig(source="long.txt"))
    thin = prepare(Path("thin"), DataConfig(source="long.txt", valid_tokens=100))
    assert len(whole.valid) > 300
    np.testing.assert_array_equal(thin.valid, evenly_spaced(whole.valid, 100))
    np.testing.assert_array_equal(thin.train, whole.train)
    assert thin.info.valid.tokens == thin.info.valid.characters == 100


def test_unknown_characters_of_thinned_text_are_counted():
    Path("train.txt").write_text("abcdefgh" * 100)
    Path("valid.txt").write_text("abcdefgx" * 100)
    config = DataConfig(source="train.txt", valid="valid.txt", unknown="unk", valid_tokens=80)
    thin = prepare(Path("thin"), config)
    assert thin.info.valid.unknown == int((thin.valid[:] == thin.tokenizer.vocab_size - 1).sum()) > 0


def test_the_end_of_the_training_text_can_be_held_out():
    Path("long.txt").write_text("".join(f"line {i}\n" for i in range(500)))
    whole = prepare(Path("whole"), DataConfig(source="long.txt"))
    tuning = hold_out_end(whole, Path("tuning"), share=0.1)
    np.testing.assert_array_equal(np.concatenate([tuning.train, tuning.valid]), whole.train)
    assert len(tuning.train) == int(0.9 * len(whole.train))
    assert tuning.tokenizer.hash == whole.tokenizer.hash
    assert is_corpus(Path("tuning"))
    assert len(hold_out_end(whole, Path("less"), valid_tokens=30).valid) == 30


def test_the_hash_is_of_the_text_not_of_its_place():
    Path("again.txt").write_bytes(TEXT.encode())
    one = text_hash(DataConfig(source="text.txt"))
    assert one == text_hash(DataConfig(source="again.txt"))
    Path("valid.txt").write_text("a\n")
    assert one != text_hash(DataConfig(source="text.txt", valid="valid.txt"))
    prepare(Path("out"), DataConfig(source="text.txt"))
    prepare(Path("other"), DataConfig(source="text.txt", valid_fraction=0.2))
    assert text_hash(DataConfig(source="out")) != text_hash(DataConfig(source="other"))


def test_a_run_reads_its_own_tokens_then_the_prepared_folder_it_was_trained_on(tmp_path):
    """A new file with the name of the text does not change the held-out text of the run."""
    Path("more.txt").write_text("abc\n" * 50)
    own = prepare(Path("run/data"), DataConfig(source="more.txt")).info
    other = prepare(Path("taken"), DataConfig(source="text.txt")).info
    assert open_run_corpus(Path("run"), "taken").info == own
    assert open_run_corpus(Path("elsewhere"), "taken").info == other
    Path("taken").rename("moved")
    with pytest.raises(
        MissingFile, match="the tokens of elsewhere are missing: .* taken is a prepared folder; restore"
    ):
        open_run_corpus(Path("elsewhere"), "taken")


def test_ids_lie_on_disk_in_little_endian():
    corpus = prepare(Path("out"), DataConfig(source="text.txt", tokenizer="subword", vocab_size=270, valid_fraction=0))
    raw = Path("out/train-00000.bin").read_bytes()
    assert int.from_bytes(raw[:2], "little") == corpus.tokenizer.encode(TEXT)[0]


def test_the_alphabet_is_of_the_whole_text_and_words_of_the_training_part():
    Path("split.txt").write_text("one two three\n" * 9 + "six x seven é\n", encoding="utf-8")
    whole = Path("split.txt").read_text(encoding="utf-8")
    assert prepare(Path("c"), DataConfig(source="split.txt")).tokenizer.vocab_size == len(set(whole))
    words = prepare(Path("w"), DataConfig(source="split.txt", tokenizer="word", unknown="unk"))
    assert words.info.valid.unknown == 4
    assert words.tokenizer.vocab_size == len({"\n", "one", "two", "three", "<unk>"})
    with pytest.raises(Unfit, match="the valid text .* no 'six', .*, 'seven' and 'é' .*; .* choose data.unknown unk"):
        prepare(Path("v"), DataConfig(source="split.txt", tokenizer="word"))


def test_unknown_text_for_a_given_vocabulary_gets_advice_that_helps():
    Path("new.txt").write_text("abc Ω")
    made = prepare(Path("old"), DataConfig(source="text.txt")).tokenizer
    with pytest.raises(InvalidValue, match=r"no 'Ω' \(U\+03A9\); leave it out .*, or train a new model from random"):
        prepare(Path("next"), DataConfig(source="new.txt"), tokenizer=made)
    for name, value in (("unknown", "unk"), ("tokenizer", "byte")):
        sentence = f"data.{name}='{value}' contradicts the vocabulary of the trained model"
        with pytest.raises(InvalidValue, match=sentence):
            prepare(Path("next"), DataConfig(source="new.txt", **{name: value}), tokenizer=made)
    sizes = {"tokenizer": made.kind, "unknown": made.unknown, "valid_fraction": 0}
    assert len(prepare(Path("same"), DataConfig(source="text.txt", **sizes), tokenizer=made).train) == len(TEXT)


FILES = st.lists(st.text("ab\nZé鱼", max_size=12), min_size=1, max_size=5).filter(lambda files: any(files))


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES, share=st.sampled_from([0.1, 0.25, 0.5, 0.9]), hold_out=st.sampled_from(["each", "end"]))
def test_the_end_of_each_file_or_of_the_source_is_held_out(tmp_path_factory, files, share, hold_out):
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(files):
        (folder / f"{number}.txt").write_bytes(text.encode())
    # Every nonempty file but the last ends with a line end.
    whole = [text for text in files if text]
    whole = [text if text.endswith("\n") else text + "\n" for text in whole[:-1]] + whole[-1:]
    if hold_out == "end":
        whole = ["".join(whole)]
    ends = [int((1 - share) * end) for end in itertools.accumulate(map(len, whole), initial=0)]
    cuts = [after - before for before, after in itertools.pairwise(ends)]
    train = ""
    for text, cut in zip(whole, cuts, strict=True):
        # A line end separates the training parts of two files, as it separates the files.
        train += "\n" * (bool(train) and bool(text[:cut]) and not train.endswith("\n")) + text[:cut]
    config = DataConfig(str(folder), tokenizer="byte", valid_fraction=share, hold_out=hold_out)
    if not train:
        return
    corpus = prepare(folder / "out", config)
    assert corpus.tokenizer.decode(corpus.train[:]) == train
    assert corpus.tokenizer.decode(corpus.valid[:]) == "".join(t[c:] for t, c in zip(whole, cuts, strict=True))


def test_the_held_out_text_is_described_in_words():
    Path("texts").mkdir()
    for name in "abc":
        Path(f"texts/{name}.txt").write_text(f"{name}\n" * 50)
    Path("valid.txt").write_text("a\n")
    for settings, words in [
        ({"source": "texts"}, "the last 10 % of each of 3 files"),
        ({"source": "texts", "hold_out": "end", "valid_fraction": 0.25}, "the last 25 % of texts"),
        ({"source": "text.txt"}, "the last 10 % of text.txt"),
        ({"source": "texts", "valid": "valid.txt"}, "all of valid.txt"),
        ({"source": "texts", "valid_fraction": 0}, "nothing"),
    ]:
        config = DataConfig(**settings)
        assert describe(config).held_out == words
        assert prepare(Path("out"), config).info.held_out == words
        assert open_corpus(Path("out")).info.held_out == words
        shutil.rmtree("out")


def test_a_file_may_not_be_in_both_texts(caplog):
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("a line of the first file, long enough\n" * 3)
    Path("texts/b.txt").write_text("b\n")
    Path("link.txt").symlink_to("texts/b.txt")
    for valid in ("texts/b.txt", "link.txt", "texts/*.txt"):
        with pytest.raises(InvalidValue, match=r"texts/.\.txt is in both data\.source and data\.valid; remove it"):
            describe(DataConfig("texts", valid))
    assert not caplog.messages


@pytest.mark.parametrize("change", ["\n", "\na new line, which is long enough to count\n"])
def test_a_validation_text_with_lines_of_the_training_text_brings_a_warning(caplog, change):
    lines = "".join(f"line {i} of a text that both files share\n" for i in range(40))
    Path("train.txt").write_text("a first line that is not shared with it\n" + lines)
    Path("valid.txt").write_text(lines + change)
    describe(DataConfig("train.txt", "valid.txt", tokenizer="byte"))
    (warning,) = caplog.messages
    sentence = (
        "40 of 4[01] lines of valid.txt are also in the training text: the .* loss .* too low; use another .* text"
    )
    assert re.fullmatch(sentence, warning)
    caplog.clear()
    Path("valid.txt").write_text(lines.replace("share", "do not share") + lines[:120])
    describe(DataConfig("train.txt", "valid.txt", tokenizer="byte"))
    assert not caplog.messages


def test_no_validation():
    corpus = prepare(Path("out"), DataConfig(source="text.txt", valid_fraction=0))
    assert (len(corpus.train), len(corpus.valid)) == (len(TEXT), 0)
    assert len(open_corpus(Path("out")).valid) == 0


def test_separate_validation_text():
    Path("valid.txt").write_text("abcxyx", encoding="utf-8")
    with pytest.raises(Unfit, match=r"'x' \(U\+0078\) and 'y' \(U\+0079\); .* choose data.unknown unk"):
        prepare(Path("out"), DataConfig(source="text.txt", valid="valid.txt"))
    assert not Path("out").exists()
    for unknown, tokens in (("unk", 6), ("byte", 6)):
        corpus = prepare(Path(unknown), DataConfig(source="text.txt", valid="valid.txt", unknown=unknown))
        assert corpus.info.valid.unknown == 3
        assert (len(corpus.train), len(corpus.valid)) == (len(TEXT), tokens)


def test_the_validation_part_of_a_download(monkeypatch, tmp_path):
    import zipfile

    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache")
    monkeypatch.setitem(DOWNLOADS, "served", Download("http://127.0.0.1:9/", "text.zip", "train.txt", "valid.txt"))
    Path("cache").mkdir()
    with zipfile.ZipFile("cache/text.zip", "w") as archive:
        archive.writestr("train.txt", "train text")
        archive.writestr("valid.txt", "air")
    corpus = prepare(Path("out"), DataConfig(source="served"))
    assert corpus.tokenizer.decode(corpus.valid) == "air"
    assert corpus.tokenizer.decode(corpus.train) == "train text"


def test_describe_counts():
    report = to_json(describe(DataConfig(source="text.txt", tokenizer="byte")))
    assert report["characters"] == len(TEXT)
    assert report["bytes"] == report["train"]["tokens"] + report["valid"]["tokens"] == len(TEXT.encode())
    assert report["distinct_characters"] == len(set(TEXT))
    assert (report["tokenizer"], report["vocab_size"]) == ("byte", 256)
    assert sorted(p.name for p in Path(".").iterdir()) == ["text.txt"]
    json.dumps(report)


def test_a_failed_preparation_can_be_made_again_and_leaves_nothing(monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CannotWrite, match="no space left on the device for .*out"):
            prepare(Path("out"), DataConfig(source="text.txt"))
    assert not Path("out").exists()
    prepare(Path("out"), DataConfig(source="text.txt"))
    assert sorted(p.name for p in Path(".").iterdir()) == ["out", "text.txt"]


def test_an_existing_folder_is_left_alone():
    Path("out").mkdir()
    with pytest.raises(AlreadyExists, match="out exists already; choose another folder"):
        prepare(Path("out"), DataConfig(source="text.txt"))


def test_damaged_folders_are_refused():
    def refused(sentence):
        with pytest.raises(FileError, match=sentence):
            open_corpus(Path("out"))
        shutil.rmtree("out")
        prepare(Path("out"), DataConfig(source="text.txt"))

    prepare(Path("out"), DataConfig(source="text.txt"))
    Path("out/train-00000.bin").write_bytes(Path("out/train-00000.bin").read_bytes()[:-1])
    refused(r"out/train-00000\.bin is damaged: it has \d+ bytes, not \d+; prepare")
    Path("out/train-00000.bin").write_bytes(b"\xff" + Path("out/train-00000.bin").read_bytes()[1:])
    refused(r"out/train-00000\.bin is damaged: its id 255 is outside the vocabulary")
    Path("out/train-00000.bin").write_bytes(b"\0" + Path("out/train-00000.bin").read_bytes()[1:])
    refused(r"out/train-00000\.bin is damaged: its content differs from its hash")
    Path("out/valid-00000.bin").unlink()
    refused(r"cannot read out/valid-00000\.bin: No such file")
    for text in ("", "{", "[]", "{}", '{"format_version": 1}'):
        Path("out/data.json").write_text(text)
        refused(r"out/data\.json is damaged")
    Path("out/data.json").write_text(
        Path("out/data.json").read_text().replace('"format_version": 2', '"format_version": 9')
    )
    refused(r"out/data\.json has format_version 9, but this timemix supports 1 and 2")
    Path("out/tokenizer.json").unlink()
    refused(r"cannot read the tokenizer out/tokenizer\.json")
    prepare(Path("other"), DataConfig(source="text.txt", tokenizer="byte"))
    Path("out/tokenizer.json").write_bytes(Path("other/tokenizer.json").read_bytes())
    refused(r"out/tokenizer\.json is not the tokenizer of the tokens")
    with pytest.raises(MissingFile, match=r"cannot read nowhere/data\.json: No such file"):
        open_corpus(Path("nowhere"))


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(0, 90))


@pytest.mark.parametrize("order", ["random", "epoch"])
@examples(50)
@given(sizes=SIZES, seed=st.integers(0, 2**32), steps=st.lists(st.integers(0, 500), min_size=2, max_size=6))
def test_batches_are_a_function_of_the_step(order, sizes, seed, steps):
    ctx_len, batch_size, more = sizes
    tokens = np.arange(ctx_len + 1 + more, dtype=np.uint8)

    def batches():
        return Batches(tokens, batch_size=batch_size, ctx_len=ctx_len, seed=seed, order=order)

    one = batches()
    forwards = {step: one(step) for step in sorted(steps)}
    for step in steps:
        inputs, targets = batches()(step)
        assert np.array_equal(inputs, forwards[step][0])
        assert np.array_equal(targets, forwards[step][1])
        assert inputs.shape == targets.shape == (batch_size, ctx_len)
        assert inputs.dtype == targets.dtype == np.int64
        # Each token is its own position: a window counts up by one, and its targets are larger by one.
        assert np.array_equal(inputs, inputs[:, :1] + np.arange(ctx_len))
        assert np.array_equal(targets, inputs + 1)
        assert targets.max() <= tokens[-1]


def test_random_windows_reach_every_place_and_differ_by_seed():
    tokens = np.arange(20, dtype=np.uint8)
    batches = Batches(tokens, batch_size=64, ctx_len=8, seed=1)
    counts = np.bincount(np.concatenate([batches(step)[0][:, 0] for step in range(200)]), minlength=12)
    assert len(counts) == 12
    # 12800 draws of 12 positions: 1067 each, with standard deviation 31.
    assert abs(counts - 12800 / 12).max() < 160
    other = Batches(tokens, batch_size=64, ctx_len=8, seed=2)
    assert not np.array_equal(batches(0)[0], other(0)[0])
    assert not np.array_equal(batches(0)[0], batches(1)[0])


@examples(50)
@given(ctx_len=st.integers(1, 8), windows=st.integers(1, 12), rest=st.integers(0, 7), seed=st.integers(0, 99))
def test_every_window_comes_once_per_epoch(ctx_len, windows, rest, seed):
    tokens = np.arange((windows + 1) * ctx_len + 1 + rest % ctx_len, dtype=np.uint8)
    batches = Batches(tokens, batch_size=1, ctx_len=ctx_len, seed=seed, order="epoch")
    starts = np.array([batches(step)[0][0, 0] for step in range(3 * windows)]).reshape(3, windows)
    for epoch in starts:
        first = epoch.min()
        assert 0 <= first <= ctx_len
        assert np.array_equal(np.sort(epoch), first + ctx_len * np.arange(windows))


def test_epochs_differ_in_order_and_phase():
    tokens = np.arange(201, dtype=np.uint8)
    batches = Batches(tokens, batch_size=7, ctx_len=10, seed=0, order="epoch")
    starts = np.concatenate([batches(step)[0][:, 0] for step in range(19 * 30 // 7)])
    epochs = starts[: len(starts) // 19 * 19].reshape(-1, 19)
    assert len(set(epochs.min(1).tolist())) > 5
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("order", ["random", "epoch"])
def test_a_text_of_one_window_and_one_shorter(order):
    inputs, targets = Batches(np.arange(9), batch_size=2, ctx_len=8, seed=0, order=order)(5)
    assert inputs.tolist() == [list(range(8))] * 2
    assert targets.tolist() == [list(range(1, 9))] * 2
    with pytest.raises(InvalidValue, match="the training text has 8 tokens, but a window of ctx_len=8 needs 9"):
        Batches(np.arange(8), batch_size=2, ctx_len=8, seed=0, order=order)


@examples(100)
@given(length=st.integers(0, 120), ctx_len=st.integers(1, 20), batch_size=st.integers(1, 6))
def test_validation_takes_every_target_once(length, ctx_len, batch_size):
    tokens = np.arange(length, dtype=np.uint8)
    windows = list(validation_windows(tokens, ctx_len, batch_size))
    targets = np.concatenate([y.ravel() for _, y in windows] or [tokens[:0]])
    assert targets.tolist() == list(range(1, length))
    for x, y in windows:
        assert np.array_equal(x + 1, y)
        assert x.dtype == y.dtype == np.int64
        assert x.shape[0] <= batch_size
    assert all(x.shape[1] == ctx_len for x, _ in windows[:-1])
    rest = (length - 1) % ctx_len if length else 0
    if rest:
        assert windows[-1][0].shape == (1, rest)


def test_a_text_of_tinyshakespeares_size_is_split_as_everywhere():
    """Of 1,115,394 characters, 65 of them distinct, the first 1,003,854 are for training."""
    text = "".join(chr(32 + i) for i in range(65)) * 17160
    Path("long.txt").write_text(text[:1115394])
    corpus = prepare(Path("out"), DataConfig(source="long.txt"))
    assert (len(corpus.train), len(corpus.valid), corpus.tokenizer.vocab_size) == (1003854, 111540, 65)
