"""How options are read and shown: absent ones, the word None, lists."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from timemix.cli.compare import CompareArguments
from timemix.cli.convert import ConvertArguments
from timemix.cli.data import DataArguments
from timemix.cli.eval import EvalArguments
from timemix.cli.inspect import InspectArguments
from timemix.cli.main import main
from timemix.cli.options import parse
from timemix.cli.plot import PlotArguments
from timemix.cli.sample import SampleArguments
from timemix.cli.train import train_options
from timemix.config.presets import DEFAULT_PRESET, preset
from timemix.errors import InvalidValue
from timemix.models.registry import ARCHITECTURES

# Verb, its options, and the arguments that it cannot do without.
VERBS = [
    ("eval", EvalArguments, ["RUN"]),
    ("compare", CompareArguments, []),
    ("convert", ConvertArguments, ["RUN", "--constant-state", "2", "--out", "OUT"]),
    ("data", DataArguments, []),
    ("inspect", InspectArguments, ["RUN"]),
    ("plot", PlotArguments, ["RUN"]),
]


def optional(kind):
    """Options of a verb that may be absent and take any text or path."""
    named = {field.name: str(field.type) for field in fields(kind) if field.default is None}
    named = {name: words for name, words in named.items() if "Literal" not in words and "tuple" not in words}
    return [name for name, words in named.items() if "str" in words or "Path" in words]


@pytest.mark.parametrize(
    ("verb", "kind", "needed", "name"),
    [(verb, kind, needed, name) for verb, kind, needed in VERBS for name in optional(kind)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_word_none_is_a_value_like_any_other(verb, kind, needed, name):
    assert getattr(parse(kind, needed, verb), name) is None
    positional = name in ("experiment", "source")
    given = ["None"] if positional else [f"--{name.replace('_', '-')}", "None"]
    assert str(getattr(parse(kind, [*needed, *given], verb), name)) == "None"


def test_the_word_none_is_no_number():
    with pytest.raises(InvalidValue, match="--stride is 'None'; it must be a whole number"):
        parse(EvalArguments, ["RUN", "--stride", "None"], "eval")


def test_a_list_given_twice_is_refused():
    """The parser would keep only the last list. Of a single value, the last one counts, as in other commands."""
    for arguments in (["--stop", "a", "--stop", "b"], ["--stop=a", "--tokens", "3", "--stop", "b", "c"]):
        with pytest.raises(InvalidValue, match="--stop is given twice; write all its values after one --stop"):
            parse(SampleArguments, ["RUN", *arguments], "sample")
    assert parse(SampleArguments, ["RUN", "--stop", "a", "b"], "sample").sampling.stop == ("a", "b")
    assert parse(SampleArguments, ["RUN", "--tokens", "3", "--tokens", "4"], "sample").sampling.tokens == 4
    with pytest.raises(InvalidValue, match="--tasks is given twice"):
        parse(CompareArguments, ["recall", "--tasks", "a", "--tasks", "b"], "compare")


@dataclass(frozen=True)
class Lists:
    """Options that take any number of values."""

    numbers: tuple[int, ...] = (1, 2)
    """Numbers."""
    paths: tuple[Path, ...] = ()
    """Paths."""
    pair: tuple[float, float] = (0.5, 1.5)
    """A pair."""
    few: tuple[float, ...] | None = None
    """A list or none. Default: the numbers."""


def test_lists_are_read_as_tuples():
    words = ["--numbers", "3", "4", "5", "--paths", "a", "--pair", "1", "2", "--few", "0.5", "0.25"]
    assert parse(Lists, words, "lists") == Lists((3, 4, 5), (Path("a"),), (1.0, 2.0), (0.5, 0.25))
    assert parse(Lists, ["--numbers"], "lists") == Lists(())
    assert parse(Lists, [], "lists") == Lists()


def test_help_shows_lists_and_absent_values_in_plain_words(capsys):
    with pytest.raises(SystemExit):
        parse(Lists, ["--help"], "lists")
    lines = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for shown in (
        "--numbers INT ... Numbers. (default: 1 2)",
        "--paths PATH ... Paths. (default: none)",
        "--pair FLOAT FLOAT A pair. (default: 0.5 1.5)",
        "--few FLOAT ... A list or none. (default: the numbers)",
    ):
        assert shown in lines


@pytest.mark.parametrize("verb", ["train", "eval", "compare", "convert", "inspect", "plot", "data", "bench op", "info"])
def test_no_help_shows_types_of_python(capsys, verb):
    with pytest.raises(SystemExit) as end:
        main([*verb.split(), "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for notation in ("None", "[[", "]]"):
        assert notation not in out


def test_an_absent_option_keeps_the_settings_of_every_architecture():
    for arch in ARCHITECTURES:
        asked = train_options(["--out", "RUN", "--model.arch", arch])
        assert asked.model == preset(DEFAULT_PRESET, arch).model


def test_the_help_of_compare_names_the_settings_of_all_variants(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "below [base] changes a setting of all variants, such as model.channels = 256" in out
    assert "set.model.channels = 64" in out
