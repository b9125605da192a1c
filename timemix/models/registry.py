"""The architectures: one entry each, without importing torch.

An entry names its parts as "module:name"; they are imported when a model is built. How to add one: CONTRIBUTING.md.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from timemix.errors import InvalidValue, nearest
from timemix.models.attention.config import ProConfig, RotaryConfig, RotaryShiftConfig
from timemix.models.config import ModelConfig
from timemix.models.llama.config import LlamaConfig
from timemix.models.rwkv1.config import Rwkv1Config, Rwkv1ExpConfig
from timemix.storage.settings import from_dict


@dataclass(frozen=True)
class Architecture:
    """Describe an architecture without importing torch.

    Args:
        name: Value of the setting `model.arch`.
        config: Class of its settings, derived from `ModelConfig`.
        model: "module:class" of its block, a `models.layers.block.Block`.
        year: Of its publication.
        colour: Of its curves in pictures.
        summary: What it is, in one line.
        decode: "module:class" of its compiled decode step, None where the model's own forward decodes.
        weights: Module that names its weights as published, None where none are.
        recurrent: "module" that turns a trained model into one with a constant state, None where there is none.
        bounded: Whether its context ends at ctx_len.
    """

    name: str
    config: type[ModelConfig]
    model: str
    year: int
    colour: str
    summary: str
    decode: str | None = None
    weights: str | None = None
    recurrent: str | None = None
    bounded: bool = True


ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture(
            "rwkv1",
            Rwkv1Config,
            "timemix.models.rwkv1.model:Rwkv1Block",
            2021,
            "red",
            "RWKV of 2021: time-mix with learned tables over time, channel-mix, token-shift",
            decode="timemix.models.rwkv1.decode:CompiledStep",
            weights="timemix.models.rwkv1.weights",
            recurrent="timemix.models.rwkv1.to_exponential",
        ),
        Architecture(
            "rwkv1_exp",
            Rwkv1ExpConfig,
            "timemix.models.rwkv1.model:Rwkv1ExpBlock",
            2021,
            "orange",
            "the same, its tables sums of exponentials: a recurrent network",
            decode="timemix.models.rwkv1.decode:CompiledStep",
            bounded=False,
        ),
        Architecture(
            "mha_rotary",
            RotaryConfig,
            "timemix.models.attention.model:RotaryBlock",
            2021,
            "gray",
            "attention with rotary positions, GeGLU",
            weights="timemix.models.rwkv1.weights",
        ),
        Architecture(
            "mha_shift",
            RotaryShiftConfig,
            "timemix.models.attention.model:RotaryBlock",
            2021,
            "green",
            "the same with token-shift",
            weights="timemix.models.rwkv1.weights",
        ),
        Architecture(
            "mha_pro",
            ProConfig,
            "timemix.models.attention.model:ProBlock",
            2021,
            "black",
            "attention times W, talking heads, token-shift, channel-mix",
            weights="timemix.models.rwkv1.weights",
        ),
        Architecture(
            "llama",
            LlamaConfig,
            "timemix.models.llama.model:LlamaBlock",
            2023,
            "blue",
            "attention with rotary positions, grouped heads, SwiGLU, RMSNorm",
            weights="timemix.models.llama.weights",
        ),
    )
}


DEFAULT_ARCHITECTURE = "rwkv1"


def register_architecture(entry: Architecture) -> None:
    """Register an architecture of your own, so that it can be trained, loaded, sampled and compared by its name.

    The registration lasts as long as the process. Register it before you load one of its runs. Its settings derive from
    `timemix.models.config.ModelConfig`, its block from `timemix.models.layers.block.Block`; CONTRIBUTING.md explains
    both. Registering the same entry twice has no effect.

    Args:
        entry: The architecture. The class that `entry.model` names is imported when a model is built. For a class of
            the calling module, write `f"{__name__}:MyBlock"`.

    Raises:
        InvalidValue: The name is empty, not an identifier, or that of another architecture; or `entry.config` is not
            derived from `ModelConfig`.
    """
    if not (isinstance(entry, Architecture) and isinstance(entry.name, str) and entry.name.isidentifier()):
        raise InvalidValue(f"{entry!r} is no architecture; pass an Architecture whose name is an identifier")
    if not (isinstance(entry.config, type) and issubclass(entry.config, ModelConfig)):
        raise InvalidValue(f"config of architecture {entry.name!r} is {entry.config!r}; derive it from ModelConfig")
    if ARCHITECTURES.setdefault(entry.name, entry) != entry:
        raise InvalidValue(f"architecture {entry.name!r} exists already; choose another name")


def list_architectures(*, bounded: bool | None = None) -> list[str]:
    """Return the names of the architectures.

    Args:
        bounded: True: those whose context ends at ctx_len. False: those whose context has no end. None: all.

    Returns:
        Names, oldest first.
    """
    return [name for name, each in ARCHITECTURES.items() if bounded is None or each.bounded == bounded]


def find_architecture(name: str) -> Architecture:
    """Return the entry of an architecture. Raises InvalidValue, with the nearest right name, for an unknown one."""
    # A file may hold a value of any type.
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InvalidValue(f"unknown architecture {name!r}{nearest(str(name), ARCHITECTURES)}")
    return ARCHITECTURES[name]


def model_config(arch: str, **fields: Any) -> ModelConfig:
    """Return the settings of an architecture: its own defaults, `fields` over them.

    Raises InvalidValue for an unknown architecture, a field that it lacks, and a value of a wrong type or out of range.
    """
    config = find_architecture(arch).config
    for name in fields:
        if name not in config.__dataclass_fields__:
            raise InvalidValue(f"{arch} has no field {name!r}{nearest(name, config.__dataclass_fields__)}")
    return from_dict(config, {"arch": arch, **fields}, "model.")


def like_size_of(config: ModelConfig, arch: str) -> ModelConfig:
    """Return the settings of another architecture at the same size, as far as it has the same fields."""
    known = find_architecture(arch).config.__dataclass_fields__
    names = ("vocab_size", "ctx_len", "layers", "heads", "channels", "ffn_ratio")
    return model_config(arch, **{n: getattr(config, n) for n in names if n in known and hasattr(config, n)})


def load_part(reference: str) -> Any:
    """Import what "module:name", or "module", refers to."""
    module, _, name = reference.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found
