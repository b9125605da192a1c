"""Messages that a page quotes: their words stand in strings of the source, and commands print many of them."""

import ast
import functools
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch.cuda
import torch.distributed.run

import timemix.errors
from tests.helpers.commands import run_command
from tests.helpers.pages import ROOT, TEXT, numbered_blocks
from timemix.data.config import DataConfig
from timemix.data.prepare import prepare

PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if "log" not in page.parts)
TABLE = re.compile(r"^\| (?:message|error|line) \|.*\n\|.*\n(?P<rows>(?:\|.*\n)+)", re.MULTILINE)
ROW = re.compile(r"^\| (?:a line )?`(?P<message>[^`]+)`", re.MULTILINE)
PROSE = re.compile(r"(?:[A-Za-z]{2,}[,;]? ){2}[A-Za-z]{2,}")
"""Three words in a row: the value of a variable has fewer."""
OF_OTHERS = {
    "invalid continuation byte": "Python",
    "[Errno -2] Name or service not known": "the system",
    "Torch not compiled with CUDA enabled": "PyTorch",
    "Setting OMP_NUM_THREADS environment variable for each process to be 1 in default": "torchrun",
}
"""Messages, and parts of messages, that timemix does not write."""


def chat(*messages):
    """Return a line with a conversation."""
    return (json.dumps({"messages": [{"role": "user", "content": "a"}, *messages]}) + "\n").encode()


FILES = {
    "latin.txt": "le café noir".encode("latin-1"),
    "u16.txt": TEXT.encode("utf-16"),
    "short.txt": b"tiny",
    "my.jsonl": b'{"text": "one"}\n',
    "wrong.jsonl": chat({"role": "tool", "content": "b"}),
    "parts.jsonl": chat({"role": "assistant", "content": [{"type": "text", "text": "b"}]}),
    "asked.jsonl": chat({"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}),
    "mixed.jsonl": chat({"role": "assistant", "content": "b"}) + b'{"text": "one"}\n',
    "accents.txt": "naïve café".encode(),
    "umlauts.txt": "The groß fox jumps für it!\n".encode() * 50,
    "seeds.toml": b'title = "t"\ntokens = 9\nseeds = [0, 1]\n[tune]\ntrain.lr = [1, 2]\n[[variants]]\nname = "half"\n',
    "budget.toml": b'title = "t"\n[[variants]]\nname = "half"\n',
    "bad.toml": b'title = "t"\ntokens = 9\n[[variants]]\nname = "half"\nset.model.layer = 2\n',
    "same.toml": b'title = "t"\ntokens = 9\n[[variants]]\nname = "half"\n[[variants]]\nname = "quarter"\n',
}
PROVOKED = {
    "chat-data": [
        "data chat.jsonl",
        "data my.txt --data.template world",
        "data chat.jsonl --data.template chatml",
        "data wrong.jsonl --data.template world",
        "data parts.jsonl --data.template world",
        "data asked.jsonl --data.template world",
        "data mixed.jsonl --data.template world",
    ],
    "compare": ["compare bad.toml --data my.txt --out runs/bad"],
    "documents": [
        "data my.txt --data.shuffle 1",
        "data my.txt --data.drop-duplicates exact",
        "data my.jsonl",
        "train rwkv7-small --data my.txt --data.no-cross-documents --out runs/bad",
        "train --data my.txt --data.order carried --out runs/bad",
        "train rwkv7-small --data my.txt --data.order carried --train.batch-size 999 --model.ctx-len 64 --out runs/bad",
    ],
    "experiment-files": [
        "compare bad.toml --data my.txt --out runs/bad",
        "compare same.toml --data my.txt --out runs/bad",
        "compare budget.toml --data my.txt --out runs/bad",
        "compare seeds.toml --data my.txt --out runs/bad",
    ],
    "fine-tune": [
        "train --from runs/mine --data umlauts.txt --out runs/next",
        "train --from runs/mine --data other.txt --out runs/next --model.layers 2",
        "train --from runs/mine --data other.txt --out runs/next --data.tokenizer subword",
        "train cpu-small --from runs/mine --data other.txt --out runs/next",
    ],
    "gpu": ["train --data my.txt --out runs/next --train.device gpu"],
    "large-corpora": [
        "data my.txt --out tokens/mine",
        "train --data tokens/mine --out runs/next --data.valid-fraction 0.2",
    ],
    "long-contexts": [
        f"sample runs/mine --prompt '{TEXT[:900]}' --tokens 1",
        "train --data my.txt --out runs/next --train.contexts 2",
        "train --data my.txt --out runs/next --train.batch-size 9999999 --model.channels 4096",
    ],
    "resume-a-run": [
        "train --resume runs/mine",
        "train --resume runs/mine --train.seed 2",
        "train --resume runs/mine --train.steps 2",
        "train --resume runs/nope",
    ],
    "sessions": [
        "sample runs/mine --load-state my.txt",
        "sample runs/mine --load-state nope.state",
        "sample runs/mine --count 3 --save-state the.state",
    ],
    "shell-and-scripting": ["tarin", "sample runs/mine --prompt '-If '"],
    "train-on-your-text": [
        "train --data my.txt --out runs/mine",
        "data latin.txt",
        "data u16.txt",
        "train --data short.txt --out runs/next",
        "data my.txt --data.valid accents.txt",
    ],
    "world-tokenizer": [
        "data my.txt --data.tokenizer world --data.vocabulary nowhere.txt",
        "data my.txt --data.tokenizer world --data.vocabulary short.txt",
        "data my.txt --data.vocabulary my.txt",
    ],
}
"""Commands by the page that quotes what they print."""


def quoted(page):
    """Yield the messages that a page quotes: in tables of messages, and in output of timemix."""
    for table in TABLE.finditer(page.read_text(encoding="utf-8")):
        yield from ROW.findall(table["rows"])
    for _, language, text in numbered_blocks(page):
        if language in ("text", "console"):
            yield from re.findall(r"^timemix: (.+)", text, re.MULTILINE)


def plain(text):
    """Return a message with names of settings in place of flags, as the library writes it."""
    return re.sub(r"--([a-z][\w.-]*)", lambda flag: flag[1].replace("-", "_"), text.removeprefix("timemix: "))


def pattern(node):
    """Return a string of the source as a regular expression. Its groups are the variable parts."""
    if isinstance(node, ast.Constant):
        return re.sub("%[sd]", "(.*)", re.escape(plain(str(node.value))))
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(part) for part in node.values)
    # A value with quotation marks ends with them.
    return "('[^']*'|.*)" if node.conversion == ord("r") else "(.*)"


def strings(node):
    """Yield the strings of a syntax tree. A part of an f-string is no string of its own."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)):
            yield from strings(child)


@functools.cache
def patterns():
    """Return the strings of the source that have letters outside their variable parts, the longest first."""
    files = (ROOT / "timemix").rglob("*.py")
    found = {pattern(node) for file in files for node in strings(ast.parse(file.read_text(encoding="utf-8")))}
    with_letters = [each for each in found if re.search("[a-z]{2}", each)]
    return [re.compile(each, re.DOTALL) for each in sorted(with_letters, key=len, reverse=True)]


def can_be_printed(message, depth=3):
    """Return whether a message is a string of the source, with values or further strings in its variable parts.

    Args:
        message: The message.
        depth: How often a string may contain another string.
    """
    matches = (each.fullmatch(plain(message)) for each in patterns())
    return message in OF_OTHERS or any(all(is_part(p, depth) for p in match.groups()) for match in matches if match)


def is_part(part, depth):
    return not PROSE.search(part) or (depth > 0 and can_be_printed(part.strip(), depth - 1))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_message_of_a_page_can_be_printed(page):
    for message in quoted(page):
        # The class of an exception, in a page about Python, or the name of a file comes first.
        first, error, _ = re.match(r"(?:([A-Z]\w+[a-z][A-Z]\w+)(: |$)|\w+\.toml: )?", message).group(0, 1, 2)
        assert error is None or hasattr(timemix.errors, error), message
        assert message == first or can_be_printed(message.removeprefix(first)), message


def sentence(line):
    """Return a line of output without the differences between two machines: numbers, and the names of other files."""
    return re.sub(r"\d+([,.]\d+)*", "#", re.sub(r"^(timemix: )?(\w+\.toml: )?", "", line)).strip()


@pytest.fixture(scope="module")
def folder(trained):
    for name, content in FILES.items():
        (trained / name).write_bytes(content)
    shutil.copytree(trained / "runs/mine", trained / "runs/long")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        prepare(Path("tokens/mine"), DataConfig(source="my.txt"))
    return trained


@pytest.mark.parametrize(("page", "command"), [(page, c) for page, commands in PROVOKED.items() for c in commands])
def test_a_command_prints_a_message_of_the_page(page, command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    _, out, err = run_command(capsys, *shlex.split(command))
    expected = {sentence(message) for message in quoted(ROOT / f"docs/howto/{page}.md")}
    printed = {sentence(line) for line in (out + err).splitlines()}
    assert printed & expected, f"{out}{err}"


def test_the_pages_quote_many_messages():
    assert len({message for page in PAGES for message in quoted(page)}) > 50


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("runs/mine exists already; choose another folder", True),
        ("runs/mine already exists; choose another folder", False),
        ("runs/mine exists already; remove the old folder", False),
        ("unknown verb 'tarin'; did you mean 'train'?", True),
        ("unknown verb 'tarin'; it could be 'train'", False),
        (
            "--train.batch-size=12 is not divisible by processes (5) x --train.accumulation (1); give a multiple of 5",
            True,
        ),
        ("--train.batch-size=12 cannot be divided by processes (5)", False),
        ("choose another folder", False),
    ],
)
def test_messages_that_can_and_cannot_be_printed(message, expected):
    assert can_be_printed(message) == expected


def test_messages_of_others_are_theirs():
    with pytest.raises(UnicodeDecodeError, match="invalid continuation byte"):
        b"\xe9a".decode()
    assert "Torch not compiled with CUDA enabled" in inspect.getsource(torch.cuda)
    assert "Setting OMP_NUM_THREADS environment variable for each process" in inspect.getsource(torch.distributed.run)
