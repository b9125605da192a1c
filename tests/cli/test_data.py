"""The verbs data and eval, and standard input as a text, as a person uses them."""

import io
import json
import math
from pathlib import Path

import pytest

from tests.helpers.commands import run_command
from tests.helpers.runs import TEXT
from tests.helpers.vocabularies import BYTES, vocabulary_lines

TINY = ("cpu-small", "--model.layers", "1", "--model.channels", "16", "--model.heads", "2", "--model.ctx-len", "16",
        "--train.batch-size", "4", "--train.steps", "3", "--train.precision", "float32")  # fmt: skip


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder, with a text on standard input; return its status, output and messages."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, piped=""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
        return run_command(capsys, *arguments)

    return call


def test_prepared_tokens_are_described_in_numbers(call):
    Path("texts").mkdir()
    for name in "ab":
        Path(f"texts/{name}.txt").write_text(TEXT)
    status, out, _ = call("data", "texts", "--out", "tokens")
    assert status == 0
    assert not set("[]{}'") & set(out)
    rows = {line[:32].strip(): line[32:] for line in out.splitlines()}
    expected = {
        "folder": "tokens",
        "files": "2",
        "held out": "the last 10 % of each of 2 files",
        "train tokens": f"{2 * int(0.9 * len(TEXT)):,}",
        "train unknown": "0",
    }
    assert rows | expected == rows
    info = json.loads(call("data", "texts", "--out", "more", "--json")[1])
    assert info == json.loads(Path("more/data.json").read_text()) | {"folder": "more"}


def test_a_run_on_standard_input_ends_as_one_on_a_file(call):
    Path("text.txt").write_text(TEXT)
    assert call("train", *TINY, "--data", "text.txt", "--out", "file")[0] == 0
    status, _, err = call("train", *TINY, "--data", "-", "--out", "piped", piped=TEXT)
    assert status == 0
    assert "held out (the last 10 % of standard input)" in err
    one, other = (next(Path(run, "checkpoints").iterdir()) / "model.safetensors" for run in ("file", "piped"))
    assert one.read_bytes() == other.read_bytes()
    status, out, _ = call("train", "--resume", "piped")
    assert (status, out.partition(";")[0]) == (0, "piped is complete: 3 steps")
    # Its tokens stand in for a text that cannot be read again.
    assert call("train", "--from", "piped", "--out", "next", "--train.steps", "2")[0] == 0
    assert call("eval", "next")[0] == 0


def test_eval_of_a_mostly_unknown_text_says_what_the_losses_are_over(call):
    Path("text.txt").write_text(TEXT)
    assert call("train", *TINY, "--data", "text.txt", "--out", "run")[0] == 0
    text = "漢字漢字漢字" + "the cat"
    _, out, _ = call("eval", "run", "--data", "-", piped=text)
    assert "7 tokens, 13 characters, 25 bytes of standard input" in out
    assert "6 unknown characters skipped, because the vocabulary has no <unk>; the losses cover the other 6" in out
    assert "characters (6 bytes), 46.2% of the text" in out
    report = json.loads(call("eval", "run", "--data", "-", "--json", piped=text)[1])
    assert (report["predicted_characters"], report["predicted_bytes"]) == (6, 6)
    assert report["bits_per_byte"] == pytest.approx(report["nats_per_token"] / math.log(2))


def test_eval_reads_a_nul_on_request(call):
    Path("text.txt").write_text(TEXT)
    assert call("train", *TINY, "--data", "text.txt", "--data.tokenizer", "byte", "--out", "run")[0] == 0
    status, _, err = call("eval", "run", "--data", "-", piped="the\0cat")
    assert (status, err) == (
        2,
        "timemix: standard input looks binary: it has a NUL at byte 3; if it is text, set --data.keep-nul\n",
    )
    _, out, _ = call("eval", "run", "--data", "-", "--data.keep-nul", piped="the\0cat")
    assert "7 tokens, 7 characters, 7 bytes" in out


def test_data_that_is_no_text_says_what_it_is(call):
    Path("text.txt").write_text(TEXT)
    assert call("data", "text.txt", "--out", "tokens")[0] == 0
    assert call("train", *TINY, "--data", "tokens", "--out", "run")[0] == 0
    for what, sentence in (("tokens", "is a prepared folder"), ("run", "is a run folder")):
        for verb in (["data", what], ["eval", "run", "--data", what]):
            status, _, err = call(*verb)
            assert (status, err) == (
                2,
                f"timemix: {what} {sentence}, which has tokens and no text; name a text file or a folder of texts\n",
            )


def test_a_run_with_the_world_tokenizer_needs_its_vocabulary_once(call):
    Path("text.txt").write_text("二千年前、the cat\n\nthe dog. " * 200)
    Path("vocabulary.txt").write_bytes(vocabulary_lines([*BYTES, b" the", b"\n\n", "二千".encode()]))
    world = ("--data.tokenizer", "world", "--data.vocabulary", "vocabulary.txt")
    described = json.loads(call("data", "text.txt", *world, "--json")[1])
    assert (described["tokenizer"], described["vocab_size"]) == ("world", 65536)
    status, _, err = call("train", *TINY, "--data", "text.txt", *world, "--out", "run")
    assert status == 0
    assert f"vocabulary 65536; {described['train']['tokens']:,} training tokens" in err
    Path("vocabulary.txt").unlink()
    assert call("train", "--from", "run", "--out", "next", "--train.steps", "2")[0] == 0
    status, out, _ = call("sample", "next", "--tokens", "5", "--prompt", "二千 the")
    assert status == 0
    assert out.startswith("二千 the")
    status, _, err = call("data", "text.txt", *world)
    assert status == 2
    assert "--data.vocabulary='vocabulary.txt' is not a file, folder or download; set --data.vocabulary to the" in err
