"""timemix: train, compare and run RWKV language models.

    run = timemix.train("cpu-small", "runs/mine", data="text.txt")
    timemix.generate(run, "The ", tokens=100)

The public interface consists of the names in `timemix.__all__`, the ops of `timemix.ops` and the module `timemix.hf`.
All other modules are internal: their interface can change in any version. `import timemix` does not import PyTorch:
each name is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from timemix import errors
from timemix._version import __version__

if TYPE_CHECKING:
    from timemix.evaluation.texts import evaluate
    from timemix.generation.engine import Engine
    from timemix.generation.generate import generate, stream
    from timemix.generation.prefix_cache import PrefixCache
    from timemix.generation.request import Request
    from timemix.generation.sampler import Sampler
    from timemix.generation.session import (
        Session,
        load_session,
        save_session,
        session_from_bytes,
        session_to_bytes,
    )
    from timemix.models.language_model import build_model
    from timemix.models.registry import Architecture, list_architectures, register_architecture
    from timemix.runs.load import load
    from timemix.training.train import train


_MODULES = {
    "Architecture": "timemix.models.registry",
    "Engine": "timemix.generation.engine",
    "PrefixCache": "timemix.generation.prefix_cache",
    "Request": "timemix.generation.request",
    "Sampler": "timemix.generation.sampler",
    "Session": "timemix.generation.session",
    "build_model": "timemix.models.language_model",
    "evaluate": "timemix.evaluation.texts",
    "generate": "timemix.generation.generate",
    "list_architectures": "timemix.models.registry",
    "load": "timemix.runs.load",
    "load_session": "timemix.generation.session",
    "register_architecture": "timemix.models.registry",
    "save_session": "timemix.generation.session",
    "session_from_bytes": "timemix.generation.session",
    "session_to_bytes": "timemix.generation.session",
    "stream": "timemix.generation.generate",
    "train": "timemix.training.train",
}
"""The module that defines each public name."""

__all__ = [
    "Architecture",
    "Engine",
    "PrefixCache",
    "Request",
    "Sampler",
    "Session",
    "__version__",
    "build_model",
    "errors",
    "evaluate",
    "generate",
    "list_architectures",
    "load",
    "load_session",
    "register_architecture",
    "save_session",
    "session_from_bytes",
    "session_to_bytes",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'timemix' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
