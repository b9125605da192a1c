"""Files with one text per record: JSON lines, tables and Parquet, alone and in folders, and their faults."""

import csv
import gzip
import io
import json
import lzma

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as writer

from tests.helpers.commands import run_command
from tests.helpers.tiers import examples
from timemix.data import records as reader
from timemix.data.config import DataConfig
from timemix.data.prepare import prepare
from timemix.data.sources import open_source, read_source
from timemix.errors import DamagedFile, InvalidValue, Unavailable
from timemix.runtime.progress import untold
from timemix.tokenizers.base import DOCUMENT_END

TEXTS = ["The cat sat.", "", "two\nlines\n", "caf\u00e9 \u9c7c \u2028 \U0001f600", 'a "quote", a comma', "last"]
JOINED = 'The cat sat.\ntwo\nlines\ncaf\u00e9 \u9c7c \u2028 \U0001f600\na "quote", a comma\nlast'


def json_lines(texts, key="text"):
    return "".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))


def table(texts, delimiter=","):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue()


def write_parquet(path, texts, kind=None, **options):
    column = pyarrow.array(texts, kind or pyarrow.string())
    writer.write_table(pyarrow.table({"id": list(range(len(texts))), "text": column}), path, **options)


def write(folder, suffix, texts=TEXTS):
    path = folder / f"a{suffix}"
    content = table(texts, "\t" if "tsv" in suffix else ",") if "sv" in suffix else json_lines(texts)
    if suffix == ".parquet":
        write_parquet(path, texts, row_group_size=2)
    elif suffix.endswith(".gz"):
        path.write_bytes(gzip.compress(content.encode()))
    elif suffix.endswith(".zst"):
        path.write_bytes(pyarrow.Codec("zstd").compress(content.encode(), asbytes=True))
    elif suffix.endswith(".xz"):
        path.write_bytes(lzma.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".JSONL.XZ", ".jsonl.zst", ".parquet", ".csv", ".tsv", ".csv.gz"]
)
def test_the_texts_of_a_file_are_joined_by_newlines(tmp_path, suffix):
    path = write(tmp_path, suffix.lower())
    path = path.rename(path.with_name(f"a{suffix}"))
    key = "text" if "sv" in suffix else None
    assert read_source(str(path), text_key=key).text == JOINED


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9), max_size=9))
@examples(60)
def test_json_lines_of_any_texts(texts):
    expected = ""
    for text in filter(None, texts):
        expected += ("\n" if expected and not expected.endswith("\n") else "") + text
    lines = json_lines(texts)
    for size in (1, 7, 1000):
        pieces = (lines[i : i + size] for i in range(0, len(lines), size))
        assert "".join(reader.joined(reader.records(pieces, "a.jsonl", ".jsonl", None), False)) == expected


def test_many_small_records_come_in_large_pieces(tmp_path):
    path = write(tmp_path, ".jsonl", ["word"] * 300_000)
    pieces = [text for _, text in open_source(str(path)).read(untold)]
    assert len(pieces) == 2
    assert "".join(pieces) == "\n".join(["word"] * 300_000)


@pytest.mark.parametrize("documents", [False, True])
def test_a_long_record_comes_in_several_pieces(tmp_path, documents):
    path = write(tmp_path, ".jsonl", ["word" * 1_000_000, "end"])
    pieces = [text for _, text in open_source(str(path), documents=documents).read(untold)]
    assert max(map(len, pieces)) <= reader.CHUNK + 1
    end = DOCUMENT_END if documents else ""
    assert "".join(pieces) == "word" * 1_000_000 + (end or "\n") + "end" + end


def test_another_key_and_plain_tables(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines(["one", "two"], "content"))
    assert read_source(str(path), text_key="content").text == "one\ntwo"
    table_file = write(tmp_path, ".csv", ["one", "two"])
    assert read_source(str(table_file)).text == table_file.read_bytes().decode()


def test_a_folder_of_mixed_files(tmp_path):
    for suffix in (".parquet", ".jsonl"):
        write(tmp_path, suffix, ["one", "two"])
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "c.bin").write_bytes(b"\0\1")
    found = read_source(str(tmp_path))
    assert found.text == "one\ntwo\none\ntwo\nthree"
    assert len(found.files) == 3


def test_prepared_records_have_the_tokens_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text(JOINED * 9, encoding="utf-8")
    path = write(tmp_path, ".jsonl", [JOINED * 9])
    plain, lines = (
        prepare(tmp_path / name, DataConfig(source=str(source), tokenizer="byte", end_of_text=False))
        for name, source in (("plain", tmp_path / "a.txt"), ("lines", path))
    )
    assert plain.info.train.sha256 == lines.info.train.sha256


LINE_2 = [
    ('{"text": "b"', "line 2, is no JSON: "),
    ('["b"]', "line 2, is no JSON object"),
    ('{"texts": "b"}', "line 2, has no key 'text'; did you mean 'texts'.; set data.text_key"),
    ('{"text": null}', "line 2, has 'text' null; it must be a text"),
    ('{"text": ["b"]}', "line 2, has 'text' of type list; it must be a text"),
    ('{"text": {"a": 1}}', "line 2, has 'text' of type dict"),
    ("[" * 100_000, "line 2, is no JSON"),
    ('{"text": 12}', "line 2, has 'text' as a number"),
    ('{"text": "b\\ud800"}', "line 2, has the lone surrogate U.D800 in 'text'"),
]


@pytest.mark.parametrize(("line", "words"), LINE_2, ids=range(len(LINE_2)))
def test_a_wrong_line_is_named(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises((DamagedFile, InvalidValue), match=rf"a.jsonl, {words}"):
        read_source(str(path))


def test_a_line_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "LONGEST_LINE", 100)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "' + b"x" * 2**21))
    with pytest.raises(DamagedFile, match="line 2, has more than 100 characters; split the line"):
        read_source(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,words\n1,a\n", "has no column 'text'"),
        ("id,text\n1,a\n2\n", "line 3, has 1 columns, not 2"),
        ('id,text\n1,"a\n', "line 2, is no row of a table"),
    ],
)
def test_a_wrong_table(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises((DamagedFile, InvalidValue), match=words):
        read_source(str(tmp_path / "a.csv"), text_key="text")


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_columns_of_text_in_other_types(tmp_path, kind):
    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    writer.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", TEXTS)
    assert read_source(str(tmp_path / "a.parquet")).text == read_source(str(tmp_path / "b.parquet")).text


def test_wrong_parquet_files(tmp_path, monkeypatch):
    path = write(tmp_path, ".parquet")
    with pytest.raises(InvalidValue, match="has no column 'body'; known: id, text; set data.text_key"):
        read_source(str(path), text_key="body")
    with pytest.raises(InvalidValue, match="has the column 'id' of type int64; it must be a column of texts"):
        read_source(str(path), text_key="id")
    write_parquet(tmp_path / "null.parquet", ["a", None])
    with pytest.raises(InvalidValue, match=r"null.parquet, row 2, has 'text' null"):
        read_source(str(tmp_path / "null.parquet"))
    content = path.read_bytes()
    for size in (0, 4, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DamagedFile, match="a.parquet is damaged or no Parquet file"):
            read_source(str(path))
    path.write_bytes(content)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(Unavailable, match="needs pyarrow: pip install 'timemix.data.'"):
        read_source(str(path))


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json_lines(["the cat"] * 99, "content"))
    status, _, err = run_command(capsys, "data", "a.jsonl")
    assert status == 2
    assert "a.jsonl, line 1, has no key 'text'" in err
    assert "set --data.text-key" in err
    status, out, _ = run_command(capsys, "data", "a.jsonl", "--data.text-key", "content", "--json")
    assert status == 0
    assert json.loads(out)["characters"] == 7 * 99


def test_columns_of_equal_names_and_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    pairs = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    writer.write_table(pairs, tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(InvalidValue, match="has 2 columns 'text'; rename all but one"):
            read_source(str(tmp_path / name), text_key="text")
    damaged = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    writer.write_table(pyarrow.table({"text": damaged}), tmp_path / "b.parquet")
    with pytest.raises(DamagedFile, match=r"b\.parquet is damaged or no Parquet file: .* byte 0xff"):
        read_source(str(tmp_path / "b.parquet"))


def test_an_integer_of_many_digits_and_an_empty_table(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": ' + "9" * 9000 + ', "text": "b"}\n')
    assert read_source(str(tmp_path / "a.jsonl")).text == "b"
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(InvalidValue, match="is empty"):
        read_source(str(tmp_path / "a.csv"), text_key="text")
