"""Shell completion, as bash asks for it."""

import shutil
import subprocess

import pytest

from timemix.cli.bench import VERBS as BENCH_VERBS
from timemix.cli.main import VERBS, main
from timemix.models.registry import ARCHITECTURES

# The words typed so far, and completions that there must be.
TYPED = {
    ("",): set(VERBS),
    ("ev",): {"eval"},
    ("eval", "--pre"): {"--precision"},
    ("eval", "runs/a", "--weights", "b"): {"bfloat16"},
    ("plot", "--x", ""): {"tokens", "steps", "seconds"},
    ("train", "--train.lr"): {"--train.lr", "--train.lr-final"},
    ("train", "--model.he"): {"--model.heads"},
    ("train", "--res"): {"--resume"},
    ("train", "--model.arch", ""): set(ARCHITECTURES),
    ("train", "cpu-small", "--model.arch", "mha_r"): {"mha_rotary"},
    ("info", "seed", "--model.arch", "l"): {"llama"},
    ("bench", ""): set(BENCH_VERBS),
    ("bench", "op", "--sec"): {"--seconds"},
    ("plot", "my-r"): {"my-run"},
    ("eval", "my-run", "--data", "my-t"): {"my-text.txt"},
    ("plot", "--out", "my-"): {"my-run", "my-text.txt"},
}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Script for bash, in a folder with a text and a run."""
    path = tmp_path_factory.mktemp("completion") / "script.bash"
    with pytest.MonkeyPatch.context() as patch, open(path, "w") as file:
        patch.setattr("sys.stdout", file)
        with pytest.raises(SystemExit) as end:
            main(["completion", "bash"])
    assert not end.value.code
    path.with_name("my-text.txt").touch()
    path.with_name("my-run").mkdir()
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_options_values_and_files(script):
    lines = [f"source {script.name}", "complete -p timemix"]
    for words in TYPED:
        typed = " ".join(f"'{word}'" for word in ("timemix", *words))
        lines.append(f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; COMPREPLY=(); _timemix; echo ${{COMPREPLY[*]}}")
    result = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=script.parent, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stderr == ""
    registered, *completed = result.stdout.splitlines()
    assert registered.endswith("_timemix timemix")
    for (words, expected), found in zip(TYPED.items(), completed, strict=True):
        assert expected <= set(found.split()), words
        assert words == ("",) or set(found.split()) - expected <= {"-h", "--help"}, words


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_with_every_verb(shell, capsys):
    with pytest.raises(SystemExit) as end:
        main(["completion", shell])
    assert not end.value.code
    out = capsys.readouterr().out
    assert all(repr(verb) in out for verb in VERBS)
    assert {"zsh": "#compdef timemix", "fish": "complete --no-files --command 'timemix'"}[shell] in out
    assert "\x1b" not in out


def test_an_unknown_shell_is_named(capsys):
    with pytest.raises(SystemExit) as end:
        main(["completion", "csh"])
    assert end.value.code == 2
    assert "'csh'" in capsys.readouterr().err
