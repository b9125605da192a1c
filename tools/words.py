"""Check the words that a person reads: private terms anywhere, sentences over 40 words in README and tutorial.

    python tools/words.py                        # fails on each new use of a term in tools/words.toml
    python tools/words.py --sample 100 --seed 1  # sentences at random, to read and judge

Checked: Markdown without its code; docstrings, comments and other texts in Python; comments in C; text in TOML.
"""

import argparse
import ast
import io
import random
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_WORDS = 40
SHORT_SENTENCES = ("README.md", "docs/tutorial.md")
"""Files whose sentences have at most MOST_WORDS words."""


class Passage(NamedTuple):
    """A paragraph, docstring, comment or message, and where it begins."""

    file: str
    line: int
    text: str


def files() -> list[Path]:
    """Return the files in the index of git that hold words."""
    listed = subprocess.run(
        ["git", "ls-files"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in sorted(set(listed.stdout.splitlines()))]
    return [
        path
        for path in paths
        if path.is_file() and path.suffix in READERS and path.name not in ("words.toml", "words.py")
    ]


def passages(path: Path) -> Iterator[Passage]:
    """Yield what a person reads in a file."""
    name = path.relative_to(ROOT).as_posix()
    read = _comments if name.startswith("tests/") and path.suffix == ".py" else READERS[path.suffix]
    for line, text in read(path.read_text(encoding="utf-8")):
        plain = " ".join(re.sub(r"``?[^`]+``?", "`x`", text).split())
        if plain:
            yield Passage(name, line, plain)


def _markdown(source: str) -> Iterator[tuple[int, str]]:
    """Yield paragraphs, items of lists and cells of tables."""
    source = re.sub(r"<!--.*?-->|\$\$.*?\$\$", lambda found: "\n" * found[0].count("\n"), source, flags=re.DOTALL)
    paragraph: list[str] = []
    begin, fenced = 0, False
    for number, line in enumerate([*source.splitlines(), ""], 1):
        is_fence = line.lstrip().startswith("```")
        is_code = fenced or is_fence or (line.startswith("    ") and not paragraph)
        ends = is_code or not line.strip() or re.match(r"\s*([-*|#>]|\d+\.) ?", line)
        if ends and paragraph:
            yield begin, " ".join(paragraph)
            paragraph = []
        if is_fence:
            fenced = not fenced
        if is_code or not line.strip() or re.fullmatch(r"[\s|:-]+", line):
            continue
        if line.startswith("|"):
            yield from ((number, cell.strip()) for cell in line.strip("|").split("|"))
            continue
        if not paragraph:
            begin = number
        words = re.sub(r"^\s*([-*#>]+|\d+\.) ", "", line)
        paragraph.append(re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", words))


def _python(source: str) -> Iterator[tuple[int, str]]:
    """Yield all strings of three words or more by paragraph, docstrings among them, and comments."""
    tree = ast.parse(source)
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in ast.walk(node) if part is not node)
            parts = (str(p.value) if isinstance(p, ast.Constant) else "`x`" for p in node.values)
            yield from _strings(node.lineno, "".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield from _strings(node.lineno, node.value)
    yield from _comment_blocks(source)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield docstrings by paragraph, and comments; other strings of a test are its data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from _strings(getattr(node, "lineno", 1), ast.get_docstring(node) or "")
    yield from _comment_blocks(source)


def _comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """Yield comments, those of adjacent lines together."""
    run: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#( noqa| type:|!)", token.string):
            if run and token.start[0] != run[-1].start[0] + 1:
                yield run[0].start[0], " ".join(each.string.lstrip("# ") for each in run)
                run = []
            run.append(token)
    if run:
        yield run[0].start[0], " ".join(each.string.lstrip("# ") for each in run)


def _strings(line: int, text: str) -> Iterator[tuple[int, str]]:
    if len(text.split()) < 3:
        return
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:- |\w+: ))", text):
        yield line, paragraph
        line += paragraph.count("\n") + 1


def _c(source: str) -> Iterator[tuple[int, str]]:
    for found in re.finditer(r"/\*.*?\*/|(?:^[ \t]*//[^\n]*\n)+|//[^\n]*", source, flags=re.DOTALL | re.MULTILINE):
        yield (
            source.count("\n", 0, found.start()) + 1,
            re.sub(r"^\s*(//|/?\*+/?)|\*/", "", found[0], flags=re.MULTILINE),
        )


def _toml(source: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.splitlines(), 1):
        for found in re.finditer(r'"([^"]+)"|#(.*)', line):
            if len(found[0].split()) > 2:
                yield number, (found[1] or found[2]).strip()


READERS = {".md": _markdown, ".py": _python, ".c": _c, ".h": _c, ".toml": _toml}


def sentences(passage: Passage) -> Iterator[str]:
    """Yield the sentences of a passage."""
    yield from re.split(r"(?<=[.!?])\)?\s+(?=[A-Z`\"(])", passage.text)


def problems() -> Iterator[str]:
    """Yield a line for each private term outside the list of allowed uses, each unused entry, each long sentence."""
    settings = tomllib.loads((ROOT / "tools/words.toml").read_text(encoding="utf-8"))
    words = [(re.compile(entry["pattern"], re.IGNORECASE), entry["instead"]) for entry in settings["words"]]
    allowed = settings.get("allow", [])
    unused = list(allowed)
    for passage in (each for path in files() for each in passages(path)):
        for pattern, instead in words:
            for found in pattern.finditer(passage.text):
                around = passage.text[max(0, found.start() - 40) : found.end() + 40]
                matching = [
                    e for e in allowed if passage.file.startswith(e["file"]) and e["text"].lower() in around.lower()
                ]
                unused = [entry for entry in unused if entry not in matching]
                if not matching:
                    yield f"{passage.file}:{passage.line}: ...{around}... ({found[0]!r}: {instead})"
        if passage.file in SHORT_SENTENCES:
            for sentence in sentences(passage):
                if (length := len(sentence.split())) > MOST_WORDS:
                    yield f"{passage.file}:{passage.line}: a sentence of {length} words: {sentence[:80]}..."
    for entry in unused:
        yield f"tools/words.toml: nothing in {entry['file']} needs the entry {entry['text']!r}; remove it"


def sample(count: int, seed: int) -> Iterator[str]:
    """Yield sentences of six words or more, drawn at random from the documentation and the package."""
    drawn = [
        f"{passage.file}:{passage.line}: {sentence}"
        for path in files()
        if path.suffix == ".md" or (path.suffix == ".py" and path.is_relative_to(ROOT / "timemix"))
        for passage in passages(path)
        for sentence in sentences(passage)
        if len(sentence.split()) >= 6
    ]
    yield from random.Random(seed).sample(drawn, count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, metavar="N", help="print N sentences at random instead")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    lines = list(sample(asked.sample, asked.seed) if asked.sample else problems())
    print("\n".join(lines))
    return 1 if lines and not asked.sample else 0


if __name__ == "__main__":
    sys.exit(main())
