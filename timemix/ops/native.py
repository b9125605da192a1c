"""C code of the package, compiled for this processor when it is first wanted, and kept in the user's cache."""

import ctypes
import functools
import hashlib
import os
import platform
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
def library(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """The compiled form of a C file, None where that fails; and by what it was compiled, or why not."""
    compiler = c_compiler()
    if compiler is None:
        return None, "no C compiler was found"
    key = hashlib.sha256("\0".join((compiler, *COMPILE, _processor())).encode() + source.read_bytes()).hexdigest()[:16]
    name = f"{source.stem}-{key}.so"
    try:
        kept = Path(pooch.os_cache("timemix")) / name
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                # Renamed when whole: another process may look for it now.
                _compile(compiler, source, Path(folder) / name).replace(kept)
        return ctypes.CDLL(str(kept)), f"compiled by {compiler}"
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return None, f"{compiler} failed: {said[0] if said else error}"
    except OSError as error:
        return None, f"the compiled code cannot be kept or loaded: {error}"


def c_compiler() -> str | None:
    """Path of the system's C compiler, None where there is none."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _compile(compiler: str, source: Path, to: Path) -> Path:
    def run(*arguments: str) -> None:
        subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True, timeout=120)

    part = str(to.with_suffix(".o"))
    try:
        run(*COMPILE, THREADS, "-c", str(source), "-o", part)
        run("-shared", THREADS, part, "-lm", "-o", str(to))
    except subprocess.CalledProcessError:
        # A compiler without OpenMP leaves the threads out.
        run(*COMPILE, "-c", str(source), "-o", part)
        run("-shared", part, "-lm", "-o", str(to))
    return to


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
