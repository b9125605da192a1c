"""Datasets of Hugging Face as sources: local folders, and a server on this machine in place of the Hub."""

import io
import json
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet as writer

from tests.helpers.commands import run_command
from tests.helpers.hub import COMMIT, hub_server
from timemix.data.config import DataConfig
from timemix.data.hub import parsed
from timemix.data.prepare import prepare
from timemix.data.sources import open_source, read_source
from timemix.errors import DamagedFile, InvalidValue, MissingFile, Unavailable
from timemix.runtime.progress import untold

TEXTS = [f"This is story {i}, of a dog and a cat." for i in range(300)]
JOINED = "\n".join(TEXTS)


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def parquet(texts):
    file = io.BytesIO()
    writer.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), file)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "place", "revision", "config", "split"),
    [
        ("hf:imdb", "imdb", None, None, None),
        ("hf:u/stories:en:test", "u/stories", None, "en", "test"),
        ("hf:u/stories@main::test", "u/stories", "main", None, "test"),
    ],
)
def test_the_parts_of_a_name(folder, source, place, revision, config, split):
    found = parsed(source)
    assert (found.place, found.revision, found.config, found.split) == (place, revision, config, split)
    assert str(found) == source
    assert not found.is_folder


def test_a_folder_may_have_colons_in_its_name(folder):
    (folder / "a:b").mkdir()
    assert (parsed("hf:a:b::test").place, parsed("hf:a:b::test").split) == ("a:b", "test")
    assert parsed("hf:a:b").is_folder


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:", "'hf:' names no dataset; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"),
        ("hf:a:b:c:d", "'hf:a:b:c:d' names no dataset"),
        ("hf:./none", "hf:./none names ./none, which is not a folder; name a folder or a dataset on the Hub"),
    ],
)
def test_wrong_names(folder, source, words):
    with pytest.raises((InvalidValue, MissingFile)) as error:
        open_source(source)
    assert words in str(error.value)


def test_a_folder_of_files_and_its_validation_text(folder):
    for split, texts in (("train", TEXTS), ("validation", TEXTS[:9]), ("test", ["last"])):
        (folder / f"{split}.jsonl").write_text(json_lines(texts))
    source = open_source(f"hf:{folder}")
    for _ in range(2):
        assert "".join(text for _, text in source.read(untold)) == JOINED
    assert "".join(text for _, text in source.valid.read(untold)) == "\n".join(TEXTS[:9])
    assert (source.files, source.valid.files) == ((f"hf:{folder}::train",), (f"hf:{folder}::validation",))
    alone = open_source("hf:.::test")
    assert "".join(text for _, text in alone.read(untold)) == "last"
    assert alone.valid is None
    prepared = prepare(folder / "tokens", DataConfig(source=f"hf:{folder}", tokenizer="byte"))
    assert (prepared.info.train.characters, prepared.info.held_out) == (
        sum(map(len, TEXTS)),
        f"hf:{folder}::validation",
    )
    assert (prepared.info.train.documents, prepared.info.valid.documents) == (300, 9)
    assert prepared.tokenizer.decode(prepared.valid[: len(prepared.valid)]).startswith(TEXTS[0])


def test_a_folder_written_by_save_to_disk(folder, capfd):
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"id": list(range(300)), "text": TEXTS})
    data.save_to_disk("one")
    datasets.DatasetDict(train=data, validation=data.select(range(8, 3, -1))).save_to_disk("two")
    datasets.enable_progress_bars()
    capfd.readouterr()
    assert read_source("hf:one").text == read_source("hf:two").text == JOINED
    assert read_source("hf:two").valid == "\n".join(TEXTS[8:3:-1])
    done = []
    assert list(open_source("hf:one").read(done.append))
    assert 0 < done[-1] <= open_source("hf:one").size
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InvalidValue, match="hf:two:a names a config, but it has none; for a split, write hf:two:"):
        open_source("hf:two:a")
    assert not datasets.utils.are_progress_bars_disabled()


CONFIGS = "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: de\n  data_files: de.jsonl\n---\n"


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        ({}, "hf:x", "hf:x has no data files; name a dataset with texts"),
        (
            {"a.jsonl": '{"text": "a"}'},
            "hf:x::y",
            "hf:x::y has no split 'y'; its splits: train; write one: hf:x::train",
        ),
        ({"a.jsonl": '{"text": "a"}'}, "hf:x:y", "has no config 'y'; known: default; for a split, write hf:x::SPLIT"),
        ({"a.jsonl": '{"body": "a"}'}, "hf:x", "hf:x::train has no column 'text'; known: body; set data.text_key"),
        ({"a.jsonl": '{"text": 3}'}, "hf:x", "has the column 'text' of type int64; it must be a column of texts"),
        (
            {"a.jsonl": '{"text": "a"}\n{"text": null}'},
            "hf:x",
            "hf:x::train, row 2, has 'text' null; it must be a text",
        ),
        ({"a.jsonl": '{"text": ""}'}, "hf:x", "hf:x::train is empty; name a source with text"),
        ({"a.jsonl": '{"text": "a"}\n{"te'}, "hf:x", "package datasets cannot read hf:x::train: JSON parse error"),
        ({"a.parquet": "no"}, "hf:x", "the package datasets cannot read hf:x: Parquet file size is 2 bytes"),
        (
            {"README.md": CONFIGS, "en.jsonl": '{"text": "a"}', "de.jsonl": '{"text": "b"}'},
            "hf:x",
            "hf:x has several configs: en, de; write one of them, as in hf:x:en",
        ),
        ({"x.py": "print(1)"}, "hf:x", "hf:x consists of a Python script, which timemix does not run; name a dataset"),
    ],
)
def test_a_wrong_folder_is_one_sentence(folder, capfd, files, source, words):
    (folder / "x").mkdir()
    for name, content in files.items():
        (folder / "x" / name).write_text(content)
    capfd.readouterr()
    with pytest.raises((InvalidValue, MissingFile, DamagedFile, Unavailable)) as error:
        read_source(source)
    assert words in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_the_command_line_without_network(folder, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, out, err = run_command(capsys, "data", "hf:u/stories")
    assert (status, out) == (2, "")
    assert err == "timemix: hf:u/stories is not in the cache, and HF_HUB_OFFLINE is set; unset it\n"
    monkeypatch.setitem(sys.modules, "datasets", None)
    status, out, err = run_command(capsys, "data", "hf:u/stories")
    assert (status, err) == (2, "timemix: hf:u/stories needs the package datasets: pip install 'timemix[data]'\n")


READER = """
import json, sys
from timemix.data.sources import read_source
from timemix.errors import TimemixError
found = {}
for source in sys.argv[1:]:
    try:
        text = read_source(source, progress=True)
        found[source] = [text.text, text.valid, *text.files]
    except TimemixError as error:
        found[source] = str(error)
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server() as (hub, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        # From another user of these variables, such as a token.
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        hub.files["u/stories"] = {
            "README.md": b"---\nlicense: mit\n---\n",
            "data/train-00000-of-00002.parquet": parquet(TEXTS[:150]),
            "data/train-00001-of-00002.parquet": parquet(TEXTS[150:]),
            "data/validation-00000-of-00001.parquet": parquet(TEXTS[:9]),
        }
        yield hub


def read(*sources):
    """Read sources in a process of its own, since the address of the Hub is read at the import of the packages."""
    done = subprocess.run([sys.executable, "-c", READER, *sources], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_a_dataset_is_downloaded_once_and_stays_at_its_commit(hub, tmp_path, monkeypatch):
    train, valid = f"hf:u/stories@{COMMIT}::train", f"hf:u/stories@{COMMIT}::validation"
    found, messages = read("hf:u/stories")
    assert found["hf:u/stories"] == [JOINED, "\n".join(TEXTS[:9]), train]
    assert messages.splitlines() == [f"downloading {each}: 0.0 MB" for each in (train, valid)]
    pinned = f"hf:u/stories@{COMMIT}"
    found, messages = read("hf:u/stories", "hf:u/stories::validation", pinned)
    assert messages == ""
    assert found["hf:u/stories"] == found[pinned] == [JOINED, "\n".join(TEXTS[:9]), train]
    assert found["hf:u/stories::validation"] == ["\n".join(TEXTS[:9]), None, valid]

    (path,) = (tmp_path / "cache").rglob("*validation--text.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:99])
    source = "hf:u/stories::validation"
    assert read(source)[0] == {source: f"{path} is damaged; delete it to download the dataset again"}
    path.write_bytes(whole)

    # A new commit gives a new text, and the old commit is still in the cache.
    hub.commits["u/stories"], hub.files["u/stories"] = COMMIT[::-1], {"a.jsonl": json_lines(["new"]).encode()}
    found, _ = read("hf:u/stories", pinned)
    assert found["hf:u/stories"] == ["new", None, f"hf:u/stories@{COMMIT[::-1]}::train"]
    assert found[pinned][0] == JOINED

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found, messages = read("hf:u/stories", pinned, "hf:u/other", "hf:u/stories@v1")
    assert (found["hf:u/stories"][0], found[pinned][0]) == ("new", JOINED)
    assert f"reading the texts of commit {COMMIT[::-1]}, which are in the cache" in messages
    for source in ("hf:u/other", "hf:u/stories@v1"):
        assert found[source] == (
            f"cannot read {source} from http://127.0.0.1:9 ([Errno 111] Connection refused); check the network and try"
            " again"
        )


@pytest.mark.slow
def test_an_earlier_commit_gives_its_own_text(hub):
    earlier = COMMIT[::-1]
    hub.earlier[earlier] = {"a.jsonl": json_lines(["old"]).encode()}
    source = f"hf:u/stories@{earlier}"
    assert read(source)[0][source] == ["old", None, f"{source}::train"]


@pytest.mark.slow
def test_what_a_hub_refuses_is_one_sentence(hub):
    hub.files |= {
        "u/configs": {"README.md": CONFIGS.encode(), "en.jsonl": b'{"text": "a"}\n', "de.jsonl": b'{"text": "b"}\n'},
        "u/script": {"script.py": b"print(1)"},
        "u/gated": {"a.jsonl": b'{"text": "a"}\n'},
        "u/empty": {"README.md": b"empty"},
        "u/damaged": {"train.parquet": b"PAR1" + bytes(99)},
    }
    hub.gated.add("u/gated")
    words = {
        "hf:u/configs": "hf:u/configs has several configs: en, de; write one of them, as in hf:u/configs:en",
        "hf:u/configs:fr": "hf:u/configs:fr has no config 'fr'; known: en, de; for a split, write hf:u/configs::SPLIT",
        "hf:u/script": "hf:u/script consists of a Python script, which timemix does not run; name a dataset with files"
        " in Parquet, JSON lines or CSV",
        "hf:u/gated": "the dataset u/gated is gated; accept its terms on its page on the Hub, and log in with: hf auth"
        " login",
        "hf:u/empty": "hf:u/empty has no data files; name a dataset with texts",
        "hf:u/none": "'u/none' is neither a folder nor a dataset that you can read on the Hub; check its name, and if"
        " it is private, log in with: hf auth login",
        "hf:u/../none": "'u/../none' is neither a folder nor a dataset that you can read on the Hub; check its name,"
        " and if it is private, log in with: hf auth login",
        "hf:u/stories@v2": "the dataset u/stories has no revision 'v2'; name a branch or a commit",
        "hf:u/stories::tests": "hf:u/stories::tests has no split 'tests'; its splits: train, validation; write one:"
        " hf:u/stories::train",
        "hf:u/damaged": "the package datasets cannot read hf:u/damaged: Parquet magic bytes not found in footer. Either"
        " the file is corrupted or this is not a parquet file; check its files",
    }
    found, messages = read(*words, "hf:u/configs:de")
    assert found.pop("hf:u/configs:de")[0] == "b"
    assert found == words
    assert messages == f"downloading hf:u/configs@{COMMIT}:de:train: 0.0 MB\n"


@pytest.mark.slow
def test_a_download_that_is_cut_leaves_nothing(hub, tmp_path):
    hub.cut_after = 100
    found, _ = read("hf:u/stories")
    assert found["hf:u/stories"].startswith("cannot read hf:u/stories from http://127.0.0.1:")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    hub.cut_after = None
    assert read("hf:u/stories")[0]["hf:u/stories"][0] == JOINED
