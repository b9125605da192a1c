"""What the verbs of the command line share: reading options, naming a preset, printing a report."""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from timemix.config.presets import preset
from timemix.config.run import RunConfig
from timemix.errors import InvalidValue

if TYPE_CHECKING:
    from timemix.tokenizers.base import Tokenizer


Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], arguments: Sequence[str], verb: str, default: Arguments | None = None) -> Arguments:
    """Options of a verb as a dataclass; tyro prints help and what is wrong with them, and exits.

    Raises InvalidValue for a value that a setting refuses.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = tyro.cli(
                kind,
                prog=f"timemix {verb}",
                args=list(arguments),
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        # tyro prints the ValueErrors of a dataclass in a form of its own.
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, InvalidValue):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(printed.getvalue())
        raise
    assert parsed is not None
    return parsed


def preset_of(arguments: list[str], default: str) -> tuple[RunConfig, list[str]]:
    """The preset named first, or `default`, for the architecture of --model.arch; and the other arguments."""
    name = default
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    arch = "rwkv1"
    for i, argument in enumerate(arguments):
        if argument == "--model.arch" and i + 1 < len(arguments):
            arch = arguments[i + 1]
        elif argument.startswith("--model.arch="):
            arch = argument.partition("=")[2]
    return preset(name, arch), arguments


def print_report(report: dict[str, Any]) -> None:
    """Names and values, one a line."""
    for name, value in report.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for part, each in rows:
            label = f"{name.replace('_', ' ')} {part}"
            print(f"{label:<32}{f'{each:,}' if isinstance(each, int) else each}")


def default_prompt(tokenizer: "Tokenizer") -> str:
    """A line end, or the first token where the vocabulary has none."""
    ids, _ = tokenizer.encode_lenient("\n")
    return "\n" if len(ids) else tokenizer.decode([0])
