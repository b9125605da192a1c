"""timemix: train, compare and run RWKV language models.

run = timemix.load("runs/demo")
timemix.generate(run, "The ", tokens=100)
"""

from typing import TYPE_CHECKING, Any

from timemix._version import __version__
from timemix.errors import TimemixError

if TYPE_CHECKING:
    from timemix.generation.generate import generate
    from timemix.runs.load import load


__all__ = ["TimemixError", "__version__", "generate", "load"]


def __getattr__(name: str) -> Any:
    # Importing the package must not import torch.
    if name == "load":
        from timemix.runs.load import load

        return load
    if name == "generate":
        from timemix.generation.generate import generate

        return generate
    raise AttributeError(f"module 'timemix' has no attribute {name!r}")
