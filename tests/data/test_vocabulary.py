"""The vocabulary file of the World tokenizer: from a path, a folder, a package or a server, and in use."""

import hashlib
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.helpers.servers import serving
from tests.helpers.tiers import examples
from tests.helpers.vocabularies import BYTES, vocabulary_lines
from timemix.data import pipeline, vocabulary
from timemix.data.config import DataConfig
from timemix.data.corpus import TokenizerInfo
from timemix.data.prepare import prepare
from timemix.data.vocabulary import world_tokenizer
from timemix.errors import DamagedFile, InvalidValue, TimemixError, Unavailable
from timemix.tokenizers.make import load_tokenizer
from timemix.tokenizers.world import WorldTokenizer

FILE = "rwkv_vocab_v20230424.txt"
TOKENS = [*BYTES, b" the", b"the", b". ", b"\n\n", "é".encode()]
CONTENT = vocabulary_lines(TOKENS)
HASH = WorldTokenizer(TOKENS).hash


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The environment of the tests may have a package with the file.
    monkeypatch.setattr(vocabulary, "PACKAGES", ("timemix-of-no-one",))


def install(folder, name="timemix-of-no-one", file=f"of_no_one/data/{FILE}"):
    """Install a package with a vocabulary file in a folder."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"of_no_one/__init__.py,,\n{file},,\n")
    (folder / "of_no_one/data").mkdir(parents=True)
    (folder / "of_no_one/__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "of_no_one/data" / FILE).write_bytes(CONTENT)


def test_a_file_or_the_folder_of_the_file(tmp_path):
    (tmp_path / FILE).write_bytes(CONTENT)
    (tmp_path / "other.txt").write_bytes(vocabulary_lines(BYTES))
    assert world_tokenizer(tmp_path / FILE).hash == world_tokenizer(str(tmp_path)).hash == HASH
    assert world_tokenizer("other.txt").hash == WorldTokenizer(BYTES).hash


def test_an_installed_package_is_found_without_an_import(tmp_path, monkeypatch):
    install(tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert world_tokenizer().hash == HASH
    assert "of_no_one" not in sys.modules
    (tmp_path / "packages/of_no_one/data" / FILE).unlink()
    with pytest.raises(Unavailable, match="is not installed"):
        world_tokenizer()


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    with serving(CONTENT) as server:
        served = server.download(file=FILE, sha256=hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setattr(vocabulary, "PUBLISHED", served)
        for _ in range(2):
            assert world_tokenizer("rwkv_vocab_v20230424", cache=tmp_path / "cache").hash == HASH
        assert server.asked == [None]
        monkeypatch.setattr(vocabulary, "PUBLISHED", replace(served, sha256="0" * 64))
        with pytest.raises(
            DamagedFile, match=rf"has changed: its sha256 is not 0+; download {served.url} by other means"
        ):
            world_tokenizer("rwkv_vocab_v20230424", cache=tmp_path / "other")
    (tmp_path / "rwkv_vocab_v20230424").write_bytes(vocabulary_lines(BYTES))
    assert world_tokenizer("rwkv_vocab_v20230424").hash == WorldTokenizer(BYTES).hash


def test_the_published_file():
    assert vocabulary.PUBLISHED.file == FILE
    assert vocabulary.PUBLISHED.url.endswith(f"/{FILE}")
    assert vocabulary.PUBLISHED.sha256 == "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"


@pytest.mark.parametrize(
    ("source", "kind", "beginning"),
    [
        (None, Unavailable, "the vocabulary of the World tokenizer is not installed; "),
        (".", InvalidValue, f"data.vocabulary='.' has no file {FILE}; "),
        ("nowhere.txt", InvalidValue, "data.vocabulary='nowhere.txt' is not a file, folder or download; "),
    ],
)
def test_a_missing_vocabulary_names_all_ways_out(source, kind, beginning):
    with pytest.raises(kind) as caught:
        world_tokenizer(source)
    assert str(caught.value).startswith(beginning)
    assert str(caught.value).endswith(
        f"set data.vocabulary to the path of {FILE}, or to rwkv_vocab_v20230424 to download the file, or install a"
        " package with the file: pip install rwkv"
    )


def test_a_vocabulary_for_another_tokenizer_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(InvalidValue, match="data.vocabulary='v.txt' has no effect on data.tokenizer='byte'; set data"):
        prepare(tmp_path / "out", DataConfig(source="text.txt", tokenizer="byte", vocabulary="v.txt"))


def test_a_missing_vocabulary_is_reported_before_the_text_is_read(tmp_path):
    with pytest.raises(TimemixError, match="is not installed"):
        prepare(tmp_path / "out", DataConfig(source="nowhere.txt", tokenizer="world"))


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("the. \néa鱼", min_size=1, max_size=80), part=st.integers(0, 9))
def test_a_text_in_pieces_has_the_tokens_of_the_whole_text(tmp_path_factory, text, part):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_bytes(text.encode())
    tokenizer = WorldTokenizer(TOKENS, 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PART", part)
        config = DataConfig(source=str(folder / "text.txt"), valid_fraction=0)
        corpus = prepare(folder / "out", config, tokenizer=tokenizer)
    np.testing.assert_array_equal(corpus.train[:], tokenizer.encode(text))


def test_the_tokenizer_of_the_settings_is_in_the_prepared_folder(tmp_path):
    (tmp_path / "text.txt").write_text("the text. " * 100)
    (tmp_path / FILE).write_bytes(CONTENT)
    corpus = prepare(tmp_path / "out", DataConfig(source="text.txt", tokenizer="world", vocabulary=FILE))
    assert corpus.info.tokenizer == TokenizerInfo("world", 65536, HASH)
    assert load_tokenizer(tmp_path / "out/tokenizer.json").hash == HASH
    assert corpus.train[:3].tolist() == [258, 33, 117]
