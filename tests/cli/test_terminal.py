"""Printing to streams and terminals of every kind: other encodings, closed or full ones, narrow ones, no colours."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from timemix.cli.main import main
from timemix.cli.terminal import own_command

LINE = '{{"step": {0}, "tokens": {0}, "seconds": {0}, "loss": 2.0}}\n'


@pytest.fixture
def folder(tmp_path):
    """A folder with a run whose losses can be plotted."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("".join(LINE.format(i) for i in range(1, 4)))
    return tmp_path


def shell(command, folder, **environment):
    """Runs a shell command in which `timemix` stands for the command line."""
    return subprocess.run(
        ["sh", "-c", command.replace("timemix", f"{sys.executable} -m timemix")],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        timeout=60,
        check=False,
    )


def on_terminal(arguments, **environment):
    """Output of a command whose three streams are a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "timemix", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"} | environment,
    )
    os.close(theirs)
    found = b""
    try:
        while piece := os.read(ours, 2**16):
            found += piece
    except OSError:
        # Linux: the process has ended.
        pass
    process.wait(timeout=60)
    os.close(ours)
    return found.decode()


@pytest.mark.parametrize(("encoding", "printed"), [("ascii", "\\u03a9"), ("latin-1", "\\u03a9"), ("cp1252", "\\u03a9")])
def test_characters_outside_the_encoding_are_escaped(folder, monkeypatch, encoding, printed):
    monkeypatch.chdir(folder)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as end:
        main(["plot", "run", "--out", "Ω.svg"])
    assert not end.value.code
    assert stdout.buffer.getvalue().decode(encoding) == f"{printed}.svg\n"
    assert (folder / "Ω.svg").exists()


def test_a_posix_locale_is_no_obstacle(folder):
    result = shell("timemix plot run --out Ω.svg", folder, LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"\\udcce\\udca9.svg\n"


def test_closed_streams_discard_their_text(folder):
    result = shell("exec timemix plot run <&- >&- 2>&-", folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert (folder / "run/loss.png").exists()
    # No file of the program was opened as one of the three streams, and printed to.
    assert (folder / "run/metrics.jsonl").read_text() == "".join(LINE.format(i) for i in range(1, 4))
    assert shell("exec timemix plot none >&-", folder).stderr.startswith(b"timemix: there is no run folder none")
    assert shell("exec timemix plot none 2>&-", folder).returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_a_full_disk_behind_a_stream_is_one_sentence(folder):
    for command in ("timemix --version", "timemix plot --help"):
        result = shell(f"{command} > /dev/full", folder)
        assert (result.returncode, result.stderr) == (2, b"timemix: No space left on device\n")
    assert shell("timemix plot none 2> /dev/full", folder).returncode == 2


def test_a_reader_that_leaves_ends_the_help_quietly(folder):
    result = shell("timemix train --help | head -n 1", folder)
    assert result.stdout.startswith(b"usage: timemix train")
    assert result.stderr == b""


def test_no_color_is_honoured():
    assert "\x1b[" in on_terminal(("plot", "--help"))
    assert "\x1b" not in on_terminal(("plot", "--help"), NO_COLOR="1")


def test_an_error_that_goes_to_a_file_has_no_escape_sequences(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(SystemExit):
        main(["plot", "--nothing", "1"])
    assert capsys.readouterr().err == "timemix: unknown option '--nothing'; did you mean '--smoothing'?\n"


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 20, 39, 60])
def test_help_is_readable_at_any_width(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main(["plot", "--help"])
    out = capsys.readouterr().out
    assert "Horizontal axis." in out
    assert "show this help" in out
    assert os.environ["COLUMNS"] == str(columns)


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["trian"], 2)])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_process_of_torchrun_ends_without_the_finalization_of_python(arguments, status, processes):
    # While Python finalizes, a thread of gloo could abort the process.
    handler = "import atexit; atexit.register(print, 'exit handler')"
    code = f"{handler}; import runpy; runpy.run_module('timemix', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"WORLD_SIZE": processes},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert ("timemix 0." in done.stdout) if status == 0 else ("unknown verb" in done.stderr)
    assert ("exit handler" in done.stdout) == (processes == "1")


def test_printed_commands_start_the_timemix_that_printed_them(tmp_path, monkeypatch):
    """They name the path of the script unless PATH leads to the script, as in `make demo` without an active .venv."""
    for name in ("mine", "other"):
        script = tmp_path / name / "bin dir/timemix"
        script.parent.mkdir(parents=True)
        script.touch(mode=0o755)
        (script.parent / "python").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "mine/bin dir/python"))

    def printed(first_argument, path):
        monkeypatch.setattr(sys, "argv", [first_argument])
        monkeypatch.setenv("PATH", str(path))
        return own_command()

    mine, other = tmp_path / "mine/bin dir", tmp_path / "other/bin dir"
    assert printed("mine/bin dir/timemix", mine) == "timemix"
    assert printed("mine/bin dir/timemix", other) == printed("mine/bin dir/timemix", "") == "'mine/bin dir/timemix'"
    module = "/packages/timemix/__main__.py"
    assert printed(module, mine) == "timemix"
    assert printed(module, other) == f"'{mine}/python' -m timemix"
    # A program that calls `main`.
    assert printed("/packages/pytest/__main__.py", other) == "timemix"
