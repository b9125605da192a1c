"""C code compiled on first use: a damaged, shared, read-only, full or missing cache, and a wrong CC."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.users import without_home
from timemix.runtime import native

pytestmark = pytest.mark.skipif(native.c_compiler() is None, reason="no C compiler on this machine")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C file with its own cache and temporary folder."""
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(native, "COMPILE", ("-O0", "-fPIC"))
    native.library.cache_clear()
    yield path
    native.library.cache_clear()


def answer(source):
    native.library.cache_clear()
    found, reason = native.library(source)
    assert found is not None, reason
    return found.answer()


def cached(source):
    return sorted((source.parent / "home" / "timemix").iterdir())


def replace(path, content):
    """Write a new file in place of a library, because a loaded library must stay whole until this process has ended."""
    path.unlink()
    path.write_bytes(content)


# In a new process: loading an incomplete library ends a process with a bus error.
LOAD = """
import sys
from pathlib import Path
from timemix.runtime import native
native.COMPILE = ("-O0", "-fPIC")
found, reason = native.library(Path(sys.argv[1]))
print(found and found.answer(), reason)
"""


def load_in_a_process(source):
    command = [sys.executable, "-c", LOAD, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("damage", ["cut off", "empty", "a changed byte", "longer"])
def test_a_damaged_library_is_compiled_again(source, damage):
    assert answer(source) == 42
    (path,) = cached(source)
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut off": whole[:9000],
        "empty": b"",
        "a changed byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "longer": whole + b"\0",
    }
    replace(path, damaged[damage])
    done = load_in_a_process(source)
    assert (done.returncode, done.stdout.split()[0]) == (0, "42"), done.stderr
    (mended,) = cached(source)
    assert mended.read_bytes() == whole


def test_processes_that_compile_at_once_all_get_the_library(source):
    with ThreadPoolExecutor(4) as pool:
        for done in pool.map(lambda _: load_in_a_process(source), range(4)):
            assert (done.returncode, done.stdout.split()[0]) == (0, "42"), done.stderr
    assert len(cached(source)) == 1


def failing_compiler(source, monkeypatch, words):
    """Create a compiler that fails, as on a full disk, if its arguments contain these words."""
    compiler = source.with_name("cc")
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *{words}*) echo "error: No space left" >&2; exit 1;; esac\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))


def test_a_full_cache_is_done_without(source, monkeypatch):
    failing_compiler(source, monkeypatch, source.parent / "home")
    assert answer(source) == 42
    assert not cached(source)


def test_a_cache_that_is_no_folder_is_done_without(source):
    (source.parent / "home").write_text("")
    assert answer(source) == 42


def test_a_damaged_library_in_a_read_only_cache_is_not_loaded(source, monkeypatch):
    assert answer(source) == 42
    (path,) = cached(source)
    replace(path, b"cut off")

    def refused(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(native.Path, "unlink", refused)
    assert answer(source) == 42
    assert path.read_bytes() == b"cut off"


def test_without_a_home_nothing_is_cached(source, monkeypatch):
    without_home(monkeypatch)
    monkeypatch.chdir(source.parent)
    before = set(source.parent.iterdir())
    assert answer(source) == 42
    assert set(source.parent.iterdir()) == before


@pytest.mark.parametrize("command", ['"cc', "cc '-O1", "cc \\"])
def test_an_open_quote_in_cc_is_reported(source, monkeypatch, command):
    monkeypatch.setenv("CC", command)
    native.library.cache_clear()
    assert native.library(source) == (None, f"no C compiler was found: CC is {command!r}")
