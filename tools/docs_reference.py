"""Write the pages of the reference: from docstrings, `--help`, dataclasses of settings, and the server's description.

The site builder turns each `::: name` into the docstring of that name. Nothing here needs the site builder.
"""

import dataclasses
import html
import inspect
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import griffe
from docs_http import http_page

from timemix import errors
from timemix.cli.bench import VERBS as BENCH_VERBS
from timemix.cli.main import VERBS
from timemix.config.run import TrainConfig
from timemix.data.config import DataConfig
from timemix.models.config import ModelConfig
from timemix.models.registry import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 88
"""Width of the help texts."""
CODE_OR_OPTION = re.compile(r"`[^`]*`|(?:timemix [a-z]+ )?--[a-z][a-z.-]*[a-z]")
MODULE = "    options: {members: false, show_root_heading: false, show_root_toc_entry: false}\n"
"""Options of a module: its own docstring alone."""


class ApiPage(NamedTuple):
    """A page of the Python reference: the names whose docstrings it shows, of a module without its members."""

    title: str
    summary: str
    names: tuple[str, ...]


API = {
    "models": ApiPage(
        "Models",
        "Build a model and call it",
        (
            "timemix.build_model",
            "timemix.list_architectures",
            "timemix.Architecture",
            "timemix.register_architecture",
            "timemix.models.language_model.LanguageModel",
            "timemix.models.state.State",
        ),
    ),
    "training": ApiPage(
        "Training",
        "Train a model, and follow the run",
        (
            "timemix.train",
            "timemix.training.progress.TrainingProgress",
            "timemix.training.progress.Sample",
            "timemix.training.trainer.Trainer",
            "timemix.training.hooks.Hook",
            "timemix.training.hooks.Tracker",
            "timemix.training.hooks.load_hook",
            "timemix.training.hooks.TensorBoard",
            "timemix.training.trackers.start_tracker",
        ),
    ),
    "runs": ApiPage(
        "Runs and evaluation",
        "Load a trained model and measure its loss",
        (
            "timemix.load",
            "timemix.runs.load.Loaded",
            "timemix.evaluate",
            "timemix.evaluation.texts.Evaluation",
        ),
    ),
    "generation": ApiPage(
        "Generation",
        "Generate text: one call, or an engine with many requests",
        (
            "timemix.generate",
            "timemix.stream",
            "timemix.Engine",
            "timemix.Request",
            "timemix.Sampler",
            "timemix.generation.request.Event",
            "timemix.Session",
            "timemix.save_session",
            "timemix.load_session",
            "timemix.session_to_bytes",
            "timemix.session_from_bytes",
            "timemix.PrefixCache",
        ),
    ),
    "data": ApiPage(
        "Data",
        "Turn text into tokens and batches",
        (
            "timemix.data.prepare.prepare",
            "timemix.data.prepare.hold_out_end",
            "timemix.data.describe.describe",
            "timemix.data.describe.TextDescription",
            "timemix.data.corpus.open_corpus",
            "timemix.data.corpus.open_run_corpus",
            "timemix.data.corpus.Corpus",
            "timemix.data.batches.Batches",
        ),
    ),
    "tokenizers": ApiPage(
        "Tokenizers",
        "Turn text into token ids and back",
        (
            "timemix.tokenizers.make.train_tokenizer",
            "timemix.tokenizers.make.load_tokenizer",
            "timemix.tokenizers.base.Tokenizer",
            "timemix.tokenizers.stream.StreamDecoder",
            "timemix.tokenizers.character.CharacterTokenizer",
            "timemix.tokenizers.character.ByteTokenizer",
            "timemix.tokenizers.word.WordTokenizer",
            "timemix.tokenizers.subword.SubwordTokenizer",
        ),
    ),
    "hf": ApiPage(
        "Transformers",
        "Use an exported model in the package transformers",
        (
            "timemix.hf",
            "timemix.hf.TimemixForCausalLM",
            "timemix.hf.TimemixOutput",
            "timemix.hf.TimemixConfig",
        ),
    ),
    "ops": ApiPage(
        "Ops",
        "Compute the time-mix of RWKV as pure functions of tensors",
        (
            "timemix.ops.rwkv1.api",
            "timemix.ops.rwkv1.wkv1",
            "timemix.ops.rwkv1.wkv1_state",
            "timemix.ops.rwkv1.Wkv1State",
            "timemix.ops.rwkv1.choose_backend",
            "timemix.ops.rwkv1.exponential",
            "timemix.ops.rwkv1.wkv1_exp",
            "timemix.ops.rwkv1.exp_state",
            "timemix.ops.rwkv1.ExpState",
            "timemix.ops.rwkv1.Curves",
            "timemix.ops.rwkv4.wkv4",
            "timemix.ops.rwkv6.wkv6",
            "timemix.ops.rwkv7.wkv7",
        ),
    ),
    "errors": ApiPage("Errors", "Catch the exceptions of timemix", ()),
}


def pages() -> dict[str, str]:
    """Return the Markdown of each page by its path below docs/."""
    written = {f"reference/api/{name}.md": "\n".join(_api(page)) for name, page in API.items()}
    written["reference/api/errors.md"] = "\n".join(_errors())
    written["reference/settings.md"] = "\n".join(_settings())
    written["reference/http.md"] = http_page()
    verbs = [(), *((verb,) for verb in VERBS), *(("bench", verb) for verb in BENCH_VERBS)]
    with ThreadPoolExecutor(2) as threads:
        helps = dict(zip(verbs, threads.map(_help, verbs), strict=True))
    for verb in [(), *((verb,) for verb in VERBS)]:
        parts = [each for each in verbs if each[: len(verb)] == verb] if verb else [verb]
        written[f"reference/cli/{verb[0] if verb else 'index'}.md"] = "\n".join(_command(parts, helps))
    return {"reference/index.md": "\n".join(_index()), **written}


def _index() -> Iterator[str]:
    """Yield the first page of the reference: a table for each part."""
    yield "# Reference\n\nThese pages come from the docstrings, help texts, settings and HTTP API of the program."
    yield "\n## Python\n\n| page | task |\n| --- | --- |"
    yield from (f"| [{page.title}](api/{name}.md) | {page.summary} |" for name, page in API.items())
    yield "\n## Command line\n\n| command | result |\n| --- | --- |"
    yield from (f"| [`timemix {verb}`](cli/{verb}.md) | {text} |" for verb, text in VERBS.items())
    yield "\n## HTTP\n\n[The HTTP API](http.md) of `timemix serve`: requests, fields, answers and errors."
    yield "\n## Settings\n\n[All settings](settings.md) of `config.toml`, with type, default and meaning."


def _api(page: ApiPage) -> Iterator[str]:
    """Yield a page of the Python reference."""
    yield f"# {page.title}\n\n{page.summary}.\n"
    for name in page.names:
        path = ROOT / name.replace(".", "/")
        is_module = path.is_dir() or path.with_suffix(".py").exists()
        yield f"::: {name}\n{MODULE if is_module else ''}"


def _errors() -> Iterator[str]:
    """Yield the page of the errors: their tree, then each of them."""
    yield from _api(API["errors"])
    kinds = [each for each in vars(errors).values() if inspect.isclass(each) and each.__module__ == errors.__name__]
    yield "```text"
    for kind in kinds:
        bases = [base for base in kind.__mro__[1:] if base in kinds]
        outside = [base.__name__ for base in kind.__bases__ if base not in kinds]
        yield f"{'    ' * len(bases)}{kind.__name__}{f' ({outside[0]})' if outside else ''}"
    yield "```\n"
    yield from (f"::: timemix.errors.{kind.__name__}\n" for kind in kinds)


def _help(verb: tuple[str, ...]) -> str:
    """Return what `timemix VERB --help` prints at a fixed width, without colours."""
    environment = os.environ | {"COLUMNS": str(COLUMNS), "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    printed = subprocess.run(
        [sys.executable, "-m", "timemix", *verb, "--help"],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    return printed.stdout


def _command(verbs: list[tuple[str, ...]], helps: dict[tuple[str, ...], str]) -> Iterator[str]:
    """Yield the page of a verb, and of the verbs below it."""
    yield "---\nhide: [toc]\n---\n"
    for level, verb in enumerate(verbs):
        command = " ".join(("timemix", *verb))
        yield f"{'##' if level else '#'} {command if verb else 'Command line'}\n"
        yield f'```{{.text .help title="{command} --help"}}\n{helps[verb].rstrip()}\n```\n'


def _settings() -> Iterator[str]:
    """Yield the page of the settings, a table for each part of config.toml."""
    yield "# Settings\n"
    yield "Settings have the same names in `config.toml`, in Python and on the command line:\n"
    yield "| place | form |\n| --- | --- |"
    yield "| `config.toml` | `batch_size = 16` in the table `[train]` |"
    yield '| Python | `timemix.train(..., train={"batch_size": 16})` |'
    yield "| command line | `--train.batch-size 16` |\n"
    yield "A preset replaces some of these defaults; `timemix train PRESET --help` prints the values of a preset.\n"
    for name, kind in (("data", DataConfig), ("train", TrainConfig)):
        yield from _table(f"`[{name}]`", kind, set())
    common = {field.name for field in dataclasses.fields(ModelConfig)}
    yield from _table("`[model]`, every architecture", ModelConfig, set())
    for arch, entry in ARCHITECTURES.items():
        yield from _table(f"`[model]`, `{arch}`", entry.config, common)


def _table(title: str, kind: type[Any], without: set[str]) -> Iterator[str]:
    """Yield the table of a dataclass of settings: name, type, default and help text of each field."""
    yield f"## {title}\n\n| setting | type | default | meaning |\n| --- | --- | --- | --- |"
    hints = typing.get_type_hints(kind)
    texts = _field_texts(kind)
    default = kind()
    for field in dataclasses.fields(kind):
        if field.name not in without:
            cells = (_type(hints[field.name]), _value(getattr(default, field.name)), texts[field.name])
            yield f"| `{field.name}` | {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
    yield ""


def _field_texts(kind: type[Any]) -> dict[str, str]:
    """Return the text below each field of a dataclass, of its base classes too."""
    texts: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if dataclasses.is_dataclass(each):
            source = griffe.visit(each.__module__, Path(inspect.getfile(each)), Path(inspect.getfile(each)).read_text())
            members = source[each.__name__].members
            texts |= {name: _one_line(member.docstring.value) for name, member in members.items() if member.docstring}
    return texts


def _one_line(text: str) -> str:
    """Return a text as a cell of a table: on one line, with options as code, and with `<` outside code as it is."""
    line = CODE_OR_OPTION.sub(lambda found: f"`{found[0].strip('`')}`", " ".join(text.split()))
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else html.escape(part, quote=False) for part in parts)


def _type(hint: Any) -> str:
    """Return a type as a reader of config.toml knows it."""
    if typing.get_origin(hint) is Literal:
        return ", ".join(f'`"{value}"`' for value in typing.get_args(hint))
    known = {bool: "true or false", int: "integer", float: "number", str: "text"}
    if hint in known:
        return known[hint]
    inner = [each for each in typing.get_args(hint) if each not in (type(None), Ellipsis)]
    if typing.get_origin(hint) in (tuple, list):
        return f"list of {_type(inner[0])}s"
    return " or ".join(dict.fromkeys(_type(each) for each in inner))


def _value(value: Any) -> str:
    """Return a default as config.toml has it."""
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`".replace("'", '"')
