"""Pages of the documentation under test: their blocks of code, their commands, and a folder in which they run."""

import contextlib
import importlib
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.vocabularies import BYTES, vocabulary_lines
from timemix.cli.flags import verb_name
from timemix.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]
SHELL = ("sh", "console")
"""Languages of blocks that hold commands: lines of `sh`, lines after a dollar sign of `console`."""
RUN = "runs/mine"
SERVER = "http://127.0.0.1:8000"
"""Address of the server that the pages use."""

TEXT = "".join(
    f"It was the {word} winter of the year. The quick brown fox jumps over {i % 7} lazy dogs!\n"
    for i, word in enumerate(["first", "second", "longest", "coldest"] * 30)
)
OTHER = "The dog ran to the hut on the hill and it was so!\n" * 60


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return [text for _, own, text in numbered_blocks(path) if own == language]


def numbered_blocks(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the number of the first line, the language and the text of each fenced block, in order."""
    page = path.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```", page, re.DOTALL | re.MULTILINE):
        yield page.count("\n", 0, found.start()) + 2, found[2], textwrap.dedent(found[3])


def run_block(path: Path, line: int, text: str, names: dict[str, Any]) -> None:
    """Run a block of Python that begins at a line of a page. A traceback shows the lines of the page."""
    exec(compile("\n" * (line - 1) + text, str(path), "exec"), names)


def run_python(path: Path, server: str = SERVER, **names: Any) -> dict[str, Any]:
    """Run the Python blocks of a page in order, in one namespace; return it. A traceback shows the page's lines.

    `server` is the address of a server in place of `SERVER`.
    """
    for line, language, text in numbered_blocks(path):
        if language == "python":
            run_block(path, line, text.replace(SERVER, server), names)
    return names


def commands(path: Path) -> list[str]:
    """Return the commands of a page: of its blocks, and those of sentences and tables that name more than a verb."""
    page = path.read_text(encoding="utf-8")
    found = [line for language in SHELL for text in blocks(path, language) for line in _lines(text, language)]
    prose = re.sub(r"^( *)```.*?^\1```", "", page, flags=re.DOTALL | re.MULTILINE)
    found += [
        line.strip() for line in prose.replace("\\\n", " ").splitlines() if re.match(r" {4}(timemix|torchrun) ", line)
    ]
    inline = [" ".join(text.split()) for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    is_command = re.compile(r"(timemix|torchrun) (?!VERB)\S+ \S")
    found += [text for text in inline if is_command.match(text) and "..." not in text]
    return list(dict.fromkeys(found))


def _lines(text: str, language: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    if language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


class _ParsedError(Exception):
    """The options of a command are accepted; nothing of it has run."""


def timemix_arguments(line: str) -> list[list[str]]:
    """Return the arguments of each call of timemix in a line of shell: pipes, redirections, torchrun, variables."""
    # The number of a redirected stream, as in 2> log, is no word.
    lexer = shlex.shlex(re.sub(r"(?<!\S)\d(?=>)", "", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    calls: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word[:1] in ("<", ">"):
            next(words)
        elif word and set(word) <= set("|&;()"):
            calls.append([])
        else:
            calls[-1].append(word)
    found = []
    for call in calls:
        place = next((i for i, word in enumerate(call) if word.rpartition("/")[2] == "timemix"), None)
        begins = place is not None and all(
            "=" in word or word in ("nohup", "time") or call[place - 1] == "-m" for word in call[:place]
        )
        if begins:
            found.append(call[place + 1 :])
    return found


def check_command(line: str) -> None:
    """Fail unless timemix accepts the options of each call in a line; nothing is run.

    A run, experiment or file of settings that does not exist here stands for `RUN`, which must.
    """
    _check_torchrun(line)
    for arguments in timemix_arguments(line):
        words = [_existing(before, word) for before, word in zip([None, *arguments], arguments, strict=False)]
        if not _is_accepted(words):
            pytest.fail(f"timemix refuses the options of: {line}")


def _is_accepted(arguments: list[str]) -> bool:
    with _parse_only():
        try:
            main(arguments)
        except _ParsedError:
            return True
        except SystemExit as end:
            # Help, or the number of the version.
            return not end.code


def _check_torchrun(line: str) -> None:
    _, named, options = line.partition("torchrun ")
    if named:
        from torch.distributed.run import get_args_parser

        try:
            get_args_parser().parse_args(shlex.split(options, comments=True))
        except SystemExit:
            pytest.fail(f"torchrun refuses the options of: {line}")


def _existing(flag: str | None, word: str) -> str:
    if flag in ("--resume", "--from") and not Path(word).exists():
        return RUN
    if flag == "--config" and not Path(word).exists():
        return f"{RUN}/config.toml"
    return word


@contextlib.contextmanager
def _parse_only() -> Iterator[None]:
    """Make each verb end once its options are read."""
    from timemix.cli.options import parse

    def parse_and_stop(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        for verb in VERBS:
            module = importlib.import_module(f"timemix.cli.{verb_name(verb)}")
            patch.setattr(module, "parse", parse_and_stop)
        yield


def write_texts(folder: Path) -> None:
    """Create the files that the pages name: texts, documents, conversations, a folder of two files, a vocabulary."""
    (folder / "rwkv_vocab_v20230424.txt").write_bytes(vocabulary_lines(BYTES))
    (folder / "text").mkdir()
    for name in ("my.txt", "text/a.txt"):
        (folder / name).write_text(TEXT, encoding="utf-8")
    for name in ("other.txt", "valid.txt", "text/b.txt"):
        (folder / name).write_text(OTHER, encoding="utf-8")
    documents = (json.dumps({"text": f"{i}: {OTHER[:40]}"}) for i in range(30))
    (folder / "poems.jsonl").write_text("\n".join(documents), encoding="utf-8")
    chats = (json.dumps({"prompt": f"What is {i} plus 1?", "completion": f"{i + 1}."}) for i in range(30))
    (folder / "chat.jsonl").write_text("\n".join(chats), encoding="utf-8")


def train_tiny_run(folder: Path) -> None:
    """Train `RUN` on the folder's my.txt, for a few steps."""
    size = ["--model.layers", "1", "--model.channels", "32", "--train.batch-size", "4"]
    length = ["--train.steps", "20", "--train.valid-every", "10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            main(["train", "--data", "my.txt", "--out", RUN, "--quiet", *size, *length])
    assert not end.value.code
