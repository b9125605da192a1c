"""Command-line flags from a dataclass of options: names, help texts, and the groups that `--help` shows.

tyro shows one group for each dataclass. `view` therefore rebuilds the options as one dataclass for each group, and
`built` converts the parsed values to the original dataclass of options.
"""

import ast
import functools
import importlib
import inspect
import itertools
import keyword
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, Literal

import tyro

from timemix.models.registry import ARCHITECTURES

MOST_USED = "most used"

_REPORTING = "saving and reporting"

_TRAIN_GROUPS: dict[str, tuple[str, ...]] = {
    "optimization": (
        "batch_size",
        "lr",
        "optimizer",
        "weight_decay",
        "betas",
        "eps",
        "clip",
        "embedding_lr",
        "contexts",
        "accumulation",
        "seed",
    ),
    "schedule and length": (
        "steps",
        "seconds",
        "tokens",
        "epochs",
        "schedule",
        "lr_final",
        "warmup",
        "decay",
        "patience",
    ),
    _REPORTING: (),
    "devices and processes": ("device", "precision", "compile", "recompute", "strategy"),
}
"""The fields of TrainConfig by group. All other fields belong to `_REPORTING`."""

_DESCRIPTIONS = {
    MOST_USED: "The options that people use first. The groups below list all other options.",
    "data": "Text, split and tokenizer.",
    "optimization": "Batches, optimizer and seed.",
    "schedule and length": "Length of the run, and the learning rate over its steps.",
    _REPORTING: "Metrics, checkpoints, samples, loss spikes, hooks and trackers.",
    "devices and processes": "Device, precision, compilation, memory and torchrun.",
}

_GROUPS_IN_ORDER = (MOST_USED, "model", "data", *_TRAIN_GROUPS, "sampling")


@dataclass(frozen=True)
class Option:
    """One option of a command-line verb.

    Args:
        path: Names of the fields that lead to the option, such as ("train", "lr").
        flag: Name of the option without the leading dashes, such as "train.lr".
        kind: Type of the option, with the annotations of tyro.
        default: Default value; `tyro.MISSING` for a required option.
        help: Help text of the option.
        group: Title of the group of the option, or "" without a group.
    """

    path: tuple[str, ...]
    flag: str
    kind: Any
    default: Any
    help: str
    group: str

    @property
    def is_positional(self) -> bool:
        """Whether the option is given by its position alone."""
        return tyro.conf.Positional in typing.get_args(self.kind)

    @property
    def name(self) -> str:
        """Name of the option in a command: `--train.lr`, or the placeholder of a positional argument."""
        placeholders = (getattr(each, "metavar", None) for each in typing.get_args(self.kind))
        return next(filter(None, placeholders), self.flag.upper()) if self.is_positional else f"--{self.flag}"

    @property
    def names(self) -> list[str]:
        """All names of the option, with the aliases and the negative flag of a switch."""
        aliases = [name for each in typing.get_args(self.kind) for name in getattr(each, "aliases", None) or ()]
        *before, last = self.flag.split(".")
        negative = ["--" + ".".join([*before, f"no-{last}"])] if isinstance(self.default, bool) else []
        return [self.name, *aliases, *negative]


def verb_name(verb: str) -> str:
    """Return the name of the module and of the function of a verb: the verb, or `import_` for the keyword `import`."""
    return f"{verb}_" if keyword.iskeyword(verb) else verb


def options_class(module: str, verb: str = "") -> type[Any]:
    """Return the options dataclass of a command-line verb, such as `BenchOpArguments` for "bench" and "op"."""
    name = f"{module.capitalize()}{verb.capitalize()}Arguments"
    kind: type[Any] = getattr(importlib.import_module(f"timemix.cli.{verb_name(module)}"), name)
    return kind


def options_of(kind: type[Any], default: Any = None) -> Iterator[Option]:
    """Yield the command-line options of a dataclass, in the order of its fields.

    Args:
        kind: The dataclass of the options; fields that are dataclasses have options of their own.
        default: Instance that gives the default values. Default: the default values of the class.
    """
    yield from _options(kind, default, (), (), "")


def _options(
    kind: type[Any], default: Any, path: tuple[str, ...], prefix: tuple[str, ...], group: str
) -> Iterator[Option]:
    hints, texts = typing.get_type_hints(kind, include_extras=True), field_texts(kind)
    for each in fields(kind):
        value = _default_of(each, default)
        name = each.name.strip("_")
        here = (*path, each.name)
        if is_dataclass(value):
            is_prefixed = tyro.conf.OmitArgPrefixes not in typing.get_args(hints[each.name])
            yield from _options(type(value), value, here, (*prefix, name) if is_prefixed else prefix, group or name)
        else:
            flag = ".".join((*prefix, name)).replace("_", "-")
            own = Literal[tuple(ARCHITECTURES)] if flag == "model.arch" else hints[each.name]
            annotated = [words for part in typing.get_args(own) if (words := getattr(part, "help", None))]
            words = texts.get(each.name) or next(iter(annotated), "")
            yield Option(here, flag, own, value, words, _group_of(here, group))


def _default_of(each: Any, default: Any) -> Any:
    if default is not None:
        return getattr(default, each.name)
    if each.default_factory is not MISSING:
        return each.default_factory()
    return tyro.MISSING if each.default is MISSING else each.default


def _group_of(path: tuple[str, ...], group: str) -> str:
    if group not in ("train", "reporting"):
        return group
    return next((title for title, names in _TRAIN_GROUPS.items() if path[-1] in names), _REPORTING)


def view(kind: type[Any], default: Any = None) -> type[Any]:
    """Return the options of a command-line verb as a dataclass with a field for each group, for tyro.

    Args:
        kind: The dataclass of the options. The class variable `most_used`, if any, lists the flags of the first group
            in order.
        default: Instance that gives the default values. Default: the default values of the class.
    """
    most_used: tuple[str, ...] = getattr(kind, "most_used", ())
    groups: dict[str, list[Option]] = {}
    for option in options_of(kind, default):
        group = MOST_USED if option.flag in most_used else option.group
        groups.setdefault(group, []).append(option)
    if most_used:
        groups[MOST_USED].sort(key=lambda option: most_used.index(option.flag))
    rows: list[Any] = [_row(option) for option in groups.pop("", [])]
    order = {title: number for number, title in enumerate(_GROUPS_IN_ORDER)}
    for title in sorted(groups, key=lambda title: order.get(title, len(order))):
        group_kind: Any = make_dataclass(title.title().replace(" ", ""), map(_row, groups[title]), kw_only=True)
        words = _DESCRIPTIONS.get(title) or _summary(kind, default, groups[title][0].path[:-1])
        annotated = Annotated[group_kind, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name=title, help=words)]
        rows.append((f"group_{len(rows)}", annotated))
    made = make_dataclass(kind.__name__, rows, kw_only=True)
    made.__doc__ = description(kind)
    return made


def _row(option: Option) -> tuple[str, Any, Any]:
    """Return the field of an option in the dataclass of its group."""
    words, _, unset = option.help.partition("Default: ")
    config = tyro.conf.arg(
        name=option.flag,
        metavar=option.name if option.is_positional else None,
        help=words.strip(),
        help_behavior_hint="(required)" if option.default is tyro.MISSING else _hint(unset.removesuffix(".")),
    )
    return "__".join(option.path), Annotated[option.kind, config], field(default=option.default)


def _hint(unset: str) -> Callable[[str], str]:
    """Return the function that shows a default value: the text `unset` if it is not empty, otherwise the value."""

    def shown(label: str) -> str:
        return f"(default: {unset or {'True': 'on', 'False': 'off'}.get(label, label)})"

    return shown


def _summary(kind: type[Any], default: Any, path: tuple[str, ...]) -> str:
    """Return the first line of the docstring of the dataclass at a path of fields."""
    for name in path:
        each = next(each for each in fields(kind) if each.name == name)
        default = _default_of(each, default)
        kind = type(default)
    return inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]


def built(kind: type[Any], default: Any, parsed: Any) -> Any:
    """Return an instance of the options dataclass with the values of a parsed view.

    Args:
        kind: The dataclass of the options.
        default: The instance that gave the defaults of the view, or None.
        parsed: Instance of `view(kind, default)`.

    Raises:
        InvalidValue: The value of a setting is not valid.
    """
    values: dict[str, Any] = {}
    for name, value in vars(parsed).items():
        values |= vars(value) if name.startswith("group_") else {name: value}
    return _built(kind, default, values, "")


def _built(kind: type[Any], default: Any, values: dict[str, Any], prefix: str) -> Any:
    own = {}
    for each in fields(kind):
        name, value = f"{prefix}{each.name}", _default_of(each, default)
        own[each.name] = values[name] if name in values else _built(type(value), value, values, f"{name}__")
    return kind(**own)


def field_texts(kind: type[Any]) -> dict[str, str]:
    """Return the help text of each field of a dataclass: the string below the field in the class or a base class."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        texts |= _texts_in(each.__module__).get(each.__qualname__, {}) if is_dataclass(each) else {}
    return texts


@functools.cache
def _texts_in(module: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {each.name: dict(_texts_below(each.body)) for each in classes}


def _texts_below(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, below in itertools.pairwise(body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                yield name, " ".join(words.split())


_EXAMPLES = "\n\nExamples:\n"


def description(kind: type[Any]) -> str:
    """Return the docstring of a dataclass of options without its examples."""
    words = inspect.cleandoc(kind.__doc__ or "").partition(_EXAMPLES)[0]
    # tyro keeps a line break before any line that does not begin with a letter, such as a line with `-`.
    return re.sub(r"(?<!\n)\n(?![\n-])", " ", words)


def examples(kind: type[Any]) -> list[str]:
    """Return the commands of the section `Examples:` at the end of the docstring of a dataclass of options."""
    _, _, lines = inspect.cleandoc(kind.__doc__ or "").partition(_EXAMPLES)
    return [line.strip() for line in lines.splitlines() if line.strip()]
