"""Compilation of the C code of the package on first use, for the processor of this machine, with a cache.

The file name of a cached library ends in two hashes:

- The first hash covers all inputs of the library: the compiler and its version, the flags, the processor, the source,
  and every file that the source includes by `#include "..."`, directly or indirectly. timemix searches for an included
  file next to the including file, then in the folder of the package, as for `#include "ops/common/panels.h"`.
- The second hash covers the library itself, because loading a damaged library can end the process.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from timemix.errors import Unavailable
from timemix.runtime.cache import cache_folder

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder in which the compiler searches for included C files."""

# The C library declares vectorized mathematical functions only with the flag -ffast-math. The linker must not get
# -ffast-math, because the processor would then round denormal numbers to zero in the whole process.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fPIC")
THREADS = "-fopenmp"

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


@functools.cache
def library(source: Path, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Compile and load a C file.

    Args:
        source: The C file.
        *flags: Compiler flags for this file, in addition to the flags for all files.

    Returns:
        The library and the compiler, or None and the reason why the file cannot be compiled or loaded.
    """
    compiler = c_compiler()
    if compiler is None:
        named = f": CC is {os.environ['CC']!r}" if os.environ.get("CC") else ""
        return None, f"no C compiler was found{named}"
    try:
        return _load_or_compile(compiler, source, flags), f"compiled by {shlex.join(compiler)}"
    except subprocess.SubprocessError as error:
        return None, f"{shlex.join(compiler)} failed: {_error_line(error)}"
    except OSError as error:
        return None, f"the compiled code cannot be saved or loaded: {error}"


def passed(argument: Any) -> Any:
    """Convert an argument for a C function: the address of a tensor or of a structure, and any other argument as it is.

    Args:
        argument: A contiguous tensor, a structure, None, or an instance of a class of ctypes.

    Returns:
        The argument, in a form that ctypes accepts.
    """
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    # The test for a tensor needs no PyTorch, because tokenizers load C code without PyTorch.
    if not hasattr(argument, "data_ptr"):
        return argument
    assert argument.is_contiguous()
    return ctypes.c_void_p(argument.data_ptr())


def c_compiler() -> list[str] | None:
    """Find the C compiler of the system.

    Returns:
        The command in the environment variable CC, else cc, gcc or clang. None if there is no compiler, or if a quote
        in CC is not closed.
    """
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError:
        return None
    commands = [asked] if asked else [["cc"], ["gcc"], ["clang"]]
    return next(([path, *rest] for first, *rest in commands if (path := shutil.which(first))), None)


def _load_or_compile(compiler: list[str], source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Load the library of a C file from the cache, or compile the file into the cache and load the library."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = "\0".join((*compiler, version, *COMPILE, *flags, THREADS, _processor())).encode()
    for content in _sources(source).values():
        parts += b"\0" + content
    name = f"{source.stem}-{_short_hash(parts)}"
    try:
        folder = cache_folder()
        return _cached(folder, name) or _compile_into(folder, name, compiler, source, flags)
    except (OSError, Unavailable, subprocess.CalledProcessError):
        # The cache is missing, read-only, full, or allows no execution, so the file is compiled for this process alone.
        with tempfile.TemporaryDirectory(prefix="timemix-") as work:
            return ctypes.CDLL(str(_compile(compiler, source, flags, Path(work) / f"{name}.so")))


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _cached(folder: Path, name: str) -> ctypes.CDLL | None:
    """Load a library from the cache, and remove damaged libraries of this name."""
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_short_hash(path.read_bytes())}":
            return ctypes.CDLL(str(path))
        path.unlink()
    return None


def _compile_into(folder: Path, name: str, compiler: list[str], source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Compile a C file into the cache folder, and load it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        compiled = _compile(compiler, source, flags, Path(work) / f"{name}.so")
        # The file gets its final name only when complete, because another process may load the file at any time.
        return ctypes.CDLL(str(compiled.replace(folder / f"{name}-{_short_hash(compiled.read_bytes())}.so")))


def _sources(source: Path) -> dict[Path, bytes]:
    """Return the content of a C file and of each file that it includes, in order of first inclusion."""
    found: dict[Path, bytes] = {}
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found[path] = path.read_bytes()
        for name in reversed(_INCLUDE.findall(found[path])):
            candidates = (folder / os.fsdecode(name) for folder in (path.parent, PACKAGE))
            # If an included file does not exist, the compiler reports the error.
            pending += [each.resolve() for each in candidates if each.is_file()][:1]
    return found


def _compile(compiler: list[str], source: Path, flags: tuple[str, ...], to: Path) -> Path:
    """Compile a C file and link a shared library at the path `to`."""

    def run(*arguments: str) -> None:
        subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True, timeout=120)

    part, include = str(to.with_suffix(".o")), ("-I", str(PACKAGE))
    try:
        run(*COMPILE, *flags, THREADS, *include, "-c", str(source), "-o", part)
        run("-shared", THREADS, part, "-lm", "-o", str(to))
    except subprocess.CalledProcessError:
        # The compiler may lack OpenMP, so the file is compiled again, for one thread.
        run(*COMPILE, *flags, *include, "-c", str(source), "-o", part)
        run("-shared", part, "-lm", "-o", str(to))
    return to


def _error_line(error: subprocess.SubprocessError) -> str:
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else str(error))


def _processor() -> str:
    """Describe the processor, because the result of -march=native depends on the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
