"""Preparation in pieces: the same tokens as in one piece, with files of any size, also after a kill."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.helpers.pairwise import pairwise
from tests.helpers.preparing import contents, kill_after, started
from tests.helpers.tiers import examples
from timemix.data import pipeline as text
from timemix.data import shards
from timemix.data.config import DataConfig
from timemix.data.corpus import open_corpus
from timemix.data.prepare import prepare
from timemix.data.shards import Tokens
from timemix.data.sources import read_source
from timemix.errors import DamagedFile, InUse, TimemixError
from timemix.tokenizers.make import train_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = 'It was a day, as zé said: "no"\nand 12 fish 鱼🐈 swam; o\'er the sea.\n' * 12


@pytest.fixture
def small(monkeypatch):
    """Use pieces of a few characters and files of a few tokens."""

    def pieces_of(characters: int, shard: int) -> None:
        for module in (text, sys.modules["timemix.data.prepare"]):
            monkeypatch.setattr(module, "PART", characters)
        monkeypatch.setattr(shards, "SHARD_BYTES", shard)

    return pieces_of


@given(
    lengths=st.lists(st.integers(0, 7), max_size=6),
    a=st.integers(-45, 45) | st.none(),
    b=st.integers(-45, 45) | st.none(),
    c=st.integers(-45, 45) | st.none(),
)
def test_tokens_slice_like_one_array(lengths, a, b, c):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    tokens = Tokens(np.split(whole, np.cumsum(lengths)[:-1]) if lengths else [], whole.dtype)
    assert len(tokens) == len(whole)
    np.testing.assert_array_equal(tokens[a:b], whole[a:b])
    np.testing.assert_array_equal(tokens.part(slice(a, b))[c:], whole[a:b][c:])
    np.testing.assert_array_equal(np.concatenate([np.empty(0, np.uint16), *tokens.blocks()]), whole)
    assert tokens[a:b].dtype == whole.dtype


KINDS = [("character", "error"), ("character", "unk"), ("character", "byte"), ("byte", "error"), ("subword", "error"),
         ("word", "unk")]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "encoding", "compressed", "sizes"),
    pairwise(KINDS, ["utf-8", "utf-16", "latin-1"], [False, True], [(1, 2), (7, 16), (64, 10**6)]),
)
def test_pieces_give_the_tokens_of_the_whole(tmp_path, small, choice, encoding, compressed, sizes):
    (kind, unknown), (part, shard) = choice, sizes
    # One file per token takes long, so the text is shorter.
    words = WORDS if part > 1 else WORDS[: len(WORDS) // 4]
    content = words if encoding != "latin-1" else words.replace("鱼🐈", "ß")
    path = tmp_path / ("text.txt.gz" if compressed else "text.txt")
    raw = content.encode(encoding)
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    assert read_source(str(path), encoding=encoding).text == content
    small(part, shard)
    config = DataConfig(source=str(path), encoding=encoding, tokenizer=kind, unknown=unknown, vocab_size=270)
    corpus = prepare(tmp_path / "out", config)
    cut = int(0.9 * len(content))
    basis = content if kind == "character" else content[:cut]
    made = train_tokenizer(kind, [basis], vocab_size=270, unknown=unknown)
    assert corpus.tokenizer.hash == made.hash
    np.testing.assert_array_equal(corpus.train[:], made.encode_lenient(content[:cut])[0])
    np.testing.assert_array_equal(corpus.valid[:], made.encode_lenient(content[cut:])[0])
    assert corpus.info.valid.unknown == made.encode_lenient(content[cut:])[1]
    files = sorted((tmp_path / "out").glob("train-*.bin"))
    assert len(files) == -(-len(corpus.train) // max(1, shard // made.dtype.itemsize))
    assert max(file.stat().st_size for file in files) <= max(shard, made.dtype.itemsize)


@examples(30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text("ab \nZ.é鱼", min_size=1, max_size=80), part=st.integers(1, 9), kind=st.sampled_from(KINDS))
def test_any_text_in_any_pieces(tmp_path_factory, content, part, kind):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_bytes(content.encode())
    config = DataConfig(
        source=str(folder / "text.txt"), tokenizer=kind[0], unknown=kind[1], vocab_size=270, valid_fraction=0
    )
    try:
        made = train_tokenizer(kind[0], [content], vocab_size=270, unknown=kind[1])
    except TimemixError:
        with pytest.raises(TimemixError):
            prepare(folder / "out", config)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PART", part)
        patch.setattr(sys.modules["timemix.data.prepare"], "PART", part)
        corpus = prepare(folder / "out", config)
    np.testing.assert_array_equal(corpus.train[:], made.encode(content))


def test_a_killed_preparation_resumes_bit_identically(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS)

    def begin(out: str) -> subprocess.Popen:
        return started(tmp_path / "text.txt", tmp_path / out, 400, unknown="unk")

    whole = begin("whole").communicate()[0].split()
    assert len(whole) > 2
    kill_after(begin("killed"), 1)
    assert not (tmp_path / "killed").exists()
    assert list((tmp_path / ".killed.unfinished").glob("train-*.bin"))
    rest = begin("killed").communicate()[0].split()
    assert len(rest) < len(whole)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "text.txt", "whole"]


def test_a_changed_text_starts_again(tmp_path, small, monkeypatch):
    small(50, 400)
    source = tmp_path / "text.txt"
    source.write_text(WORDS)
    config = DataConfig(source=str(source))
    finish = shards.ShardWriter._finish

    def stops(self):
        finish(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "_finish", stops)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", config)
    source.write_text(WORDS.replace("day", "way"))
    prepare(tmp_path / "out", config)
    prepare(tmp_path / "fresh", config)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_several_processes_give_what_one_gives(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(WORDS * 40)
    for kind, unknown in (("character", "error"), ("word", "unk")):
        config = DataConfig(source=str(tmp_path / "text.txt"), tokenizer=kind, unknown=unknown)
        prepare(tmp_path / f"{kind}-one", config)
        with monkeypatch.context() as patch:
            patch.setattr(text, "PROCESSES_FROM", 1)
            patch.setattr(text, "cores", lambda: 2)
            prepare(tmp_path / f"{kind}-two", config)
        assert contents(tmp_path / f"{kind}-one") == contents(tmp_path / f"{kind}-two")


def test_without_worker_processes_one_process_reads_the_text(tmp_path, monkeypatch, caplog):
    """Without a writable /dev/shm, semaphores between processes cannot be created."""

    def fails(*arguments, **options):
        raise OSError(38, "Function not implemented")

    (tmp_path / "text.txt").write_text(WORDS)
    monkeypatch.setattr(text, "PROCESSES_FROM", 1)
    monkeypatch.setattr(text, "cores", lambda: 2)
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", fails)
    corpus = prepare(tmp_path / "out", DataConfig(source=str(tmp_path / "text.txt")))
    assert len(corpus.train) == int(0.9 * len(WORDS))
    assert "cannot start 2 processes (Function not implemented); one process reads the text" in caplog.text


def test_a_file_is_prepared_as_version_1_prepared_it(tmp_path, monkeypatch):
    fixtures = ROOT / "tests" / "fixtures" / "version1"
    monkeypatch.chdir(fixtures)
    prepare(tmp_path / "out", DataConfig(source="words.txt", tokenizer="subword", vocab_size=280))
    old, new = contents(fixtures / "prepared-subword"), contents(tmp_path / "out")
    before, now = (json.loads(folder.pop("data.json")) for folder in (old, new))
    assert new == old
    for split in ("train", "valid"):
        now[split] = {name: now[split][name] for name in before[split]}
    assert before == {name: now[name] for name in before}


def test_folders_of_version_1_open(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS)
    out = tmp_path / "out"
    corpus = prepare(out, DataConfig(source=str(tmp_path / "text.txt")))
    train, valid = corpus.train[:].copy(), corpus.valid[:].copy()
    info = json.loads((out / "data.json").read_text()) | {"format_version": 1}
    for split in ("train", "valid"):
        (out / f"{split}-00000.bin").rename(out / f"{split}.bin")
        del info[split]["shards"]
    (out / "data.json").write_text(json.dumps(info))
    old = open_corpus(out)
    np.testing.assert_array_equal(old.train[:], train)
    np.testing.assert_array_equal(old.valid[:], valid)
    (out / "train.bin").write_bytes(b"\1" + (out / "train.bin").read_bytes()[1:])
    with pytest.raises(DamagedFile, match=r"train\.bin is damaged: its content differs from its hash"):
        open_corpus(out)


def test_two_processes_do_not_prepare_one_folder(tmp_path):
    from timemix.storage.locks import claimed

    (tmp_path / "text.txt").write_text(WORDS)
    with claimed(tmp_path / ".out.lock"), pytest.raises(InUse, match="another process is preparing"):
        prepare(tmp_path / "out", DataConfig(source=str(tmp_path / "text.txt")))
