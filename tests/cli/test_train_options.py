"""Options of `timemix train`: the first parse, and what wins among flags, a file of settings, a run and a preset."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.runs import TEXT, small_trainer
from timemix.cli.main import main
from timemix.cli.options import Choice, first_parse
from timemix.cli.train import train_options
from timemix.config.from_file import config_from_file
from timemix.config.presets import preset
from timemix.config.run import RunConfig, read_toml, to_toml
from timemix.errors import TimemixError
from timemix.models.registry import model_config

VERSION_1 = Path(__file__).parents[1] / "fixtures" / "version1"


@pytest.mark.parametrize(
    ("arguments", "choice"),
    [
        ([], Choice()),
        (["seed"], Choice(preset="seed")),
        (["--data", "seed", "--out", "r"], Choice()),
        (["seed", "--config", "a.toml", "--out=r"], Choice(preset="seed", config=Path("a.toml"))),
        (["--out", "r", "--config=a=b.toml"], Choice(config=Path("a=b.toml"))),
        (["--from", "r", "--model.arch=mha_pro"], Choice(from_=Path("r"), arch="mha_pro")),
        (["--model.arch", "rwkv1", "--model.arch", "mha_pro"], Choice(arch="mha_pro")),
        (["--resume", "r", "--tensorboard"], Choice(resume=Path("r"))),
        (["--resume"], Choice()),
        (["--conf", "a.toml", "--model.arc", "x", "--train.betas", "0.9", "0.95"], Choice()),
        (["--train.lr", "-1", "--model.layers", "-3", "-h"], Choice()),
    ],
)
def test_the_first_parse_reads_what_decides_and_nothing_else(arguments, choice):
    assert first_parse(arguments) == choice


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def options(*arguments):
    return train_options([*map(str, arguments), "--out", "r"])


def test_flags_win_over_the_file_and_the_file_over_the_preset(write):
    path = write("[model]\nlayers = 7\nctx_len = 32\n[train]\nsteps = 11\nlr = 0.5\n[data]\nsource = 'mine.txt'\n")
    parsed = options("demo", "--config", path, "--train.steps", "5", "--model.ctx-len=16")
    expected = preset("demo")
    assert parsed.model == replace(expected.model, layers=7, ctx_len=16)
    assert parsed.train == replace(expected.train, steps=5, lr=0.5)
    assert parsed.data.config() == replace(expected.data, source="mine.txt")
    assert options("--config", path, "--data", "other.txt").data.source == "other.txt"
    assert options("--config", path, "--data.source=other.txt").data.source == "other.txt"


def test_a_small_learning_rate_of_the_command_does_not_rise(write):
    def rates(*arguments):
        train = options(*arguments).train
        return train.lr, train.lr_final

    assert preset("demo").train.lr_final > 1e-5
    assert rates("demo", "--train.lr", "1e-5") == (1e-5, 1e-5)
    assert rates("demo", "--train.lr=1") == (1, preset("demo").train.lr_final)
    assert rates("demo", "--train.lr", "1e-5", "--train.lr_final", "1") == (1e-5, 1)
    assert rates("--config", write("[train]\nlr = 1e-5\nlr_final = 1\n")) == (1e-5, 1)


def test_without_a_preset_the_default_one_fills_the_file(write):
    parsed = options("--config", write("[train]\nlr = 1\n"))
    assert (parsed.model, parsed.train.lr) == (preset("cpu-small").model, 1.0)
    assert options("--config", write("")).train == preset("cpu-small").train


def test_the_architecture_of_a_file_gives_its_class(write):
    path = write("[model]\narch = 'mha_rotary'\nheads = 2\n")
    assert options("seed", "--config", path).model == replace(preset("seed", "mha_rotary").model, heads=2)
    # Of an architecture that the file does not name, the flag decides.
    path = write("[model]\nexponentials = 4\n")
    assert options("--config", path, "--model.arch", "rwkv1_exp").model.exponentials == 4


def test_another_architecture_keeps_the_fields_that_both_have(write):
    path = write("[model]\narch = 'rwkv1'\nheads = 2\nactivation = 'silu'\nbackend = 'dense'\n[train]\nlr = 0.5\n")
    parsed = options("--config", path, "--model.arch", "rwkv1_exp", "--model.layers", "3")
    expected = replace(preset("cpu-small", "rwkv1_exp").model, heads=2, activation="silu", layers=3)
    assert (parsed.model, parsed.train.lr) == (expected, 0.5)
    with pytest.raises(TimemixError, match="unknown architecture 'rwkv11'; did you mean 'rwkv1'"):
        options("--config", path, "--model.arch", "rwkv11")


@pytest.mark.parametrize("name", ["seed", "cpu-small"])
def test_a_whole_file_leaves_nothing_to_the_preset(name, write):
    config = preset("demo", "mha_pro")
    config = RunConfig(model_config("mha_pro", dropout=0.3, layers=3), config.data, config.train)
    assert config_from_file(write(to_toml(config)), name) == replace(
        config, model=replace(config.model, vocab_size=preset(name).model.vocab_size)
    )


@pytest.mark.parametrize("arch", ["rwkv1", "rwkv1_exp", "mha_shift"])
def test_files_of_format_version_1(arch):
    path = VERSION_1 / arch / "config.toml"
    old = read_toml(path)
    found = config_from_file(path)
    assert replace(found, model=replace(found.model, vocab_size=old.model.vocab_size)) == old


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[model]\nlayer = 3\n", "unknown field 'model.layer'; did you mean 'layers'?"),
        ("[model]\narch = 'mha_rotary'\nalpha = true\n", "unknown field 'model.alpha'"),
        ("[trian]\nlr = 1\n", "unknown field 'trian'; did you mean 'train'?"),
        ("[train]\nlr = 'big'\n", "train.lr is 'big'; it must be of type float"),
        ("model = 3\n", "model is 3; it must be a table"),
        ("[model]\narch = 'rwkv11'\n", "unknown architecture 'rwkv11'; did you mean 'rwkv1'?"),
        ("[model]\narch = [1]\n", "unknown architecture [1]; known: "),
        ("[model]\nheads = 5\n", "model.heads=5 does not divide model.channels=128"),
        ("[model]\nvocab_size = 'all'\n", "model.vocab_size is 'all'"),
        ("format_version = 9\n", "format_version is 9, but this timemix supports 1 and 2"),
        ("[model\n", "is damaged"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_name(write, text, sentence):
    path = write(text)
    with pytest.raises(TimemixError, match=re.escape(sentence)) as error:
        options("--config", path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "nothing.toml"], "cannot read nothing.toml"),
        (["--config", "a", "--from", "b"], "--config a and --from b exclude one another"),
        (["--config=a", "--resume=b"], "--config a and --resume b exclude one another"),
        (["--from", "a", "--resume", "b"], "--from a and --resume b exclude one another"),
        (["seed", "--from", "a"], "--from a has its own settings; leave out the preset 'seed'"),
        (["seed", "--resume", "a"], "--resume a has its own settings; leave out the preset 'seed'"),
        (["sead", "--config", "run.toml"], "unknown preset 'sead'; did you mean 'seed'?"),
        (["--data", "my.txt", "seed"], "unexpected argument 'seed'; a preset comes before all options"),
        (["--data", "my", "file.txt"], "unexpected argument 'file.txt'; see timemix train --help"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(arguments, sentence, write, monkeypatch, tmp_path):
    write("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TimemixError, match=re.escape(sentence)):
        options(*arguments)


def test_a_run_again_from_its_own_file(tmp_path, monkeypatch):
    """Same settings, same text: same weights. With another text, the vocabulary is that of the text."""
    monkeypatch.chdir(tmp_path)
    run = small_trainer(tmp_path)
    run.run()
    assert call("train", "--config", "run/config.toml", "--out", "again") == 0
    assert Path("again/config.toml").read_text() == Path("run/config.toml").read_text()
    weights = [Path(f"{name}/checkpoints/step-00000008/model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]
    Path("other.txt").write_text(TEXT.upper() + "0123456789" * 40)
    flags = ["--data", "other.txt", "--train.steps", "2", "--model.arch", "mha_shift"]
    assert call("train", "--config", "run/config.toml", "--out", "other", *flags) == 0
    old, new = (read_toml(Path(name) / "config.toml") for name in ("run", "other"))
    assert (new.model.arch, new.model.channels, new.train.steps) == ("mha_shift", old.model.channels, 2)
    assert new.model.vocab_size > old.model.vocab_size


def test_a_file_of_a_run_with_a_start_starts_there_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_trainer(tmp_path).run()
    assert call("train", "--from", "run", "--out", "next", "--train.steps", "2") == 0
    assert call("train", "--config", "next/config.toml", "--out", "again") == 0
    assert read_toml(Path("again/config.toml")) == read_toml(Path("next/config.toml"))
    assert Path("again/checkpoints/step-00000002").exists()
    capsys.readouterr()
    for option in ("--data.vocabulary", "--data.vocab_size"):
        assert call("train", "--from", "run", "--out", "x", option, "300") == 2
        flag = option.replace("_", "-")
        assert f"{flag} has no effect with --from, whose model has its own vocabulary" in capsys.readouterr().err
    assert call("train", "--from", "run", "--out", "x", "--model.arch", "mha_pro") == 2
    assert "--model.arch='mha_pro' differs from 'rwkv1' in run" in capsys.readouterr().err


def test_the_advice_about_a_path_in_place_of_a_preset_is_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_trainer(tmp_path, name="my run").run()
    Path("my text.txt").write_text(TEXT)
    for path, advice in (
        ("my run", "timemix train --resume 'my run'"),
        ("my run/config.toml", "timemix train --config 'my run/config.toml' --out RUN"),
        ("my text.txt", "timemix train --data 'my text.txt' --out RUN"),
    ):
        assert call("train", path, "--out", "r") == 2
        assert capsys.readouterr().err.rstrip().endswith(advice)


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code
