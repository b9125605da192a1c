"""The messages of tyro about wrong options, as one sentence in the style of all other error messages."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from timemix.cli.flags import Option, options_of
from timemix.errors import nearest
from timemix.models.registry import ARCHITECTURES

_KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "INT ...": "one or more whole numbers",
    "FLOAT ...": "one or more numbers",
    "FLOAT FLOAT": "two numbers",
}


def sentence(printed: str, verb: str, options: Sequence[Option]) -> str:
    """Return the error message that tyro printed as one sentence.

    Args:
        printed: The box that tyro printed, without colours, at a width that wraps no line.
        verb: Command-line verb, such as "train" or "bench op".
        options: All options of the command-line verb.
    """
    sections = _sections(printed)
    words, see = " ".join(sections[0]), f"see timemix {verb} --help"
    # If options are missing, tyro lists unknown options in a separate section.
    unknown = next((lines[1:] for lines in sections if lines[0] == "Unrecognized options:"), None)
    if found := re.match(r"Unrecognized options: (.*)", words):
        unknown = found[1].split(", ")
    if unknown:
        return _unknown(unknown[0], options, see)
    if words.startswith("Missing from"):
        first_words = {line.split()[0] for line in sections[0][1:]}
        missing = [option for option in options if option.name.split()[0] in first_words]
        return f"missing {' and '.join(map(_described, missing))}; {see}"
    if found := re.match(r"Missing value for argument '(\S+)'\. Expected (\d+)", words):
        return f"{_flag(found[1])} needs {'a value' if found[2] == '1' else f'{found[2]} values'}; {see}"
    if found := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", words):
        return f"{_flag(found[2])} is {found[1]!r}{nearest(found[1], _quoted(found[3]))}"
    if found := re.match(r"Error parsing (\S+?):? (.*)", words):
        return f"{_flag(found[1])} is {' '.join(_quoted(found[2]))!r}; it must be {_kind(sections)}"
    return f"{words.rstrip('.')}; {see}"


def _sections(printed: str) -> list[list[str]]:
    """Return the lines of a box in sections, which are separated by horizontal lines."""
    sections: list[list[str]] = [[]]
    for line in printed.splitlines():
        text = line.strip("│ ")
        if text.startswith("──"):
            sections.append([])
        elif text and not text.startswith(("╭", "╰")):
            sections[-1].append(text)
    return [lines for lines in sections if lines] or [["the options cannot be read"]]


def _quoted(words: str) -> list[str]:
    return re.findall(r"'([^']*)'", words)


def _kind(sections: list[list[str]]) -> str:
    """Return a description of the values that the option in the box accepts."""
    usage = next((lines[1] for lines in sections if lines[0] == "Argument helptext:"), "")
    placeholder = re.sub(r"^(--\S+ )?", "", usage.split(", ")[-1])
    return _KINDS.get(placeholder, f"of the form {placeholder}")


def _described(option: Option) -> str:
    words = re.split(r"[.,;:] ", option.help)[0].rstrip(".")
    return f"{option.name} ({words[:1].lower() + words[1:]})"


def _flag(names: str) -> str:
    """Return the first name of an option, or the placeholder of a positional argument."""
    name = re.split("[/,]", names)[0]
    return name if name.startswith("-") else name.upper()


def _architectures_with(plain: str) -> list[str]:
    """Return the architectures that have a setting, such as `model.kv-heads` or `model.no-alpha`."""
    return [
        name
        for name, each in ARCHITECTURES.items()
        if any(plain == f"model.{known.lstrip('-')}" for option in options_of(each.config) for known in option.names)
    ]


def _unknown(word: str, options: Sequence[Option], see: str) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}; {see}"
    name = word.partition("=")[0]
    flags = [flag for option in options if not option.is_positional for flag in option.names]
    plain = name.replace("_", "-").lstrip("-")
    arch = next((option for option in options if option.flag == "model.arch"), None)
    if arch is not None and (architectures := _architectures_with(plain)):
        return (
            f"unknown option {name!r} for --model.arch {arch.default}; leave it out, or choose an architecture with"
            f" this option: {', '.join(architectures)}"
        )
    # First try the part of a flag after the dot: --lr means --train.lr.
    close = [flag for flag in flags if flag.endswith(f".{plain}")] or get_close_matches(f"--{plain}", flags, n=1)
    return f"unknown option {name!r}; " + (f"did you mean {close[0]!r}?" if close else see)
