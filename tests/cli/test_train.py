"""The verbs train and demo as a person uses them: what they print, refuse and survive."""

import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.commands import run_command
from tests.helpers.runs import TEXT, small_trainer
from tests.helpers.tiers import examples
from timemix.cli.main import main
from timemix.cli.terminal import LastingStream, escaped, lasting_output
from timemix.cli.training import resume_command_added
from timemix.cli.watch import progress_line, watching
from timemix.config.run import read_toml
from timemix.errors import InvalidValue, NotFinite
from timemix.training.progress import Sample, TrainingProgress
from timemix.training.start import resume_run

SIZES = "--model.layers 1 --model.channels 16 --model.heads 2 --model.ctx-len 16 --train.batch-size 4"
TINY = SIZES.split()
SHORT = [*TINY, "--train.steps", "6", "--train.valid-every", "3"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def call(capsys):
    """Run a command in this process: (status, stdout, stderr)."""

    return partial(run_command, capsys)


def new(*options, out="r"):
    return "train", "--data", "my.txt", "--out", out, *options


def steps(run="r") -> int:
    return read_toml(Path(run) / "config.toml").train.steps


class TestLength:
    def test_a_run_by_tokens_prints_its_steps(self, call):
        status, _, err = call(*new(*TINY, "--train.tokens", "0.5k"))
        assert status == 0, err
        assert "500 tokens at 64 tokens per step: 8 steps\n" in err
        assert steps() == 8

    def test_a_run_by_epochs_prints_its_steps_and_resumes_by_epochs(self, call):
        status, _, err = call(*new(*TINY, "--train.epochs", "0.25"))
        assert status == 0, err
        found = re.search(r"0.25 epochs of ([\d,]+) tokens at 64 tokens per step: (\d+) steps\n", err)
        tokens = int(found[1].replace(",", ""))
        assert f"{tokens:,} training tokens" in err
        assert steps() == int(found[2]) == math.ceil(0.25 * tokens / 64)
        assert "epochs" not in Path("r/config.toml").read_text()
        status, _, err = call("train", "--resume", "r", "--train.epochs", "0.5")
        assert status == 0, err
        assert steps() == math.ceil(0.5 * tokens / 64)
        assert f"with --train.steps {steps()} (before: {found[2]})" in err

    def test_a_run_by_seconds_prints_and_keeps_its_steps(self, call):
        status, _, err = call(*new(*TINY, "--train.seconds", "1.5"))
        assert status == 0, err
        found = re.search(r"1.5 s at \S+ s per step, validation and checkpoints included: ([\d,]+) steps\n", err)
        assert found
        assert int(found[1].replace(",", "")) == steps()
        assert f"step {steps()}/{steps()}" in err

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ("--train.steps 5 --train.seconds 9", "--train.steps 5 and --train.seconds 9 exclude one another: each"),
            ("--train.tokens=5 --train.seconds=9", "--train.seconds 9 and --train.tokens 5 exclude one another"),
            ("--train.steps 5 --train.epochs 2", "--train.steps 5 and --train.epochs 2 exclude one another: each sets"),
            ("--train.epochs -1", "--train.epochs is -1.0; it must be above 0 and finite"),
            ("--train.epochs inf", "--train.epochs is inf; it must be above 0 and finite"),
            ("--train.seconds 0", "--train.seconds is 0.0; it must be above 0 and finite"),
            ("--train.seconds -3", "--train.seconds is -3.0; it must be above 0 and finite"),
            ("--train.tokens -3", "--train.tokens is '-3'; it must be a positive number, such as 20M, 1.5B or 20000"),
            ("--train.tokens lots", "--train.tokens is 'lots'; it must be a positive number"),
        ],
    )
    def test_nonsense_is_one_sentence(self, call, options, sentence):
        status, _, err = call(*new(*options.split()))
        assert status == 2
        assert sentence in err
        assert err.count("\n") == 1
        assert not Path("r").exists()

    def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(self, call):
        Path("run.toml").write_text("[train]\nseconds = 1000.0\n")
        assert call(*new(*TINY, "--config", "run.toml", "--train.steps", "3"))[0] == 0
        assert steps() == 3
        Path("run.toml").write_text("[train]\ntokens = 200\nbatch_size = 4\n")
        assert call("train", "demo", *new(*TINY[:-2], "--config", "run.toml", out="s")[1:])[0] == 0
        assert steps("s") == 4

    def test_a_file_sets_the_length_once(self, call):
        Path("run.toml").write_text("[train]\nsteps = 3\nseconds = 9.0\n")
        status, _, err = call(*new("--config", "run.toml"))
        assert status == 2
        assert "run.toml: train.steps 3 and train.seconds 9.0 exclude one another" in err

    @pytest.mark.slow
    def test_the_demo_goes_by_the_clock(self, call):
        began = time.monotonic()
        status, out, err = call("demo", "--seconds", "10")
        assert status == 0, err
        assert re.search(r"10 s at \S+ s per step, validation and checkpoints included: ", err)
        assert len(re.findall("^Sample ", out, re.MULTILINE)) == 3
        assert time.monotonic() - began < 60
        assert "exclude one another" in call("demo", "--seconds", "10", "--steps", "3", "--out", "s")[2]


class TestResume:
    @pytest.fixture
    def run(self, call):
        assert call(*new(*SHORT))[0] == 0

    def test_a_complete_run_names_the_command_that_continues_it(self, call, run):
        _, out, _ = call("train", "--resume", "r")
        assert out == "r is complete: 6 steps; train it longer with: timemix train --resume r --train.steps 12\n"
        command = out.partition("timemix ")[2].split()
        status, _, err = call(*command)
        assert status == 0, err
        assert "resuming r after step 6, with --train.steps 12 (before: 6); learning rate at step 7: 0.0" in err
        assert "step 12/12" in err
        assert not Path("r/.lock.json").exists()
        call("train", "--resume", "r")
        assert "unlocking" not in call("train", "--resume", "r")[2]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (
                "--model.ctx-len 4",
                "--model.ctx-len cannot change in the resumed run r; start a new run from its weights",
            ),
            ("--data my.txt", "--data cannot change in the resumed run r; start a new run from its weights"),
            ("--data.order=random", "--data.order cannot change in the resumed run r; start a new run"),
            (
                "--model.layers 2",
                "--model.layers cannot change in the trained model of r; train a new model from random",
            ),
            ("--model.arch llama", "--model.arch cannot change in the trained model of r; train a new model"),
            ("--out s", "--resume r trains in the folder r; leave --out out, or start a new run from its weights"),
        ],
    )
    def test_the_model_and_the_text_cannot_change_and_the_advice_works(self, call, run, options, sentence):
        status, _, err = call("train", "--resume", "r", *options.split())
        assert status == 2
        assert err.startswith(f"timemix: {sentence}")
        advised = err.partition("with: timemix ")[2].replace("VALUE", options.replace("=", " ").split()[1]).split()
        assert call(*advised, "--train.steps", "1")[0] == 0

    def test_help_lists_the_settings_of_the_run(self, call, run):
        status, out, _ = call("train", "--resume", "r", "--help")
        assert status == 0
        words = " ".join(out.split())
        assert "timemix train --resume runs/mine --train.steps 4000" in words
        assert re.search(r"--train.steps INT.{1,300}\(default: 6\)", words)


def test_help_names_the_ways_to_train(call):
    _, out, _ = call("train", "--help")
    first, _, rest = out.partition("model options")
    for words in ("[PRESET]", "--data", "--config", "--from", "--resume", "--train.seconds"):
        assert words in first
    assert "demo, cpu-small, record, seed" in out
    assert "timemix train --resume runs/mine\n" in rest


class TestNotFinite:
    WILD = ("--train.clip", "0", "--train.optimizer", "muon", "--train.lr", "1e6")

    def command(self, err: str) -> list[str]:
        found = re.search(r"try a smaller --train.lr: timemix (train .*)\n$", err)
        assert found, err
        return found[1].replace("NEXT", "next").split()

    def test_the_named_command_resumes_with_a_smaller_rate(self, call):
        wild = [*new(*TINY, *self.WILD, "--train.steps", "20")]
        status, _, err = call(*wild)
        assert status == 2
        assert self.command(err) == ["train", "--resume", "r", "--train.lr", "0.004"]
        again = call("train", "--resume", "r")[2]
        assert self.command(again) == self.command(err)
        assert (
            "--out r exists already; choose another folder, or resume the run with: timemix train --resume r"
            in call(*wild)[2]
        )
        assert call(*self.command(err))[0] == 0

    def test_right_after_a_checkpoint_it_starts_a_new_run(self, call):
        wild = new(*TINY, *self.WILD, "--train.steps", "20", "--train.save-every", "1")
        command = self.command(call(*wild)[2])
        assert command == ["train", "--config", "r/config.toml", "--out", "next", "--train.lr", "0.004"]
        assert call(*command)[0] == 0

    def test_a_usual_rate_is_divided_by_ten(self, tmp_path):
        with (
            pytest.raises(NotFinite, match=r"--train.lr 0.0012$"),
            resume_command_added(small_trainer(tmp_path, lr=0.012)),
        ):
            raise NotFinite("the loss is not finite at step 3")


def test_a_folder_that_is_no_run_is_not_to_be_resumed(call):
    Path("r").mkdir()
    assert call(*new(*SHORT))[2] == "timemix: --out r exists already; choose another folder\n"


def test_a_checkpoint_is_not_resumed(call):
    call("data", "my.txt", "--out", "tokens")
    assert call("train", "demo", "--data", "tokens", "--out", "my run", *SHORT)[0] == 0
    checkpoint = Path("my run/checkpoints/step-00000006")
    before = sorted(checkpoint.iterdir())
    for options in ((), ("--train.steps", "9")):
        status, _, err = call("train", "--resume", checkpoint, *options)
        assert (status, err) == (
            2,
            f"timemix: {checkpoint} is a checkpoint, not a run; resume its run with: timemix train --resume 'my run',"
            f" or start a new run from it with: timemix train --from '{checkpoint}' --out NEXT\n",
        )
    with pytest.raises(InvalidValue, match="is a checkpoint, not a run"):
        resume_run(checkpoint)
    assert sorted(checkpoint.iterdir()) == before


def test_a_run_from_weights_reads_and_divides_the_same_text_as_before(call):
    """With other settings, it would validate on text that has trained its start."""
    Path("valid.txt").write_text(TEXT[::-1])
    call(*new(*SHORT, "--data.valid", "valid.txt"))
    call("train", "--from", "r", "--out", "next", "--train.steps", "2")
    call("train", "--from", "r", "--data", "my.txt", "--out", "other", "--train.steps", "2")
    data = [read_toml(Path(run) / "config.toml").data for run in ("r", "next", "other")]
    assert data[1] == data[0]
    assert data[1].valid == "valid.txt"
    assert data[2].valid is None


def test_quiet_prints_nothing(call):
    status, out, err = call(*new(*SHORT, "--quiet", "--train.sample-every", "2"))
    assert (status, out, err) == (0, "", "")
    assert Path("r/samples.txt").read_text().count("--- step ") == 3
    assert Path("r/loss.png").exists()


def test_samples_are_shown_while_it_trains(call):
    _, _, err = call(*new(*SHORT, "--train.sample-every", "4"))
    sample = Path("r/samples.txt").read_text().partition("\n\n--- step 6")[0]
    assert sample.startswith("--- step 4\n")
    assert sample in err


def test_samples_of_own_prompts_are_shown_also_at_the_end(call):
    prompts = ["--train.sample-prompts", "the cat", "dog\n"]
    status, _, err = call(*new(*SHORT, "--train.sample-every", "4", *prompts))
    assert status == 0, err
    text = Path("r/samples.txt").read_text()
    headings = [line for line in text.splitlines() if line.startswith("--- ")]
    expected = [f"--- step {step}, prompt {prompt}" for step in (4, 6) for prompt in ('"the cat"', r'"dog\n"')]
    assert headings == expected
    assert '--- step 4, prompt "the cat"\nthe cat' in text
    assert [line for line in err.splitlines() if line.startswith("--- ")] == expected
    assert err.count("step 6/6") == 1
    call(*new(*SHORT, "--train.sample-every", "4", *prompts, out="again"))
    assert Path("again/samples.txt").read_text() == text


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Ω", "the prompt 'Ω' in --train.sample-prompts cannot be encoded: the vocabulary has no 'Ω' (U+03A9); leave"),
        ("", "the value after 'the' is empty; give a value"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_training(call, prompt, words):
    status, _, err = call(*new(*SHORT, "--train.sample-prompts", "the", prompt))
    assert status == 2
    assert words in err
    assert not Path("r").exists()


def test_early_stopping_names_the_command_that_continues(call):
    options = ["--train.steps", "200", "--train.valid-every", "1", "--train.patience", "1", "--train.lr", "2"]
    status, _, err = call(*new(*TINY, *options))
    assert status == 0
    found = re.search(
        r"r stopped early at step (\d+) of 200, after 1 validations without a lower loss; continue"
        r" with: timemix (train --resume r --train.patience 0)\n",
        err,
    )
    assert found
    assert call("train", "--resume", "r")[1] in err
    status, _, err = call(*found[2].split(), "--train.steps", int(found[1]) + 3)
    assert status == 0
    assert f"step {int(found[1]) + 3}/" in err


def test_a_hook_lies_in_the_working_folder(call, monkeypatch):
    Path("hooks_of_mine.py").write_text(
        "import json\ndef log(line):\n    with open('seen.jsonl', 'a') as file: print(json.dumps(line), file=file)\n"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    assert call(*new(*SHORT, "--hook", "hooks_of_mine:log"))[0] == 0
    assert Path("seen.jsonl").read_text() == Path("r/metrics.jsonl").read_text()
    sys.modules.pop("hooks_of_mine")


def full_disk():
    return open("/dev/full", "w", encoding="utf-8")


def reader_gone():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", encoding="utf-8")


def closed_terminal():
    theirs, ours = pty.openpty()
    os.close(theirs)
    return os.fdopen(ours, "w", encoding="utf-8")


@pytest.mark.parametrize("screen", [full_disk, reader_gone, closed_terminal, lambda: None])
def test_training_outlives_its_screen(screen, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, screen())
    with pytest.raises(SystemExit) as end:
        main([*new(*SHORT, "--train.sample-every", "2")])
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.close()
    assert not end.value.code
    assert Path("r/loss.png").exists()
    assert [path.name for path in Path("r/checkpoints").iterdir()] == ["step-00000006"]
    assert json.loads(Path("r/metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_a_stream_that_fails_takes_what_follows_and_the_flush_at_exit():
    with reader_gone() as stream:
        lasting = LastingStream(stream)
        assert lasting.write("held back, not yet refused") == 26
        lasting.flush()
        lasting.write("more")
        lasting.flush()
        assert lasting.isatty() is False


def test_streams_are_given_back():
    before = sys.stdout, sys.stderr
    with lasting_output():
        assert isinstance(sys.stderr, LastingStream)
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes(ignored):
    """Its signal saves the run; under nohup, which ignores it, the run trains to its end."""
    theirs, ours = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "timemix", *new(*TINY, "--train.steps", "20000" if not ignored else "400")],
        stdin=ours,
        stdout=ours,
        stderr=ours,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )
    os.close(ours)
    while not Path("r/metrics.jsonl").exists() or len(Path("r/metrics.jsonl").read_text()) < 200:
        time.sleep(0.05)
    os.close(theirs)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == (0 if ignored else 128 + signal.SIGHUP)
    assert Path("r/loss.png").exists() == ignored
    assert list(Path("r/checkpoints").iterdir())


def progress(**fields):
    values = {"step": 250, "steps": 2000, "tokens": 16_000, "seconds": 60.0, "loss": 1.25, "tokens_per_second": 1234.5}
    return TrainingProgress(**(values | {"valid_loss": 2.5, "valid_step": 100} | fields))


class TestProgressLine:
    def test_the_validation_has_its_step(self):
        line = progress_line(progress())
        assert line == "step 250/2000  loss 1.250  valid 2.500 at 100  1,234 tokens/s  1:31 left"
        assert "valid -  " in progress_line(progress(valid_loss=None, valid_step=None))

    @given(
        width=st.integers(5, 120),
        step=st.integers(1, 10**8 - 1),
        loss=st.floats(0, 9.9),
        speed=st.floats(1, 1e7),
    )
    @examples(300)
    def test_a_narrow_line_keeps_its_numbers(self, width, step, loss, speed):
        line = progress_line(progress(step=step, steps=10**8, loss=loss, tokens_per_second=speed), width)
        assert len(line) <= width
        assert f"{loss:.3f}" in line
        assert width < len(f"{step}/{10**8}") + 7 or f"{step}/" in line

    @pytest.mark.parametrize("columns", [20, 40, 120])
    def test_a_terminal_of_any_width_shows_step_and_loss(self, monkeypatch, columns):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", Terminal())
        with watching(0, 2000) as watch:
            watch(progress(samples=(Sample(250, None, "the cat\x1b[31m"),)))
        text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sys.stderr.getvalue())
        assert "250/2000" in text
        assert "1.250" in text
        assert "the cat\\x1b[31m" in text
        assert ("tokens/s" in text) == (columns == 120)


def test_control_characters_of_a_sample_are_shown_escaped():
    assert escaped("a\tb\nc\x1b[2J\x07é") == "a\tb\nc\\x1b[2J\\x07é"
