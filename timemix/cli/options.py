"""Code that all command-line verbs share: the first parse, options as dataclasses, printing of a report."""

import argparse
import contextlib
import io
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from timemix.cli.flags import built, description, examples, options_of, view
from timemix.cli.parse_errors import sentence
from timemix.cli.terminal import WIDE, Captured, readable_help, wrapped
from timemix.config.presets import DEFAULT_PRESET, PRESETS, preset
from timemix.config.run import RunConfig
from timemix.data.config import DataConfig
from timemix.errors import InvalidValue
from timemix.models.registry import ARCHITECTURES

Arguments = TypeVar("Arguments")

PresetName = Annotated[
    str | None,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="[PRESET]",
        help=f"Preset, written before all options: {', '.join(PRESETS)}. Default: {DEFAULT_PRESET}.",
    ),
]
"""Type of the option `preset`."""

RunFolder = Annotated[
    Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Run folder, or one of its checkpoints.")
]
"""Type of the option `run`."""


@dataclass(frozen=True)
class Choice:
    """The options that decide the class and the default values of all other options."""

    preset: str | None = None
    config: Path | None = None
    from_: Path | None = None
    resume: Path | None = None
    arch: str | None = None

    def preset_config(self) -> RunConfig:
        """Return the settings of the preset for the architecture."""
        return preset(self.preset or DEFAULT_PRESET, self.arch)


def first_parse(arguments: Sequence[str]) -> Choice:
    """Read the options that decide the class and the default values of all other options.

    The function `parse` reports errors in these options.
    """
    named = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, name in (("--config", "config"), ("--from", "from_"), ("--resume", "resume")):
        first.add_argument(flag, dest=name, type=Path, nargs="?")
    first.add_argument("--model.arch", dest="arch", nargs="?")
    found, _ = first.parse_known_args(arguments[len(named) :])
    return Choice(preset=named[0] if named else None, **vars(found))


def parse(
    kind: type[Arguments],
    arguments: Sequence[str],
    verb: str,
    default: Arguments | None = None,
    choice: Choice | None = None,
) -> Arguments:
    """Return the options of a command-line verb, or print the help and exit if the arguments ask for help.

    Args:
        kind: Dataclass of the options. The docstring of the dataclass is the description, and ends with a section
            `Examples:`.
        arguments: The arguments after the command-line verb.
        verb: Command-line verb, such as "train" or "bench op".
        default: Instance that gives the default values. Default: the default values of the class.
        choice: Result of the first parse, for a dataclass with a field `preset`.

    Raises:
        InvalidValue: An option is unknown, missing or has a wrong value, a preset comes after an option, or an option
            with a list of values is given twice.
    """
    wants_help = bool({"-h", "--help"} & set(arguments))
    refusal = io.StringIO()
    # The function `sentence` reads the error box of tyro, and expects a Unicode box without colours.
    is_terminal, encoding = (sys.stdout.isatty(), sys.stdout.encoding) if wants_help else (False, "utf-8")
    help_ = Captured(is_terminal=is_terminal, encoding=encoding)
    try:
        with (
            contextlib.redirect_stdout(help_),
            contextlib.redirect_stderr(refusal),
            readable_help(None if wants_help else WIDE),
        ):
            parsed = tyro.cli(
                view(kind, default),
                prog=f"timemix {verb}",
                description=description(kind),
                args=list(arguments),
                registry=option_types(),
            )
    except SystemExit as stop:
        if not stop.code:
            print(wrapped(help_.getvalue()).rstrip("\n"))
            print(_end_of_help(kind, has_architectures=choice is not None))
            raise
        raise InvalidValue(sentence(refusal.getvalue(), verb, list(options_of(kind, default)))) from None
    _refuse_repeated_lists(kind, arguments, default)
    asked = built(kind, default, parsed)
    if choice is not None and (late := vars(asked)["preset"]) != choice.preset:
        way = f"see timemix {verb} --help"
        if late in PRESETS:
            way = f"a preset comes before all options: timemix {verb} PRESET ..."
        raise InvalidValue(f"unexpected argument {late!r}; {way}")
    return typing.cast(Arguments, asked)


def _refuse_repeated_lists(kind: type[Any], arguments: Sequence[str], default: Any) -> None:
    """Refuse an option with a list of values that is given twice, because the parser would drop the first list."""
    given = [each.partition("=")[0].replace("_", "-") for each in arguments]
    for option in options_of(kind, default):
        if _is_list(option.kind) and sum(name in option.names for name in given) > 1:
            raise InvalidValue(f"{option.name} is given twice; write all its values after one {option.name}")


def _is_list(kind: Any) -> bool:
    """Return whether a type, or a part of it, is a tuple of any length."""
    return any(each is ... or _is_list(each) for each in typing.get_args(kind))


def _end_of_help(kind: type[Any], *, has_architectures: bool) -> str:
    """Return the end of the help: a list of the architectures if `has_architectures`, and the examples."""
    words = "\nexamples:\n" + "\n".join(f"  {each}" for each in examples(kind))
    if not has_architectures:
        return words
    width = max(map(len, ARCHITECTURES))
    known = (f"  {each.name:<{width}}  {each.summary} ({each.year})" for each in ARCHITECTURES.values())
    return "\narchitectures (--model.arch), each with model options of its own:\n" + "\n".join(known) + "\n" + words


def option_types() -> ConstructorRegistry:
    """Return rules for optional values and tuples, for which tyro's own rules are misleading."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_optional)
    registry.primitive_rule(_any_number_of)
    return registry


def _spec(kind: Any, info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError:
    return ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """Read `T | None` as T: None stands for an absent option, and the word None is a value like any other word."""
    kinds = typing.get_args(info.type)
    if info.type_origin not in (types.UnionType, typing.Union) or types.NoneType not in kinds:
        return None
    spec = _spec(typing.Union[tuple(kind for kind in kinds if kind is not types.NoneType)], info)  # noqa: UP007
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    return replace(
        spec,
        metavar="COUNT" if kinds[:2] == (int, str) else spec.metavar,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["unset"] if value is None else spec.str_from_instance(value),
    )


def _any_number_of(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """Show `tuple[T, ...]` as `T ...`."""
    kinds = typing.get_args(info.type)
    if info.type_origin is not tuple or kinds[1:] != (...,):
        return None
    one, several = _spec(kinds[0], info), _spec(list[kinds[0]], info)  # type: ignore[valid-type]
    if isinstance(one, UnsupportedTypeAnnotationError) or isinstance(several, UnsupportedTypeAnnotationError):
        return None
    return replace(
        several,
        metavar=f"{one.metavar} ...",
        instance_from_str=lambda words: tuple(several.instance_from_str(words)),
        is_instance=lambda value: isinstance(value, tuple) and all(map(one.is_instance, value)),
        str_from_instance=lambda value: several.str_from_instance(list(value)) or ["none"],
    )


@dataclass(frozen=True)
class DataOptions(DataConfig):
    """Settings of the text, its split and its tokens, with --data as an alias of --data.source."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"])] = DataConfig.source

    @classmethod
    def of(cls, config: DataConfig) -> "DataOptions":
        """Return the options whose default values are the settings of `config`."""
        return cls(**vars(config))

    def config(self) -> DataConfig:
        """Return the settings."""
        return DataConfig(**vars(self))


def print_report(report: dict[str, Any]) -> None:
    """Print the names and values of a report, one per line."""
    for name, value in report.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for part, each in rows:
            label = f"{name} {part}".replace("_", " ")
            print(f"{label:<32}{f'{each:,}' if isinstance(each, int) else each}")


def refuse_text_options(arguments: Sequence[str]) -> None:
    """Refuse the options on how to read a text if the command line names no text.

    Args:
        arguments: Arguments of the verb, without `--data`.

    Raises:
        InvalidValue: An option has no effect.
    """
    for flag in ("--encoding", "--keep-nul", "--text-key"):
        if any(each.split("=")[0].replace("_", "-") in (flag, f"--data.{flag[2:]}") for each in arguments):
            raise InvalidValue(f"{flag} has no effect without --data; leave {flag} out, or add --data")


def refuse_template(template: str | None, data: str | None, text_key: str | None) -> None:
    """Refuse a chat template without a text, or with the key of a text.

    Args:
        template: Name of the template, or None.
        data: Source of the text, or None.
        text_key: Key of the text in records, or None.

    Raises:
        InvalidValue: `template` is given without `data` or with `text_key`.
    """
    if template is not None and (data is None or text_key is not None):
        way = "add --data" if data is None else "leave --text-key out"
        raise InvalidValue(f"--template is for the conversations of --data, which have no text key; {way}")
