"""The registry of architectures, which does not import PyTorch.

An entry names each part of an architecture as "module:name". The parts of an architecture are imported when a model is
built. CONTRIBUTING.md explains how to add an architecture.
"""

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

from timemix.errors import InvalidValue, nearest
from timemix.models.attention.config import ProConfig, RotaryConfig, RotaryShiftConfig
from timemix.models.config import ModelConfig
from timemix.models.llama.config import LlamaConfig
from timemix.models.rwkv1.config import Rwkv1Config, Rwkv1ExpConfig
from timemix.models.rwkv4.config import Rwkv4Config
from timemix.models.rwkv6.config import Rwkv5Config, Rwkv6Config
from timemix.models.rwkv7.config import Rwkv7Config
from timemix.storage.settings import from_dict


@dataclass(frozen=True)
class Architecture:
    """Describe an architecture without importing PyTorch.

    Args:
        name: Value of the setting `model.arch`.
        config: Class of the settings, derived from `ModelConfig`.
        model: "module:class" of the block, derived from `models.layers.block.Block`.
        year: Year of publication.
        colour: Colour of the architecture's curves in pictures.
        summary: Description of the architecture in one line.
        decode: "module:class" of the compiled decode step; None: the model's own forward pass computes each step.
        weights: "module" or "module:object" that converts weights from and to published names; None: there are no
            published names.
        version: Version of the published models of RWKV whose weights `weights` converts, such as "7"; None: timemix
            imports no published models.
        hugging_face: "module" that converts weights and settings from and to the Hugging Face form; None: no such
            module.
        recurrent: "module" that converts a trained model to a model with a constant state; None: no such module.
        bounded: Whether the context of the architecture ends at ctx_len.
        gguf: "module" that converts published weights and settings to GGUF, for llama.cpp; None: no such module.
    """

    name: str
    config: type[ModelConfig]
    model: str
    year: int
    colour: str
    summary: str
    decode: str | None = None
    weights: str | None = None
    version: str | None = None
    hugging_face: str | None = None
    recurrent: str | None = None
    bounded: bool = True
    gguf: str | None = None


ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture(
            "rwkv1",
            Rwkv1Config,
            "timemix.models.rwkv1.model:Rwkv1Block",
            2021,
            "red",
            "RWKV of 2021: time-mix with learned curves over time, channel-mix, token-shift",
            decode="timemix.models.rwkv1.decode:Rwkv1Step",
            weights="timemix.models.rwkv1.weights",
            recurrent="timemix.models.rwkv1.to_exponential",
        ),
        Architecture(
            "rwkv1_exp",
            Rwkv1ExpConfig,
            "timemix.models.rwkv1.model:Rwkv1ExpBlock",
            2021,
            "orange",
            "rwkv1 whose curves are sums of exponentials: a recurrent network with a state of constant size",
            decode="timemix.models.rwkv1.decode:Rwkv1Step",
            bounded=False,
        ),
        Architecture(
            "mha_rotary",
            RotaryConfig,
            "timemix.models.attention.model:RotaryBlock",
            2021,
            "gray",
            "multi-head attention with rotary positions, GeGLU",
            decode="timemix.models.attention.decode:AttentionStep",
            weights="timemix.models.rwkv1.weights",
        ),
        Architecture(
            "mha_shift",
            RotaryShiftConfig,
            "timemix.models.attention.model:RotaryBlock",
            2021,
            "green",
            "mha_rotary with token-shift",
            decode="timemix.models.attention.decode:AttentionStep",
            weights="timemix.models.rwkv1.weights",
        ),
        Architecture(
            "mha_pro",
            ProConfig,
            "timemix.models.attention.model:ProBlock",
            2021,
            "black",
            "multi-head attention times W, talking heads, rotary positions, token-shift, channel-mix",
            weights="timemix.models.rwkv1.weights",
        ),
        Architecture(
            "llama",
            LlamaConfig,
            "timemix.models.llama.model:LlamaBlock",
            2023,
            "blue",
            "Llama: attention with rotary positions, grouped key and value heads, SwiGLU, RMSNorm",
            decode="timemix.models.llama.decode:LlamaStep",
            weights="timemix.models.llama.weights",
        ),
        Architecture(
            "rwkv4",
            Rwkv4Config,
            "timemix.models.rwkv4.model:Rwkv4Block",
            2022,
            "olive",
            "RWKV-4: a recurrent network whose state, two sums per channel, decays exponentially",
            decode="timemix.models.rwkv4.decode:Rwkv4Step",
            weights="timemix.models.rwkv4.weights",
            version="4",
            hugging_face="timemix.models.rwkv4.hugging_face",
            bounded=False,
        ),
        Architecture(
            "rwkv5",
            Rwkv5Config,
            "timemix.models.rwkv6.model:Rwkv5Block",
            2023,
            "teal",
            "RWKV-5.2: a recurrent network whose state, one matrix per head, decays at a rate per channel",
            decode="timemix.models.rwkv6.decode:Rwkv6Step",
            weights="timemix.models.rwkv6.weights:RWKV_5",
            version="5",
            bounded=False,
        ),
        Architecture(
            "rwkv6",
            Rwkv6Config,
            "timemix.models.rwkv6.model:Rwkv6Block",
            2024,
            "magenta",
            "RWKV-6: RWKV-5 whose decays and token-shift depend on the token",
            decode="timemix.models.rwkv6.decode:Rwkv6Step",
            weights="timemix.models.rwkv6.weights:RWKV_6",
            version="6",
            gguf="timemix.models.rwkv6.gguf",
            bounded=False,
        ),
        Architecture(
            "rwkv7",
            Rwkv7Config,
            "timemix.models.rwkv7.model:Rwkv7Block",
            2025,
            "purple",
            "RWKV-7: a recurrent network whose state, one matrix per head, changes by a generalized delta rule",
            decode="timemix.models.rwkv7.decode:Rwkv7Step",
            weights="timemix.models.rwkv7.weights",
            version="7",
            gguf="timemix.models.rwkv7.gguf",
            hugging_face="timemix.models.rwkv7.hugging_face",
            bounded=False,
        ),
    )
}


DEFAULT_ARCHITECTURE = "rwkv1"


def register_architecture(entry: Architecture) -> None:
    """Register an architecture of your own, so that timemix can train, load, sample and compare it by name.

    The registration lasts as long as the process. Register the architecture before you load one of its runs. The class
    of the settings derives from `timemix.models.config.ModelConfig`. The class of the block derives from
    `timemix.models.layers.block.Block`. CONTRIBUTING.md explains both classes. Registering an entry a second time has
    no effect.

    Args:
        entry: The architecture. The class that `entry.model` names is imported when a model is built. For a class of
            the calling module, write `f"{__name__}:MyBlock"`.

    Raises:
        InvalidValue: The name is empty, is not an identifier, or belongs to another architecture, or `entry.config` is
            not derived from `ModelConfig`.
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
        bounded: True: only architectures whose context ends at ctx_len. False: only architectures whose context has no
            end. None: all architectures.

    Returns:
        The names, in the order of registration.
    """
    return [name for name, each in ARCHITECTURES.items() if bounded is None or each.bounded == bounded]


def find_architecture(name: str) -> Architecture:
    """Return the registry entry of an architecture.

    Args:
        name: Name of the architecture.

    Returns:
        The entry.

    Raises:
        InvalidValue: The name is unknown.
    """
    # The name may come from a file, which can hold a value of any type.
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InvalidValue(f"unknown architecture {name!r}{nearest(str(name), ARCHITECTURES)}")
    return ARCHITECTURES[name]


def model_config(arch: str, **fields: Any) -> ModelConfig:
    """Return the settings of an architecture: its defaults, with some fields replaced.

    Args:
        arch: Name of the architecture.
        **fields: Values of fields that replace the defaults.

    Returns:
        The settings.

    Raises:
        InvalidValue: The architecture is unknown or lacks a field, or a value has a wrong type or is out of its range.
    """
    config = find_architecture(arch).config
    known = [each.name for each in dataclasses.fields(config)]
    for name in fields:
        if name not in known:
            raise InvalidValue(f"{arch} has no field {name!r}{nearest(name, known)}")
    return from_dict(config, {"arch": arch, **fields}, "model.")


def like_size_of(config: ModelConfig, arch: str) -> ModelConfig:
    """Return settings of another architecture, with the size of a given model.

    Args:
        config: Settings that give the size.
        arch: Name of the architecture of the new settings.

    Returns:
        The settings of the architecture `arch`, with the sizes of `config` in all fields that both architectures have.
    """
    known = find_architecture(arch).config.__dataclass_fields__
    names = ("vocab_size", "ctx_len", "layers", "heads", "channels", "ffn_ratio")
    fields = {n: getattr(config, n) for n in names if n in known and hasattr(config, n)}
    # In some architectures, 0 stands for a rule that other architectures do not have.
    if fields.get("ffn_ratio") == 0 and hasattr(config, "ffn_hidden"):
        fields["ffn_ratio"] = config.ffn_hidden / config.channels
    return model_config(arch, **fields)


def load_part(reference: str) -> Any:
    """Import a part of an architecture.

    Args:
        reference: "module:name", or "module".

    Returns:
        The object that the reference names, or the module.
    """
    module, _, name = reference.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found
