"""C code of the package, compiled for this processor when it is first wanted, and kept in the user's cache."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pooch

# Mathematical functions of whole vectors are declared under -ffast-math alone. Not when linking: it would have the
# processor round small numbers to zero in the whole process.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fPIC")
THREADS = "-fopenmp"


@functools.cache
def library(source: Path, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """The compiled form of a C file, None where that fails; and by what it was compiled, or why not.

    `flags`: of the compiler, after those of all files.
    """
    compiler = c_compiler()
    if compiler is None:
        named = f": CC is {os.environ['CC']!r}" if os.environ.get("CC") else ""
        return None, f"no C compiler was found{named}"
    try:
        return _kept_or_made(compiler, source, flags), f"compiled by {shlex.join(compiler)}"
    except subprocess.SubprocessError as error:
        return None, f"{shlex.join(compiler)} failed: {_what_failed(error)}"
    except OSError as error:
        return None, f"the compiled code cannot be kept or loaded: {error}"


def c_compiler() -> list[str] | None:
    """The command of the system's C compiler, None where there is none."""
    asked = shlex.split(os.environ.get("CC", ""))
    commands = [asked] if asked else [["cc"], ["gcc"], ["clang"]]
    return next(([path, *rest] for first, *rest in commands if (path := shutil.which(first))), None)


def _kept_or_made(compiler: list[str], source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    parts = "\0".join((*compiler, said, *COMPILE, *flags, THREADS, _processor())).encode() + source.read_bytes()
    name = f"{source.stem}-{hashlib.sha256(parts).hexdigest()[:16]}.so"
    folder = Path(pooch.os_cache("timemix"))
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(folder / name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            # Renamed when whole: another process may look for it now.
            return ctypes.CDLL(str(_compile(compiler, source, flags, Path(work) / name).replace(folder / name)))
    except OSError:
        # A cache that cannot be written, or holds no code that runs: for this process alone.
        with tempfile.TemporaryDirectory(prefix="timemix-") as work:
            return ctypes.CDLL(str(_compile(compiler, source, flags, Path(work) / name)))


def _compile(compiler: list[str], source: Path, flags: tuple[str, ...], to: Path) -> Path:
    def run(*arguments: str) -> None:
        subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True, timeout=120)

    part = str(to.with_suffix(".o"))
    try:
        run(*COMPILE, *flags, THREADS, "-c", str(source), "-o", part)
        run("-shared", THREADS, part, "-lm", "-o", str(to))
    except subprocess.CalledProcessError:
        # A compiler without OpenMP leaves the threads out.
        run(*COMPILE, *flags, "-c", str(source), "-o", part)
        run("-shared", part, "-lm", "-o", str(to))
    return to


def _what_failed(error: subprocess.SubprocessError) -> str:
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else str(error))


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
