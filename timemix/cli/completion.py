"""The verb completion: a script with which a shell completes verbs, options and their values."""

import contextlib
import functools
import importlib
import io
import operator
from collections.abc import Iterable
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from timemix.cli.bench import VERBS as BENCH_VERBS
from timemix.cli.main import VERBS
from timemix.cli.options import Choice, option_types, parse
from timemix.cli.train import TrainArguments


@dataclass(frozen=True)
class CompletionArguments:
    """Print a script with which a shell completes verbs, options and their values.

    - bash: eval "$(timemix completion bash)", in ~/.bashrc
    - zsh: timemix completion zsh > FOLDER/_timemix, where FOLDER is in $fpath
    - fish: timemix completion fish > ~/.config/fish/completions/timemix.fish
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Shell."""


_FILES_IN_BASH = """
# Where neither an option nor a value fits, a file does.
_timemix() {
  _tyro_timemix
  [ -n "${COMPREPLY[*]}" ] || COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o filenames -F _timemix timemix
"""


def completion(arguments: list[str]) -> int:
    parsed = parse(CompletionArguments, arguments, "completion")
    printed = io.StringIO()
    # tyro prints the script and exits.
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(
            _one_of(_verb(name) for name in VERBS),
            prog="timemix",
            args=["--tyro-print-completion", parsed.shell],
            registry=option_types(),
        )
    print(printed.getvalue() + (_FILES_IN_BASH if parsed.shell == "bash" else ""), end="")
    return 0


def _one_of(kinds: Iterable[Any]) -> Any:
    return functools.reduce(operator.or_, kinds)


def _verb(name: str) -> Any:
    """Return a verb as a subcommand of tyro: the dataclass of its options, under its name."""
    if name == "train":
        resumable = make_dataclass(
            "TrainArguments", [("resume", Path | None, None)], bases=(TrainArguments,), frozen=True
        )
        model = Choice().preset_config().model
        return Annotated[resumable, tyro.conf.subcommand(name, default=resumable(out=tyro.MISSING, model=model))]
    if name == "bench":
        kinds = _one_of(Annotated[_options(name, verb), tyro.conf.subcommand(verb)] for verb in BENCH_VERBS)
        return Annotated[
            make_dataclass("BenchArguments", [("verb", Annotated[kinds, tyro.conf.arg(name="")])]),
            tyro.conf.subcommand(name),
        ]
    return Annotated[_options(name), tyro.conf.subcommand(name)]


def _options(module: str, verb: str = "") -> Any:
    name = f"{module.capitalize()}{verb.capitalize()}Arguments"
    return getattr(importlib.import_module(f"timemix.cli.{module}"), name)
