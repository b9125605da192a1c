"""Structure of the package: imports go one way, and importing has no side effects."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import timemix
from timemix.cli.bench import VERBS as BENCH_VERBS
from timemix.cli.main import VERBS
from timemix.models.registry import ARCHITECTURES

PACKAGE = Path(timemix.__file__).parent

# Each subpackage may import from itself and from those after it.
WINGS = (
    "cli",
    "experiments",
    "bench",
    "server",
    "training",
    "hf",
    "interop",
    "evaluation",
    "generation",
    "reporting",
    "runs",
    "config",
    "models",
    "ops",
    "data",
    "tokenizers",
    "storage",
    "runtime",
    "errors",
    "_version",
)


def modules() -> dict[str, Path]:
    """Return every module of the package by its name, without `timemix.`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name not in ("", "__main__")}


def imported(path: Path) -> set[str]:
    """Return the modules of the package that a module imports anywhere, also for types alone."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "timemix":
            base = node.module.removeprefix("timemix").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                names.add(full if full in modules() else base)
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("timemix.") for alias in node.names if alias.name.startswith("timemix.")}
    return names


def wing_of(name: str) -> int:
    return WINGS.index(name.split(".")[0])


@pytest.mark.parametrize("name", modules())
def test_imports_between_subpackages_go_one_way(name):
    for other in imported(modules()[name]):
        assert other, f"{name} imports timemix itself"
        assert wing_of(other) >= wing_of(name), f"{name} imports {other}"


def test_no_circle_even_of_types():
    graph = {name: imported(path) - {name} for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


ARCHITECTURE_FOLDERS = {each.model.split(".")[2] for each in ARCHITECTURES.values()}
# Other modules that may name an architecture.
MAY_NAME = ("models.registry", "config.presets", "bench.baselines")
# Fields of syntax nodes that hold identifiers and imported paths.
NAMES = ("id", "attr", "name", "asname", "arg", "module", "rest", "kwd_attrs", "names")


def may_name_architectures(module: str) -> bool:
    wing, _, rest = module.partition(".")
    own = wing in ("models", "ops") and rest.split(".")[0] in ARCHITECTURE_FOLDERS
    return own or module in MAY_NAME


def words_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return line and text of every identifier, imported path and string constant, without docstrings."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield line, node.value
        for field in NAMES:
            value = getattr(node, field, None)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    yield line, text


def names_an_architecture(text: str) -> bool:
    """Return whether a text contains a name of the registry, as it is or in camel case."""
    # llama.cpp is a program.
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text.replace("llama.cpp", "")).lower()
    return any(name in snake for name in ARCHITECTURES)


def architectures_named(tree: ast.AST) -> list[str]:
    """Return every name of an architecture in a module's code, and every test of a name's prefix."""
    found = [f"line {line}: {text!r}" for line, text in words_of(tree) if names_an_architecture(text)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "removeprefix"):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            found += [
                f"line {node.lineno}: the beginning {text!r}" for text in texts if text in ("rwkv", "mha", "mha_")
            ]
    return found


@pytest.mark.parametrize("name", [name for name in modules() if not may_name_architectures(name)])
def test_no_architecture_is_named_outside_its_folder(name):
    assert not architectures_named(ast.parse(modules()[name].read_text()))


@pytest.mark.parametrize(
    "code",
    [
        "from timemix.models.rwkv1.config import A",
        "import timemix.ops.rwkv1",
        "from timemix.models import llama",
        "x = Rwkv1Config()",
        "x = MhaRotaryBlock()",
        "isinstance(x, a.LlamaBlock)",
        "x = 'a trained rwkv1'",
        "x = f'{y} of mha_pro'",
        "def f(rwkv1_exp): ...",
        "f(rwkv1=3)",
        "arch.startswith('rwkv')",
        "x = {'mha_shift': 1}",
        "match x:\n    case 'llama': pass",
    ],
)
def test_a_named_architecture_is_found(code):
    assert architectures_named(ast.parse(code))


@pytest.mark.parametrize(
    "code", ['"""A trained rwkv1."""', 'class A:\n    x: int\n    """Of rwkv1."""', "# rwkv1", "wkv1(k, v)"]
)
def test_docstrings_and_comments_may_name_architectures(code):
    assert not architectures_named(ast.parse(code))


def imported_after(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import timemix",
        "from timemix.cli.main import main; main(['--help'])",
        "import timemix.config.presets",
        "import timemix.data.sources, timemix.data.corpus, timemix.data.prepare",
    ],
)
def test_torch_is_not_imported_early(statement):
    assert "torch" not in imported_after(statement)


@pytest.mark.parametrize("verb", [*VERBS, *(f"bench {verb}" for verb in BENCH_VERBS)])
def test_no_verb_imports_torch_for_its_help(verb):
    arguments = [*verb.split(), "--help"]
    code = f"""
import contextlib, io, sys
from timemix.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main({arguments})
assert "usage: timemix {verb}" in out.getvalue(), out.getvalue()
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exported_names_exist():
    assert all(hasattr(timemix, name) for name in timemix.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = timemix.nothing


def test_scripts_import_names_that_exist():
    """The scripts in benchmarks/, tools/ and examples/, of which some import only while they run."""
    root = Path(__file__).parent.parent
    scripts = [p for folder in ("benchmarks", "tools", "examples") for p in (root / folder).glob("*.py")]
    assert len(scripts) > 20
    trees = [ast.parse(script.read_text()) for script in scripts]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module and node.module.startswith("timemix"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    # Raises an error unless the name is that of a module.
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_no_test_module_imports_another():
    """Code that several test modules need is in tests/helpers."""
    tests = Path(__file__).parent
    found = [
        p.name for p in tests.rglob("*.py") if re.search(r"^\s*(from|import) tests[\w.]*\.test_", p.read_text(), re.M)
    ]
    assert not found
