"""Sources: all kinds of text, downloads from a server on 127.0.0.1, and the errors that a user sees."""

import bz2
import contextlib
import glob
import gzip
import hashlib
import io
import logging
import lzma
import os
import re
import socket
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pytest

from tests.helpers.servers import serving
from timemix.data import readers as decoding
from timemix.data.config import DataConfig
from timemix.data.downloads import DOWNLOADS, Download
from timemix.data.folders import folder_files
from timemix.data.prepare import prepare
from timemix.data.sources import read_source
from timemix.errors import TimemixError, Unavailable

TEXT = "first line\r\nsecond, with é and 鱼\n\tthird 🐈\n"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(source, sentence, **options):
    with pytest.raises(TimemixError) as caught:
        read_source(str(source), **options)
    assert re.search(sentence, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_builtin_text():
    read = read_source("builtin")
    assert read.name == "builtin"
    assert 300_000 < len(read.text) < 1_000_000
    assert read.text.startswith('The "assert" statement')
    assert read.text.index('The "assert" statement') < read.text.index('The "while" statement')


def zstandard(content):
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32", "gb18030"])
@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress), (".zst", zstandard)],
)
def test_encodings_and_compression(encoding, suffix, pack):
    path = Path(f"text.txt{suffix}")
    path.write_bytes(pack(TEXT.encode(encoding)))
    read = read_source(str(path), encoding=encoding)
    assert read.text == TEXT
    assert (read.name, read.files) == (path.name, (str(path),))


def test_only_a_byte_order_mark_at_the_start_is_dropped():
    Path("a.txt").write_bytes("\ufeffone\ufefftwo".encode())
    assert read_source("a.txt").text == "one\ufefftwo"
    Path("b.txt").write_bytes("\ufeffone".encode("utf-16-le"))
    assert read_source("b.txt", encoding="utf-16-le").text == "one"


def test_a_folder_and_a_glob_in_sorted_order():
    for name, text in {
        "books/b.txt": "b, no line end",
        "books/a/z.txt": "az\n",
        "books/a.md": "markdown",
        "books/.hidden": "no",
        "books/.git/config": "no",
        "books/empty.txt": "",
        "books/c.txt.gz": None,
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(gzip.compress(b"c") if text is None else text.encode())
    read = read_source("books")
    assert read.text == "az\nmarkdown\nb, no line end\nc"
    assert (read.name, len(read.files)) == ("books", 5)
    assert read_source("books/*.txt").text == "b, no line end"
    assert read_source("books/**/*.txt").files == ("books/a/z.txt", "books/b.txt", "books/empty.txt")


def test_hidden_files_of_a_folder_are_skipped_and_counted(caplog):
    for name in (".a.txt", ".git/config", "sub/.b.txt", ".c", ".d", "sub/c.txt", "runs/mine/.lock"):
        Path("books", name).parent.mkdir(parents=True, exist_ok=True)
        Path("books", name).write_text("text")
    for name in ("config.toml", "metrics.jsonl"):
        Path("books/runs/mine", name).write_text("")
    assert read_source("books").files == ("books/sub/c.txt",)
    # A hidden folder counts once, and files in the output of timemix do not count.
    assert caplog.messages == [
        "books: skipped 5 as hidden: books/.a.txt, books/.c, books/.d, books/.git and 1 more",
        "books: skipped 1 as written by timemix: books/runs/mine",
    ]


def test_a_path_comes_before_a_name():
    Path("text8").write_text("mine")
    Path("builtin").write_text("mine too")
    Path("[a].txt").write_text("literal")
    assert [read_source(name).text for name in ("text8", "builtin", "[a].txt")] == ["mine", "mine too", "literal"]


def test_missing_sources_name_the_nearest():
    Path("sub").mkdir()
    Path("sub/moby_dick.txt").write_text("x")
    refused(
        "sub/mobydick.txt", r"'sub/mobydick\.txt' is not a file, folder or download; did you mean sub/moby_dick\.txt\?"
    )
    refused("tinyshakespear", r"did you mean tinyshakespeare\?")
    refused("simplebook-92", r"did you mean simplebooks-92\?")
    refused("nowhere/at/all", "other sources are builtin, simplebooks-92, .*text8")
    refused("*.nothing", "is not a file, folder or download")
    for odd in ("", "a\0b", "x" * 5000):
        refused(odd, "is not a file, folder or download")


def test_empty_sources():
    Path("empty.txt").write_text("")
    Path("mark.txt").write_bytes(b"\xef\xbb\xbf")
    Path("empty.gz").write_bytes(gzip.compress(b""))
    for name in ("empty.txt", "mark.txt", "empty.gz"):
        refused(name, f"{name} is empty")
    Path("folder/.git").mkdir(parents=True)
    Path("folder/.git/config").write_text("x")
    refused("folder", "the folder folder has no text files")


def test_binary_files():
    Path("model.bin").write_bytes(b"\x89model\r\n\0\x01")
    refused("model.bin", r"model\.bin looks binary: it has a NUL at byte 8; if it is text, set data\.keep_nul$")
    Path("wide.txt").write_bytes("ab\0c".encode("utf-16"))
    refused("wide.txt", r"a NUL at character 2 in utf-16; if it is text, set data\.keep_nul$", encoding="utf-16")
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        Path("wide.txt").write_bytes(TEXT.encode(encoding))
        advice = f"set data\\.encoding to {encoding[:6]}$"
        refused("wide.txt", rf"wide\.txt looks binary: .*; if it is text, {advice}")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16", "utf-16-be"])
def test_a_text_with_a_nul_is_kept_on_request(encoding):
    Path("log.txt").write_bytes("one\0two\n".encode(encoding))
    refused("log.txt", "set data.keep_nul", encoding=encoding)
    assert read_source("log.txt", encoding=encoding, keep_nul=True).text == "one\0two\n"
    for kind in ("byte", "character"):
        config = DataConfig("log.txt", encoding=encoding, keep_nul=True, tokenizer=kind, valid_fraction=0)
        corpus = prepare(Path(f"{kind}-tokens"), config)
        assert corpus.tokenizer.decode(corpus.train[:]) == "one\0two\n"


def test_known_kinds_are_named_with_the_way_out():
    for name, content, sentence in [
        ("a.pdf", b"%PDF-1.7\nno NUL", "a.pdf is a PDF document; extract its text first"),
        ("a.docx", zipped(a="x"), "a.docx is a zip archive .*; unpack it and name the text in it"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a.png is an image"),
        ("a.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "a.jpg is an image"),
    ]:
        Path(name).write_bytes(content)
        refused(name, sentence)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16"])
def test_binary_files_of_a_folder_are_skipped_and_counted(caplog, encoding):
    Path("books").mkdir()
    for name, content in [
        ("a.txt", TEXT.replace("鱼", "ß").replace("🐈", "c").encode(encoding)),
        ("b.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
        ("c.pdf", b"%PDF-1.7\nno NUL"),
        ("d.gz", gzip.compress(b"\0" * 50)),
        ("e.txt", "end\n".encode(encoding)),
    ]:
        (Path("books") / name).write_bytes(content)
    for source in ("books", "books/*"):
        caplog.clear()
        assert read_source(source, encoding=encoding).files == ("books/a.txt", "books/e.txt")
        names = "books/b.png, books/c.pdf, books/d.gz"
        assert caplog.messages == [f"{source}: skipped 3 as binary: {names}"]
    # Even with NUL as a character, files of a known kind are not text.
    assert Path("books/b.png") not in folder_files(Path("books"), encoding, keep_nul=True)
    Path("books/a.txt").unlink()
    Path("books/e.txt").unlink()
    refused("books", "the folder books has no text files", encoding=encoding)
    refused("books/*", "books/. matches no text files", encoding=encoding)


def test_the_same_text_is_read_once(caplog):
    Path("books/sub").mkdir(parents=True)
    Path("books/b.txt").write_text("b\n")
    Path("books/sub/c.txt").write_text("c\n")
    Path("books/b.txt.gz").write_bytes(gzip.compress(b"b\n"))
    Path("books/a.txt").symlink_to("b.txt")
    for name in ("up", "again"):
        Path("books/sub", name).symlink_to(Path("books").resolve())
    assert read_source("books").text == "b\nc\n"
    assert caplog.messages == [
        "books: skipped 2 as a link to a folder: books/sub/again, books/sub/up",
        "books: skipped 1 as a link to another file: books/a.txt",
        "books: skipped 1 as a compressed copy of the file beside it: books/b.txt.gz",
    ]
    caplog.clear()
    assert read_source("books/**/*.txt").text == "b\nc\n"
    assert caplog.messages == ["books/**/*.txt: skipped 1 as a link to another file: books/a.txt"]
    # A link to a folder elsewhere is followed.
    Path("shelf").mkdir()
    Path("shelf/books").symlink_to(Path("books").resolve())
    assert read_source("shelf/**/c.txt").files == ("shelf/books/sub/c.txt",)


@pytest.mark.parametrize(
    "pattern", ["**", "**/*", "*/**/*.txt", "a/**", "a/**/b/**/*.txt", "**/b/*", "a**/*", "./a/**/c.*", "{}/**"]
)
def test_globs_match_as_those_of_python(tmp_path, pattern):
    for name in ("a/b/c.txt", "a/b/d/e.txt", "a/f.md", "ab/g.txt", "a/.h/i.txt", "j.txt", "[k]/l.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"{name}\n")
    pattern = pattern.format(tmp_path)
    expected = sorted(Path(path) for path in set(glob.glob(pattern, recursive=True)) if Path(path).is_file())
    assert list(map(Path, read_source(pattern).files)) == sorted(set(expected))


def test_what_timemix_wrote_is_not_read_as_text(caplog):
    for name in ("runs/one/config.toml", "runs/one/metrics.jsonl", "runs/one/samples.txt"):
        Path("texts", name).parent.mkdir(parents=True, exist_ok=True)
        Path("texts", name).write_text("not a text")
    Path("texts/a.txt").write_text("a text\n" * 20)
    prepare(Path("texts/tokens"), DataConfig("texts/a.txt"))
    for source, sentence in [
        ("texts/tokens", "texts/tokens is a prepared folder, which has tokens and no text; name a text file"),
        ("texts/runs/one", "texts/runs/one is a run folder"),
    ]:
        refused(source, sentence)
    for source in ("texts", "texts/**/*", "**/*"):
        caplog.clear()
        assert read_source(source).files == ("texts/a.txt",)
        assert f"{source}: skipped 2 as written by timemix: texts/runs/one, texts/tokens" in caplog.text
    # A file that is named directly is read.
    assert read_source("texts/runs/*/samples.txt").text == "not a text"


def test_a_pipe_and_standard_input_are_read_once_and_decompressed(monkeypatch):
    packed = gzip.compress(TEXT.encode()), bz2.compress(TEXT.encode() * 9), zstandard(TEXT.encode()) * 2
    for content in (TEXT.encode(), *packed):
        os.mkfifo("pipe")
        writer = threading.Thread(target=Path("pipe").write_bytes, args=(content,))
        writer.start()
        read = read_source("pipe")
        writer.join()
        assert read.text.replace(TEXT, "") == ""
        Path("pipe").unlink()
        stream = io.TextIOWrapper(io.BytesIO(content))
        monkeypatch.setattr("sys.stdin", stream)
        assert [read_source("-").text for _ in range(2)] == [read.text] * 2
    assert (read_source("-").name, read_source("-").files) == ("standard input", ("standard input",))


def test_a_file_may_have_the_name_of_standard_input(monkeypatch):
    Path("standard input").write_text("of the file")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    assert (read_source("-").text, read_source("standard input").text) == ("piped", "of the file")


def test_standard_input_that_is_no_text(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    refused("-", "'-' is standard input, but no text is piped into it")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    refused("-", "standard input is empty")


def test_one_file_of_a_folder_in_another_encoding():
    Path("texts").mkdir()
    Path("texts/a.txt").write_bytes("cafés".encode())
    Path("texts/b.txt").write_bytes("cafés".encode("latin-1"))
    converted = "convert this file, for example with: iconv -f latin1 -t utf-8 texts/b.txt > NEW; if all files have its"
    refused("texts", rf"texts/b\.txt is not in utf-8: byte 3 cannot be decoded .*; {converted} encoding, set data\.enc")


def test_wrong_encodings():
    Path("latin.txt").write_bytes("caf\xe9s".encode("latin-1"))
    refused("latin.txt", r"latin\.txt is not in utf-8: byte 3 cannot be decoded .* data\.encoding")
    assert read_source("latin.txt", encoding="latin-1").text == "cafés"
    Path("odd.txt").write_bytes(b"abc")
    refused("odd.txt", r"odd\.txt is not in utf-16: byte 2", encoding="utf-16")
    for encoding in ("utf-9", "zlib", "rot13", "undefined", ""):
        refused("odd.txt", f"encoding '{encoding}' is not a text encoding of Python; give", encoding=encoding)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
def test_damaged_compressed_files(suffix, pack):
    whole = pack(TEXT.encode() * 50)
    name = f"text{suffix}"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for data in (whole[:-9], b"not compressed at all", bytes(flipped)):
        Path(name).write_bytes(data)
        refused(name, f"text{re.escape(suffix)} is damaged: it does not decompress .*; get it again")


def test_damaged_files_of_zstandard(monkeypatch):
    whole = zstandard(TEXT.encode() * 50)
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:3], b"not compressed at all", whole + b"more"):
        Path("text.zst").write_bytes(data)
        refused("text.zst", r"text\.zst is damaged: it does not decompress .*; get it again")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Unavailable, match=r"a file compressed by Zstandard needs pyarrow: pip install"):
        read_source("text.zst")


def test_unreadable_places(monkeypatch):
    Path("folder").mkdir()
    Path("folder/a.txt").write_text("a")

    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied", "folder")

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", denied)
        refused("folder", "cannot read the folder folder: Permission denied")
    monkeypatch.setattr("builtins.open", denied)
    monkeypatch.setattr(decoding, "OPENERS", {".txt": denied})
    refused("folder/a.txt", r"cannot read folder/a\.txt: Permission denied")


@pytest.fixture
def serve(monkeypatch):
    """Start a server for some content, registered as the download `served`."""
    with contextlib.ExitStack() as stack:

        def start(content, **fields):
            server = stack.enter_context(serving(content))
            monkeypatch.setitem(DOWNLOADS, "served", server.download(**fields))
            return server

        yield start


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(f"{name}.txt", text)
    return buffer.getvalue()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_good_zip(serve, tmp_path):
    content = zipped(train=TEXT, valid="held out", test="no")
    server = serve(content, member="train.txt", valid_member="valid.txt", sha256=sha256(content))
    lines = []
    read = read_source("served", cache=tmp_path / "cache", progress=lines.append)
    assert (read.text, read.valid, read.name) == (TEXT, "held out", "served")
    assert lines[-1].endswith("MB")
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")] == ["text.zip"]
    read_source("served", cache=tmp_path / "cache", encoding="utf-16")
    assert server.asked == [None]


def test_two_processes_download_a_text_once(serve, tmp_path):
    content = TEXT.encode() * 1000
    server = serve(content, sha256=sha256(content))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda _: read_source("served", cache=tmp_path).text, range(2))
        assert list(found) == [TEXT * 1000] * 2
    assert server.asked == [None]


def test_a_cut_download_resumes(serve, tmp_path):
    content = TEXT.encode() * 1000
    server = serve(content, sha256=sha256(content))
    server.cuts = [10_000, 5_000]
    assert read_source("served", cache=tmp_path).text == TEXT * 1000
    assert server.asked == [None, "bytes=10000-", "bytes=15000-"]


def test_a_later_call_also_resumes(serve, tmp_path):
    content = TEXT.encode() * 1000
    server = serve(content, sha256=sha256(content))
    server.cuts = [10_000, 0, 0, 0, 0]
    refused(
        "served",
        r"cannot download http://127\.0\.0\.1.*the connection was cut.*; try again, or download .* as .*text\.zip",
        cache=tmp_path,
    )
    assert not (tmp_path / "text.zip").exists()
    assert read_source("served", cache=tmp_path).text == TEXT * 1000
    assert server.asked[-1] == "bytes=10000-"


def test_a_server_without_ranges_sends_everything_again(serve, tmp_path):
    content = TEXT.encode() * 1000
    server = serve(content, sha256=sha256(content))
    server.cuts, server.ranges = [10_000], False
    assert read_source("served", cache=tmp_path).text == TEXT * 1000


def test_a_left_part_that_is_too_long_is_dropped(serve, tmp_path):
    content = TEXT.encode()
    serve(content, sha256=sha256(content))
    (tmp_path / "text.zip.part").write_bytes(b"x" * 500)
    assert read_source("served", cache=tmp_path).text == TEXT


def test_a_wrong_hash(serve, tmp_path):
    server = serve(b"something else", sha256=sha256(b"the text"))
    sentence = refused("served", f"is damaged or has changed: its sha256 is not {sha256(b'the text')}", cache=tmp_path)
    assert (
        f"download http://127.0.0.1:{server.server_port}/text.zip by other means and save it as {tmp_path}" in sentence
    )
    assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == []


def test_the_first_hash_is_kept(serve, tmp_path, caplog):
    server = serve(TEXT.encode())
    with caplog.at_level(logging.WARNING, "timemix"):
        assert read_source("served", cache=tmp_path).text == TEXT
    assert sha256(TEXT.encode()) in caplog.text
    assert (tmp_path / "text.zip.sha256").read_text().strip() == sha256(TEXT.encode())
    caplog.clear()
    assert read_source("served", cache=tmp_path).text == TEXT
    assert caplog.text == ""
    (tmp_path / "text.zip").unlink()
    server.content = b"changed since"
    refused("served", r"has changed: .*; delete .*text\.zip\.sha256 to accept a new version", cache=tmp_path)


def test_a_file_placed_by_hand_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setitem(DOWNLOADS, "served", Download("http://127.0.0.1:9/x", "text.txt", sha256=sha256(TEXT.encode())))
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    assert read_source("served", cache=tmp_path).text == TEXT


def test_no_home_folder(monkeypatch):
    """A user without HOME and without an entry in the list of users has no cache folder."""

    def fails(name):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pooch.os_cache", fails)
    refused("enwik8", "this user has no home folder; set XDG_CACHE_HOME to a folder")


def test_no_network(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/text.zip"
    monkeypatch.setitem(DOWNLOADS, "served", Download(url, "text.zip", "a.txt"))
    refused("served", f"cannot download {url} .*refused.* save it as {tmp_path / 'text.zip'}", cache=tmp_path)


def test_damaged_zips(serve, tmp_path):
    serve(b"<html>not found</html>", member="a.txt")
    refused("served", r"text\.zip is a damaged zip .* save it as", cache=tmp_path / "1")
    serve(zipped(b="x"), member="a.txt")
    refused("served", r"text\.zip has no member a\.txt; download http", cache=tmp_path / "2")


def test_the_number_of_characters_is_checked(serve, tmp_path, caplog):
    serve(zipped(a="abcab"), member="a.txt", distinct_characters=136)
    with caplog.at_level(logging.WARNING, "timemix"):
        read_source("served", cache=tmp_path)
    assert "served has 3 distinct characters, not 136" in caplog.text


def test_the_table_of_downloads():
    assert list(DOWNLOADS) == ["simplebooks-92", "simplebooks-2", "tinyshakespeare", "enwik8", "text8"]
    assert DOWNLOADS["simplebooks-92"].distinct_characters == 136
    assert all(re.fullmatch("[0-9a-f]{64}", d.sha256) for d in DOWNLOADS.values() if d.sha256)
