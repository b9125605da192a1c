"""The command-line verb completion: print a script with which a shell completes verbs, options and values."""

import contextlib
import functools
import io
import operator
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, make_dataclass
from typing import Annotated, Any, Literal

import tyro

from timemix.cli.bench import VERBS as BENCH_VERBS
from timemix.cli.flags import options_class, view
from timemix.cli.main import VERBS
from timemix.cli.options import Choice, option_types, parse


@dataclass(frozen=True)
class CompletionArguments:
    """Print a script with which a shell completes command-line verbs, options and values.

    - bash: add the line  eval "$(timemix completion bash)"  to ~/.bashrc
    - zsh: save the script as _timemix in a folder of $fpath
    - fish: save the script as ~/.config/fish/completions/timemix.fish

    Examples:
        timemix completion bash > ~/.timemix-completion.bash
        timemix completion fish > ~/.config/fish/completions/timemix.fish
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Shell that runs the script."""


_FILES_IN_BASH = """
# If neither an option nor a value fits, complete a file name.
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
    """Return a command-line verb as a subcommand of tyro, with the options of the verb."""
    if name == "bench":
        kinds = _one_of(Annotated[_view(name, verb), tyro.conf.subcommand(verb)] for verb in BENCH_VERBS)
        return Annotated[
            make_dataclass("BenchArguments", [("verb", Annotated[kinds, tyro.conf.arg(name="")])]),
            tyro.conf.subcommand(name),
        ]
    return Annotated[_view(name), tyro.conf.subcommand(name)]


def _view(module: str, verb: str = "") -> type[Any]:
    kind = options_class(module, verb)
    has_model = "model" in kind.__dataclass_fields__
    required = {f.name: tyro.MISSING for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    # If the model options depend on the architecture, complete the options of the default architecture.
    default = kind(**required, model=Choice().preset_config().model) if has_model else None
    return view(kind, default)
