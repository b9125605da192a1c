"""The package's own order: imports go one way, and importing does nothing else."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import timemix
from timemix.cli.bench import VERBS as BENCH_VERBS
from timemix.cli.main import VERBS

PACKAGE = Path(timemix.__file__).parent

# Each wing may import from those after it, and from itself.
WINGS = (
    "cli",
    "experiments",
    "bench",
    "training",
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
    """Every module of the package by its name, without `timemix.`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name not in ("", "__main__")}


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports anywhere, types alone included."""
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
def test_imports_go_one_way_through_the_wings(name):
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


def test_no_test_module_imports_another():
    """What several of them need lies in tests/helpers."""
    tests = Path(__file__).parent
    found = [
        p.name for p in tests.rglob("*.py") if re.search(r"^\s*(from|import) tests[\w.]*\.test_", p.read_text(), re.M)
    ]
    assert not found
