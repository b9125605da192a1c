"""Every block of the tutorial runs, in the order of the page, in one folder, with shorter trainings."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import run_command
from tests.helpers.pages import check_command, commands, numbered_blocks, run_block

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"
# The tests run in an environment that is installed already.
INSTALLATION = ("python3 -m venv", ". .venv/bin/activate", "pip install")
SHORTER = {
    "--train.steps 1000": "--train.steps 3",
    "--train.steps 2000": "--train.steps 5",
    "--train.steps 300": "--train.steps 3",
    "--tokens 100_000": "--tokens 1536 --seeds 2 --no-tune",
}
# Lines of the printed output that are the same everywhere, apart from their numbers.
STABLE = re.compile(
    r"(files|characters|bytes|distinct characters|held out|tokenizer|vocab size|train \w+|valid \w+) {2,}.*|rwkv1, .*"
    r"|resuming .*|step \d+/\d+ .*|validation loss .*|the run is in .*|[\d.]+ nats per token, .*|[\d,]+ tokens, .*"
    r"|# rwkv1 against .*|Each variant is trained on [\d,]+ tokens, .*|\| variant \| parameters .*"
    r"|nats per token at .*|original, .*|\d+ exponentials .*"
)
EXACT = re.compile(r"\d+ bytes")


def without_numbers(line):
    """Return a line with each number, and each list of numbers, as one sign."""
    line = re.sub(r"\d+([,.:]\d+)*", "#", line)
    return re.sub(r"#(, #)+", "#", " ".join(line.split()))


def run_shell(command, capsys):
    """Run a line of shell; return all that it prints."""
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    words = shlex.split(command)
    if words[0] == "timemix":
        status, out, err = run_command(capsys, *words[1:])
        assert status == 0, f"{command}\n{err}"
        return out + err
    assert words[0] == "python", command
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def run_and_read(line, language, text, names, capsys):
    """Run a block of shell or Python; return all that it prints."""
    if language == "python":
        capsys.readouterr()
        run_block(PAGE, line, text, names)
        return capsys.readouterr().out
    assert language == "sh"
    return "".join(run_shell(each, capsys) for each in text.splitlines() if not each.startswith(INSTALLATION))


def check_output(shown, printed):
    """Compare the lines of the page that do not depend on the machine with what was printed."""
    known = {without_numbers(line) for line in printed.splitlines()}
    for line in shown.splitlines():
        if STABLE.fullmatch(line):
            assert without_numbers(line) in known, f"{line}\n{printed}"
        if EXACT.fullmatch(line):
            assert line in printed.splitlines()


@pytest.mark.slow
def test_the_tutorial_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, printed = {}, ""
    for line, language, text in numbered_blocks(PAGE):
        if language == "text":
            check_output(text, printed)
        else:
            printed = run_and_read(line, language, text, names, capsys)
    assert {path.name for path in Path("runs").iterdir()} == {"first", "code", "compared", "recurrent"}


def test_the_command_of_the_server_is_accepted():
    (command,) = (each for each in commands(PAGE) if each.startswith("timemix serve"))
    check_command(command)


def test_every_shorter_setting_occurs_in_the_page():
    shell = "".join(text for _, language, text in numbered_blocks(PAGE) if language == "sh")
    assert all(long in shell for long in SHORTER)
    assert all(any(line.startswith(begin) for line in shell.splitlines()) for begin in INSTALLATION)


def test_most_printed_lines_are_compared():
    lines = [line for _, language, text in numbered_blocks(PAGE) if language == "text" for line in text.splitlines()]
    assert sum(bool(STABLE.fullmatch(line) or EXACT.fullmatch(line)) for line in lines) > 40


def test_the_pictures_exist_and_are_small():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert pictures
    assert all((PAGE.parent / each).stat().st_size < 150_000 for each in pictures)
