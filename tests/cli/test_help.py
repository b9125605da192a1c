"""The help of every verb: examples that work, help texts, groups, and sentences for options that are wrong."""

import re
import shlex
import time
import typing
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.commands import run_command
from tests.helpers.runs import small_trainer
from timemix.cli import bench, main, options
from timemix.cli.bench import VERBS as BENCH_VERBS
from timemix.cli.flags import _TRAIN_GROUPS, MOST_USED, examples, options_class, options_of, verb_name, view
from timemix.cli.main import EXAMPLES, GROUPS, VERBS
from timemix.cli.options import Choice
from timemix.cli.train import ResumeArguments, TrainArguments
from timemix.config.run import TrainConfig
from timemix.data.config import DataConfig
from timemix.errors import InvalidValue
from timemix.models.registry import ARCHITECTURES

KINDS = {verb: options_class(verb) for verb in VERBS if verb != "bench"}
KINDS |= {f"bench {verb}": options_class("bench", verb) for verb in BENCH_VERBS}
KINDS["train --resume"] = ResumeArguments


def all_options():
    """Options of every verb, and of every architecture."""
    for verb, kind in KINDS.items():
        yield from ((verb, option) for option in options_of(kind))
    for arch, each in ARCHITECTURES.items():
        yield from ((arch, option) for option in options_of(each.config))


class Parsed(Exception):
    """The options of a verb are right."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the run `runs/mine` and the text `my.txt`."""
    monkeypatch.chdir(tmp_path)
    small_trainer(tmp_path).run()
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename("runs/mine")
    return tmp_path


@pytest.fixture
def only_parse(monkeypatch):
    """Have every verb end after its options."""

    def parse(*arguments):
        options_of_verb(*arguments)
        raise Parsed

    options_of_verb = options.parse
    for verb in VERBS:
        module = __import__(f"timemix.cli.{verb_name(verb)}", fromlist=["parse"])
        monkeypatch.setattr(module, "parse", parse)


def words_of(example):
    """Arguments of an example after `timemix`, without what belongs to the shell or to torchrun."""
    words = shlex.split(example.partition(" > ")[0])
    return words[words.index("timemix") + 1 :]


@pytest.mark.parametrize("verb", KINDS)
def test_every_verb_ends_its_help_with_examples_that_parse(verb, folder, only_parse):
    found = examples(KINDS[verb])
    assert len(found) >= 2
    for example in found:
        arguments = words_of(example)
        assert arguments[: len(verb.split())] == verb.split()
        with pytest.raises(Parsed):
            main.main(arguments)


def test_the_examples_of_the_lists_of_verbs_parse(folder, only_parse):
    for example in (*EXAMPLES, *re.findall(r"^  (timemix .*)$", bench.usage(), re.MULTILINE)):
        with pytest.raises(Parsed):
            main.main(words_of(example))


def test_the_help_prints_the_examples_at_its_end(capsys):
    call = partial(run_command, capsys)
    for verb, kind in KINDS.items():
        if verb != "train --resume":
            status, out, err = call(*verb.split(), "--help")
            assert (status, err) == (0, "")
            assert out.endswith("\nexamples:\n" + "".join(f"  {each}\n" for each in examples(kind)))


def test_the_list_of_verbs_is_grouped_and_names_the_documentation(capsys):
    _, out, _ = run_command(capsys)
    assert list(GROUPS) == ["start", "train", "use", "compare", "tools"]
    assert [line for line in out.splitlines() if line.endswith(":")] == [
        *(f"{title}:" for title in GROUPS),
        "examples:",
    ]
    assert "docs/index.md" in out.splitlines()[-1]


def test_every_option_has_a_help_text():
    for verb, option in all_options():
        assert option.help.endswith("."), (verb, option.name)
        assert option.help[0].isupper() or option.help.startswith("torch.compile"), (verb, option.name)


def test_an_option_without_a_value_says_what_happens():
    for verb, option in all_options():
        if option.default is None:
            assert "Default: " in option.help, (verb, option.name)


def test_a_help_text_names_only_options_that_exist():
    known = {name for _, option in all_options() for name in option.names}
    known |= {
        f"--model.{field.name.replace('_', '-')}" for each in ARCHITECTURES.values() for field in fields(each.config)
    }
    for verb, option in all_options():
        assert set(re.findall(r"--[a-z][\w.-]*\w", option.help)) <= known | {"--help"}, (verb, option.name)


NUMBERS = [
    pytest.param(kind, option, id=f"{kind.__name__}.{option.path[0]}")
    for kind in (TrainConfig, DataConfig, *(each.config for each in ARCHITECTURES.values()))
    for option in options_of(kind)
    if re.search(r"\b(int|float)\b", str(option.kind)) and option.flag != "steps"
]


def refusal(kind, option, value):
    """The message with which a config refuses a value of this option; empty if the config accepts the value."""
    try:
        kind(**{option.path[0]: (value, value) if "tuple" in str(option.kind) else value})
    except InvalidValue as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("kind", "option"), NUMBERS)
def test_the_ranges_in_help_texts_are_those_of_the_checks(kind, option):
    """The help names the smallest value: the config accepts this value, and refuses a smaller one."""
    found = re.search(r"(at least|above|from(?= \d[^,;(]* to\b)) (\d+)", option.help)
    assert found, option.help
    least, is_excluded = int(found[2]), found[1] == "above"
    names_option = re.compile(rf"(\w+\.)?{option.path[0]}\b")
    assert names_option.match(refusal(kind, option, least if is_excluded else least - 1))
    if not is_excluded:
        # The message names another setting if the value does not fit the default value of that setting.
        assert not names_option.match(refusal(kind, option, least))


@pytest.mark.parametrize(("verb", "flag"), [("convert", "--constant-state"), ("convert", "--taps")])
def test_the_ranges_that_a_run_determines(verb, flag, capsys, folder):
    """The help and the error name the same smallest and largest value: 16 is the ctx_len of the run."""
    (words,) = (option.help for option in options_of(KINDS[verb]) if option.name == flag)
    least = int(re.search(r"from (\d) to the ctx_len of the run", words)[1])
    required = [] if flag == "--constant-state" else ["--constant-state", "2"]
    for value in (least - 1, 17):
        status, _, err = run_command(capsys, verb, "runs/mine", *required, flag, value, "--out", "r")
        assert (status, err) == (
            2,
            f"timemix: {flag} is {value}; it must be from {least} to the run's ctx_len, 16\n",
        )


def test_a_resumed_run_takes_the_options_that_its_help_names_first(folder, capsys):
    values = {"train.steps": 9, "train.lr": 0.001}
    assert {"resume", *values} == set(ResumeArguments.most_used)
    for flag, value in values.items():
        status, _, err = run_command(capsys, "train", "--resume", "runs/mine", f"--{flag}", value)
        assert status == 0, err


def test_the_help_of_a_choice_names_each_value():
    (backend,) = (option for option in options_of(ARCHITECTURES["rwkv1"].config) if option.flag == "backend")
    for name in typing.get_args(backend.kind):
        assert f"`{name}`" in backend.help


def test_the_groups_of_train_hold_each_option_once():
    model = Choice().preset_config().model
    default = TrainArguments(out=Path("r"), model=model)
    groups = view(TrainArguments, default).__dataclass_fields__
    names = [name for key, each in groups.items() for name in ([key] if key[:6] != "group_" else _names(each))]
    assert sorted(names) == sorted("__".join(option.path) for option in options_of(TrainArguments, default))
    assert {name for each in _TRAIN_GROUPS.values() for name in each} <= {field.name for field in fields(TrainConfig)}


def _names(group):
    return list(group.type.__origin__.__dataclass_fields__)


def test_the_ten_options_that_people_use_first_are_the_first_group(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    began = time.process_time()
    _, out, _ = run_command(capsys, "train", "--help")
    assert time.process_time() - began < 1
    # Without a terminal, the boxes are lines of ASCII.
    titles = re.findall(r"^ (\S.*)\n -{5,}$", out, re.MULTILINE)
    assert titles == [
        "positional arguments",
        "options",
        f"{MOST_USED} options",
        "model options",
        "data options",
        "optimization options",
        "schedule and length options",
        "saving and reporting options",
        "devices and processes options",
    ]
    first = out.partition(MOST_USED)[2].partition("\n model options\n")[0]
    assert re.findall(r"^  (--[a-z][\w.-]+)", first, re.MULTILINE) == [
        "--data",
        "--out",
        "--resume",
        "--from",
        "--model.arch",
        "--model.layers",
        "--model.ctx-len",
        "--train.steps",
        "--train.seconds",
        "--train.lr",
    ]


def test_the_help_fits_the_width(capsys, monkeypatch):
    for columns in (60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        for verb in ("train", "data", "compare", "convert"):
            out = run_command(capsys, verb, "--help")[1].partition("\narchitectures ")[0].partition("\nexamples:")[0]
            assert max(map(len, out.splitlines())) <= columns


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train --out r --lr 1", "unknown option '--lr'; did you mean '--train.lr'?"),
        ("train --out r --ctx-len 1", "unknown option '--ctx-len'; did you mean '--model.ctx-len'?"),
        ("train --out r --model.alph=3", "unknown option '--model.alph'; did you mean '--model.alpha'?"),
        (
            "train --out r --model.kv-heads 2",
            "unknown option '--model.kv-heads' for --model.arch rwkv1; leave it out, or choose an architecture with"
            " this option: llama",
        ),
        (
            "train --out r --model.arch llama --model.no-alpha",
            "unknown option '--model.no-alpha' for --model.arch llama; leave it out, or choose an architecture with"
            " this option: rwkv1, rwkv1_exp, mha_pro",
        ),
        ("compare heads --model.ctx-len 2", "unknown option '--model.ctx-len'; see timemix compare --help"),
        ("train --ou r", "unknown option '--ou'; did you mean '--out'?"),
        ("eval r -x", "unknown option '-x'; see timemix eval --help"),
        ("train --out", "--out needs a value; see timemix train --help"),
        ("train --data --out r", "--data needs a value; see timemix train --help"),
        ("train --out r --train.betas 1", "--train.betas needs 2 values; see timemix train --help"),
        ("train --out r --train.betas 1 x", "--train.betas is '1 x'; it must be two numbers"),
        ("train --out r --train.lr 1,5", "--train.lr is '1,5'; it must be a number"),
        ("eval r --weights int9", "--weights is 'int9'; did you mean 'int8'?"),
        ("eval r --precision half", "--precision is 'half'; known: auto, float32, bfloat16"),
        ("completion csh", "SHELL is 'csh'; did you mean 'zsh'?"),
        ("convert r --out s --constant-state 1.5", "--constant-state is '1.5'; it must be one or more whole numbers"),
        ("sample", "missing RUN (run folder); see timemix sample --help"),
        (
            "convert r",
            "missing --constant-state (number K of exponentials per curve) and --out (new folder for the run);"
            " see timemix convert --help",
        ),
        ("data a b", "unexpected argument 'b'; see timemix data --help"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert run_command(capsys, *arguments.split()) == (2, "", f"timemix: {sentence}\n")
