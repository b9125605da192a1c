"""What the verbs of the command line share: the first parse, options as dataclasses, printing of a report."""

import argparse
import contextlib
import inspect
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

from timemix.cli.terminal import readable_help, without_colors
from timemix.config.presets import DEFAULT_PRESET, PRESETS, preset
from timemix.config.run import RunConfig
from timemix.data.config import DataConfig
from timemix.errors import InvalidValue
from timemix.models.registry import ARCHITECTURES, DEFAULT_ARCHITECTURE

Arguments = TypeVar("Arguments")

PresetName = Annotated[
    str | None,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="[PRESET]",
        help=f"Preset, before all options: {', '.join(PRESETS)}.",
        help_behavior_hint=f"(default: {DEFAULT_PRESET})",
    ),
]
"""Type of the option `preset`."""


@dataclass(frozen=True)
class Choice:
    """The options that decide the class and the defaults of all others."""

    preset: str | None = None
    config: Path | None = None
    from_: Path | None = None
    resume: Path | None = None
    arch: str | None = None

    def preset_config(self) -> RunConfig:
        """Return the settings of the preset for the architecture."""
        return preset(self.preset or DEFAULT_PRESET, self.arch or DEFAULT_ARCHITECTURE)


def first_parse(arguments: Sequence[str]) -> Choice:
    """Read the deciding options and ignore all others; what is wrong with any of them is left to `parse`."""
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
    """Options of a verb as a dataclass; tyro prints help and what is wrong with them, and exits.

    `choice`: of the first parse, for a dataclass with a field `preset`. Raises InvalidValue for a value that a
    setting refuses, and for a preset that stands where the first parse did not see it.
    """
    words = inspect.cleandoc(kind.__doc__ or "")
    if choice is not None:
        known = "\n".join(f"- {each.name} ({each.year}): {each.summary}" for each in ARCHITECTURES.values())
        words += f"\n\nArchitectures of --model.arch, on which the options of the model depend:\n\n{known}"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), readable_help():
            parsed = tyro.cli(
                kind,
                prog=f"timemix {verb}",
                description=words,
                args=list(arguments),
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
                registry=option_types(),
            )
    except SystemExit as stop:
        # tyro prints the ValueErrors of a dataclass in a form of its own.
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, InvalidValue):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        said = printed.getvalue()
        sys.stderr.write(said if sys.stderr.isatty() else without_colors(said))
        raise
    assert parsed is not None
    if choice is not None and (late := vars(parsed)["preset"]) != choice.preset:
        raise InvalidValue(
            f"unexpected argument {late!r}; a preset comes before all options: timemix {verb} PRESET ..."
        )
    return parsed


def option_types() -> ConstructorRegistry:
    """Return how options are read and shown where tyro's own way misleads."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_optional)
    registry.primitive_rule(_any_number_of)
    return registry


def _spec(kind: Any, info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError:
    return ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """`T | None` is read as T: None stands for an absent option, and the word None is a value like any other."""
    kinds = typing.get_args(info.type)
    if info.type_origin not in (types.UnionType, typing.Union) or types.NoneType not in kinds:
        return None
    spec = _spec(typing.Union[tuple(kind for kind in kinds if kind is not types.NoneType)], info)  # noqa: UP007
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    return replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["unset"] if value is None else spec.str_from_instance(value),
    )


def _any_number_of(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """`tuple[T, ...]` is shown as `T ...`."""
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
    """Text, its split, and how it becomes tokens."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"])] = DataConfig.source
    """A file, folder, glob, prepared folder, `-` (standard input), `builtin`, or a download (`timemix data --help`)."""

    @classmethod
    def of(cls, config: DataConfig) -> "DataOptions":
        """Return the options whose defaults are these settings."""
        return cls(**vars(config))

    def config(self) -> DataConfig:
        """Return the settings."""
        return DataConfig(**vars(self))


def print_report(report: dict[str, Any]) -> None:
    """Names and values, one a line."""
    for name, value in report.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for part, each in rows:
            label = f"{name.replace('_', ' ')} {part}"
            print(f"{label:<32}{f'{each:,}' if isinstance(each, int) else each}")
