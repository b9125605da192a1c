"""`timemix sample` as a person uses it: stop strings, states, rounded weights, an end by force."""

import json
import os
import signal
import subprocess
import sys

import pytest

import timemix
from tests.helpers.runs import small_trainer
from timemix.cli.main import main
from timemix.cli.sample import interrupts_noted
from timemix.generation.request import Event
from timemix.runtime import native

PROMPT = "the cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    for name, seed in (("run", 1), ("other", 2)):
        small_trainer(folder, name=name, steps=30, seed=seed).run()
    return folder


@pytest.fixture
def sample(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def sample(*arguments, run="run"):
        """Runs it in this process: (status, stdout, stderr)."""
        status = 0
        try:
            main(["sample", run, *map(str, arguments)])
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return sample


def test_going_on_from_a_saved_state_equals_going_on(sample, tmp_path):
    _, whole, _ = sample("--prompt", PROMPT, "--tokens", 50)
    _, first, _ = sample("--prompt", PROMPT, "--tokens", 30, "--save-state", tmp_path / "a")
    status, second, err = sample("--load-state", tmp_path / "a", "--tokens", 12, "--save-state", tmp_path / "b")
    assert (status, err) == (0, "")
    _, third, _ = sample("--load-state", tmp_path / "b", "--tokens", 8)
    assert first[:-1] + second[:-1] + third == whole


def test_a_prompt_after_a_state_is_read_first(sample, tmp_path):
    sample("--prompt", "the ", "--tokens", 1, "--temperature", 0, "--save-state", tmp_path / "a")
    _, out, _ = sample("--load-state", tmp_path / "a", "--prompt", "at", "--tokens", 5)
    assert out.startswith("at")


def test_branches_of_a_state_differ_and_the_first_is_the_one_without(sample, tmp_path):
    sample("--prompt", PROMPT, "--tokens", 5, "--save-state", tmp_path / "a")
    _, one, _ = sample("--load-state", tmp_path / "a", "--tokens", 20)
    _, out, _ = sample("--load-state", tmp_path / "a", "--tokens", 20, "--count", 3, "--json")
    texts = json.loads(out)["texts"]
    assert texts[0] == one[:-1]
    assert len(set(texts)) == 3


def test_stop_strings_end_the_text(sample):
    _, whole, _ = sample("--prompt", PROMPT, "--tokens", 200)
    end = whole.index("t ", len(PROMPT))
    _, out, _ = sample("--prompt", PROMPT, "--tokens", 200, "--stop", "QQ", "t ")
    assert out == whole[:end] + "\n"


def test_log_probabilities_in_json(sample):
    _, out, _ = sample("--prompt", PROMPT, "--tokens", 7, "--count", 2, "--json", "--log-probabilities")
    report = json.loads(out)
    assert [len(row) for row in report["log_probabilities"]] == [7, 7]
    assert all(x < 0 for row in report["log_probabilities"] for x in row)
    _, out, _ = sample("--prompt", PROMPT, "--tokens", 7, "--json")
    assert list(json.loads(out)) == ["prompt", "texts"]


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_rounded_weights_write_nearly_the_same(sample, weights):
    options = ["--prompt", PROMPT, "--tokens", 1, "--json", "--log-probabilities"]
    exact = json.loads(sample(*options)[1])
    rounded = json.loads(sample(*options, "--weights", weights)[1])
    assert rounded["texts"] == exact["texts"]
    difference = abs(rounded["log_probabilities"][0][0] - exact["log_probabilities"][0][0])
    assert 0 < difference < 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], "the prompt is empty; give at least one token"),
        (["--stop", ""], "the value after '--stop' is empty; give a value"),
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--count", "-2"], "--count is -2; it must be at least 1"),
        (["--seed", "-1"], "seed is -1; it must be a whole number"),
        (["--load-state", "nothing"], "nothing is missing"),
        (["--load-state", "text.txt"], "text.txt is damaged or not a safetensors file"),
        (["--load-state", "run"], "run"),
        (["--load-state", "run/checkpoints/step-00000030/model.safetensors"], "is no session file of timemix"),
        (
            ["--save-state", "a", "--count", "2"],
            "--count is 2, but --save-state saves the state of one text",
        ),
        (["--save-state", "run/config.toml/a"], "cannot write run/config.toml/a"),
        (["--save-state", "run"], "cannot write run: it is a folder, a pipe or a device; name a file"),
        (["--prompt", "the Ω"], "Ω"),
        (["--log-probabilities"], "--log-probabilities needs --json; add --json"),
        (["--prompt", "-Hello"], "a text that begins with '-' is given as --prompt=-Hello"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_errors_are_one_sentence(sample, arguments, words):
    status, _, err = sample(*arguments)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1


def test_a_state_of_another_model_is_refused(sample, tmp_path):
    sample("--prompt", PROMPT, "--tokens", 5, "--save-state", tmp_path / "a")
    status, _, err = sample("--load-state", tmp_path / "a", run="other")
    assert status == 2
    assert "holds a session of another model (rwkv1); use it with the run that saved it" in err


def test_an_error_leaves_a_good_state_alone(sample, tmp_path):
    path = tmp_path / "a"
    sample("--prompt", PROMPT, "--tokens", 5, "--save-state", path)
    before = path.read_bytes()
    for wrong in (["--seed", -1], ["--stop", ""], ["--prompt", "Ω"], ["--top-p", 7]):
        status, _, err = sample("--load-state", path, "--save-state", path, *wrong)
        assert status == 2, wrong
        assert err.count("\n") == 1
        assert path.read_bytes() == before


def started(folder, *arguments, **options):
    command = [sys.executable, "-m", "timemix", "sample", "run", "--prompt", PROMPT, "--tokens", "1000000", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_second_ctrl_c_does_not_wait_for_an_event():
    with interrupts_noted(1) as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with interrupts_noted() as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert len(interrupts) == 2


def test_ctrl_c_saves_the_state_of_all_that_was_printed(folder, sample, tmp_path):
    process = started(folder, "--save-state", str(tmp_path / "a"))
    out = process.stdout.read(300)
    process.send_signal(signal.SIGINT)
    # Not by communicate: it passes over what `read` has buffered beyond its 300 characters.
    printed = out + process.stdout.read()
    assert process.stderr.read() == "timemix: interrupted\n"
    assert process.wait(timeout=60) == 130
    process.stdout.close()
    process.stderr.close()
    _, going_on, _ = sample("--load-state", tmp_path / "a", "--tokens", 40)
    _, whole, _ = sample("--prompt", PROMPT, "--tokens", len(printed) + 60)
    assert (printed + going_on[:-1]) == whole[: len(printed) + 40]


def test_a_closed_pipe_saves_the_state_quietly(folder, sample, tmp_path):
    process = started(folder, "--save-state", str(tmp_path / "a"))
    process.stdout.read(50)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()
    status, _, _ = sample("--load-state", tmp_path / "a", "--tokens", 5)
    assert status == 0


def test_a_pipe_that_closes_before_the_first_token_gives_no_traceback(folder, tmp_path):
    """A prompt that is longer than the buffer of stdout is written before the model reads it."""
    run = [sys.executable, "-m", "timemix", "sample", "run"]
    command = [*run, "--prompt", "the cat " * 4000, "--save-state", str(tmp_path / "a")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=folder, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert not (tmp_path / "a").exists()


def test_a_session_cut_in_a_stop_string_goes_on_exactly(sample, tmp_path):
    _, plain, _ = sample("--prompt", PROMPT, "--tokens", 40)
    stop = plain[len(PROMPT) + 20 : len(PROMPT) + 24]
    _, whole, _ = sample("--prompt", PROMPT, "--tokens", 40, "--stop", stop)
    for cut in range(16, 24):
        _, first, _ = sample("--prompt", PROMPT, "--tokens", cut, "--stop", stop, "--save-state", tmp_path / "a")
        if len(first) < len(whole):
            _, rest, _ = sample("--load-state", tmp_path / "a", "--tokens", 40 - cut, "--stop", stop)
            assert first[:-1] + rest == whole


def test_by_default_no_token_is_filtered(sample, folder):
    loaded = timemix.load("run")
    texts = timemix.generate(loaded, PROMPT, tokens=60, count=2)
    assert json.loads(sample("--prompt", PROMPT, "--tokens", 60, "--count", 2, "--json")[1])["texts"] == texts


def test_control_characters_are_escaped_on_a_terminal_alone(sample, monkeypatch):
    text = "the \x1b[31mcat\x07\t\u3000\x9b"
    event = Event(0, 1, text, finished="length")
    monkeypatch.setattr("timemix.generation.generate.events_of", lambda engine: iter([event]))
    assert sample("--prompt", "the ")[1] == f"the {text}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert sample("--prompt", "the ")[1] == "the the \\x1b[31mcat\\x07\t\u3000\\x9b\n"


def test_without_a_compiler_it_says_so_and_writes_the_same(sample, monkeypatch):
    _, expected, _ = sample("--prompt", PROMPT, "--tokens", 20)
    monkeypatch.setenv("CC", "/nonexistent/cc")
    native.library.cache_clear()
    try:
        status, out, err = sample("--prompt", PROMPT, "--tokens", 20)
    finally:
        native.library.cache_clear()
    assert (status, out) == (0, expected)
    reason = "no C compiler was found: CC is '/nonexistent/cc'"
    assert err == f"timemix: generation uses PyTorch, not the compiled step: {reason}\n"
