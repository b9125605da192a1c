"""`timemix chat` as a person uses it: lines from a pipe, commands, and a terminal with Ctrl-C."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import timemix
from tests.helpers.runs import small_trainer
from timemix.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    for name, arch, seed in (("run", "rwkv7", 1), ("other", "rwkv7", 2), ("bounded", "rwkv1", 1)):
        small_trainer(folder, arch, name=name, steps=30, seed=seed).run()
    return folder


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def chat(*lines, options=(), run="run"):
        """Answer lines in this process: (status, stdout, stderr)."""
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as end:
            main(["chat", run, "--tokens", "20", *options])
        return end.value.code, *capsys.readouterr()

    return chat


def test_each_line_continues_the_text_of_the_lines_before(chat):
    status, first, err = chat("the cat")
    assert (status, err) == (0, "")
    text = timemix.generate("run", "the cat", tokens=20)[0]
    assert first == f"{text}\n"
    _, both, _ = chat("the cat", "the dog", options=("--temperature", "0"))
    greedy = timemix.Sampler(temperature=0)
    (first,) = timemix.generate("run", "the cat", tokens=20, sampler=greedy)
    (second,) = timemix.generate("run", f"the cat{first}\nthe dog", tokens=20, sampler=greedy)
    assert both == f"{first}\n{second}\n"


def test_a_message_that_is_longer_than_the_context(chat, folder):
    assert timemix.load(folder / "bounded").model.max_position == 16
    status, out, err = chat("the cat sat on the mat", "the cat", run="bounded")
    assert status == 0
    assert len(out.splitlines()) >= 2
    assert err == "timemix: the message is longer than the context, so the model did not read its first 6 tokens\n"


def test_the_line_end_of_windows_is_no_part_of_a_line(chat):
    assert chat("the cat\r") == chat("the cat")


def test_an_empty_line_continues_the_answer(chat):
    _, out, _ = chat("the cat", "")
    whole = timemix.generate("run", "the cat", tokens=40)[0]
    assert out == f"{whole[:20]}\n{whole[20:]}\n"
    assert chat("") == (0, "", "")


def test_undo_and_retry(chat):
    _, out, err = chat("the cat", "/retry", "/undo", "the cat")
    first, second, third = (out[:21], out[21:42], out[42:])
    assert first == third != second
    assert err == "timemix: removed 'the cat' and its answer\n"


def test_forks_continue_in_different_ways(chat):
    _, expected, _ = chat("the cat", "the dog")
    _, out, _ = chat("the cat", "/fork b", "a hut", "/switch main", "the dog")
    assert out[:21] + out[42:] == expected


def test_a_saved_conversation_is_continued(chat, tmp_path):
    _, whole, _ = chat("the cat", "the dog")
    _, first, err = chat("the cat", f"/save {tmp_path}/a b")
    assert err == f"timemix: saved the state (776 bytes) to {tmp_path}/a b\n"
    _, second, _ = chat(f"/load {tmp_path}/a b", "the dog")
    assert first + second == whole


def test_a_message_may_begin_with_a_slash(chat):
    status, _, err = chat("//help")
    assert status == 2
    assert err.startswith("timemix: the vocabulary has no '/' (U+002F)")


def test_help_names_every_command(chat):
    status, out, err = chat("/help", "/quit ", "the cat")
    assert (status, out) == (0, "")
    for words in ("/save FILE", "/load FILE", "/fork NAME", "/switch NAME", "/undo", "/retry", "/help", "/quit"):
        assert f"  {words} " in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("the Ω", "the vocabulary has no 'Ω' (U+03A9)"),
        (
            "the \udcff",
            "the text has a lone surrogate, U+DCFF (the byte 0xFF of a text that is not UTF-8), at",
        ),
        ("/undo", "there is no turn to remove; give a message"),
        ("/retry", "there is no turn to remove; give a message"),
        ("/save x", "the conversation is empty; type a message before you save it"),
        ("/load nothing", "nothing is missing"),
        ("/load ~nobody-of-this-name/a", "~nobody-of-this-name/a is missing"),
        ("/load text.txt", "text.txt is damaged or not a safetensors file"),
        ("/fork main", "a conversation 'main' exists; choose another name, or type '/switch main'"),
        ("/switch mian", "unknown conversation 'mian'; did you mean 'main'?"),
        ("/swich main", "unknown command '/swich'; did you mean '/switch'?"),
        ("/save", "/save needs an argument; type '/save FILE'"),
        ("/undo it", "/undo takes no argument; type '/undo'"),
    ],
)
def test_a_wrong_line_is_one_sentence_and_the_next_line_is_answered(chat, line, words):
    _, expected, _ = chat("the cat")
    status, out, err = chat(line, "the cat")
    assert (status, out) == (2, expected)
    assert err.startswith(f"timemix: {words}")
    assert err.count("\n") == 1


def test_a_state_of_another_model_and_a_place_without_permission(chat, tmp_path):
    chat("the cat", f"/save {tmp_path}/a")
    _, _, err = chat(f"/load {tmp_path}/a", run="other")
    assert "holds a session of another model (rwkv7); use it with the run that saved it" in err
    _, _, err = chat("the cat", "/save run/config.toml/a")
    assert "cannot write run/config.toml/a" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tokens", "0"), "--tokens is 0; it must be at least 1"),
        (("--top-p", "7"), "--top-p is 7.0; it must be above 0 and at most 1"),
        (("--system", "-x"), "a text that begins with '-' is given as --system=-x"),
        (("--template", "word"), "--template is 'word'; did you mean 'world'?"),
        (("--count", "2"), "unknown option '--count'"),
    ],
)
def test_wrong_options_are_one_sentence(chat, options, words):
    status, out, err = chat("the cat", options=options)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_bytes_that_are_not_utf_8_are_reported(folder):
    done = subprocess.run(
        [sys.executable, "-m", "timemix", "chat", "run", "--tokens", "9"],
        cwd=folder,
        input=b"the \xff\nthe cat\n",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"timemix: the text has a lone surrogate, U+DCFF")
    assert len(done.stdout) == 10


class Terminal:
    """A process whose three streams are a terminal."""

    def __init__(self, process, ours):
        self.process, self._ours, self.text = process, ours, ""

    def read(self):
        """Read more of the output."""
        assert select.select([self._ours], [], [], 60)[0], self.text
        self.text += os.read(self._ours, 2**16).decode()

    def type(self, text):
        os.write(self._ours, text.encode())

    def wait_for(self, text):
        """Read the output up to a text; return what came before the text."""
        while text not in self.text:
            self.read()
        before, _, self.text = self.text.partition(text)
        return before

    def end(self):
        """Return the exit status, and what was printed before the end."""
        # Linux: the process has ended.
        with suppress(OSError):
            while True:
                self.read()
        return self.process.wait(timeout=60), self.text

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


@contextmanager
def terminal(folder, *arguments):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "timemix", "chat", "run", *arguments],
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "dumb", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_stops_the_answer_and_then_the_program(folder):
    with terminal(folder, "--tokens", "1000000") as screen:
        assert "rwkv7, 14,736 parameters, template plain; /help lists the commands" in screen.wait_for("main> ")
        screen.type("the cat\n")
        screen.wait_for("\n")
        while len(screen.text) < 300:
            screen.read()
        screen.interrupt()
        assert "interrupted" not in screen.wait_for("main> ")
        screen.type("/undo\n")
        screen.wait_for("removed 'the cat' and its answer")
        screen.wait_for("main> ")
        # The prompt is printed shortly before Python waits for a line, and a signal in between waits for the line too.
        time.sleep(0.5)
        screen.interrupt()
        assert screen.end() == (130, "\r\ntimemix: interrupted\r\n")


def test_ctrl_d_ends_the_program(folder):
    with terminal(folder, "--tokens", "5") as screen:
        screen.wait_for("main> ")
        screen.type("/fork other\n")
        screen.wait_for("other> ")
        screen.type("\x04")
        status, text = screen.end()
        assert status == 0
        assert text.endswith("\n")
