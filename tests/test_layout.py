"""The package's own order: imports go one way, and importing does nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import timemix

PACKAGE = Path(timemix.__file__).parent

# A module may import from the layers before its own; the leaves also from one another.
LAYERS = [
    {"_version", "errors", "config", "files", "meters", "decoding", "downloads", "sources", "tokenizer"}
    | {"processes", "text", "shards", "data", "prepare", "sampling", "arguments"},
    {"ops"},
    {"models"},
    {"distributed", "optim", "precision", "checkpoint", "evaluate", "info", "machine", "tracking"}
    | {"streams", "engine", "generation", "fitting", "convert"},
    {"train", "progress"},
    {"experiments"},
    {"commands"},
    {"cli", "__main__"},
]


def modules():
    return {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}


def layer_of(name):
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize(("path", "parts"), modules().items(), ids=lambda x: str(x))
def test_imports_go_one_way(path, parts):
    if parts == ("__init__",):
        return
    own = layer_of(parts[0])
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("timemix."):
            names = [node.module.split(".")[1]]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("timemix.")]
        for name in names:
            assert layer_of(name) <= own, f"{path.name} imports {name}"


def imported_after(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "statement", ["import timemix", "from timemix.cli import main; main(['--help'])", "import timemix.config"]
)
def test_torch_is_not_imported_early(statement):
    assert "torch" not in imported_after(statement)


def test_leaves_do_not_import_torch():
    loaded = imported_after("import timemix.sources, timemix.data, timemix.prepare, timemix.config")
    assert "torch" not in loaded


def test_exported_names_exist():
    assert all(hasattr(timemix, name) for name in timemix.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = timemix.nothing
