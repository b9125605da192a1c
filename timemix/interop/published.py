"""Published weights: which version of RWKV a file or folder holds, and the settings and weights of the model.

The names of the weights give the version, and their shapes give all sizes. The code of the architecture converts names,
shapes and settings (`Architecture.weights` and `Architecture.hugging_face`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timemix.errors import DamagedFile, InvalidValue
from timemix.interop.hugging_face import model_type, read_folder
from timemix.interop.model_folder import MODEL_TYPE, PREFIX
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.registry import ARCHITECTURES, Architecture, load_part, model_config
from timemix.storage.tensors import read_tensors
from timemix.storage.torch_files import read_torch_file

_VARIANT_6 = "6 in a variant without releases (x060a, x060b or x060c)"
# Versions by a name that only this version and the versions above it in the table have
_VERSIONS = (
    ("8", r"\.ffn\.enn\.|rosa"),
    ("7b", r"\bqkv\."),
    ("7a", r"\.ffn\.s_emb"),
    ("7", r"\.att\.(r_k|k_k)$"),
    (_VARIANT_6, r"\.att\.gate_w1$"),
    ("6", r"\.time_maa_"),
    ("5", r"\.att\.ln_x\."),
    ("4", r"\.att\.time_decay$"),
)
_MODEL_TYPES = {f"rwkv{version}": version for version in ("5", "6")}
_PREFIXES = re.compile(r"\A(?:(?:_forward_module|module|_orig_mod)\.)+")
"""Prefixes of all names in files of models in DeepSpeed, in DistributedDataParallel and from torch.compile."""


@dataclass(frozen=True)
class Published:
    """A model from published weights.

    Args:
        config: Settings of the model.
        weights: Weights by their names in timemix, in the types of the file. The weights are mapped from the file.
        unused: Tensors of the file that the model does not use, by their published names.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    unused: dict[str, Tensor]


def version_of(names: set[str]) -> str | None:
    """Return the version of RWKV whose weights have these names, such as "7" or "7a"; None if no version has them."""
    version = next((version for version, name in _VERSIONS if any(re.search(name, each) for each in names)), None)
    if version == "6" and not any(name.endswith(".att.gate.weight") for name in names):
        return _VARIANT_6
    return version


def read_published(path: Path, ctx_len: int) -> Published:
    """Read a model from a `.pth` file, a safetensors file, or a folder of Hugging Face.

    Args:
        path: The file or folder.
        ctx_len: Context length in tokens, which published weights do not give. A folder of `timemix export` gives its
            own context length.

    Returns:
        The model.

    Raises:
        MissingFile: The file or folder does not exist.
        DamagedFile: The file is damaged, holds another model, or a weight is missing, not finite or of a wrong shape.
        FileError: The file cannot be read.
    """
    document = None
    if path.is_dir():
        weights, document = read_folder(path)
        if model_type(path, document) == MODEL_TYPE:
            return _exported(path, weights, document)
    else:
        weights = read_tensors(path) if path.suffix.lower() == ".safetensors" else read_torch_file(path)
    weights = _without_prefixes(path, weights)
    entry = _architecture(path, weights, document)
    if states := sorted(name for name in weights if name.endswith(".att.time_state")):
        raise DamagedFile(
            f"{path} has the tuned state {states[0]!r} beside weights; give weights without tuned states, and a file"
            " of the states alone with --for RUN"
        )
    converter = load_part(str(entry.weights))
    try:
        fields = {}
        if document is not None:
            form = load_part(str(entry.hugging_face))
            weights = form.from_hugging_face(weights)
            fields = form.settings(document, converter.our_config(weights, ctx_len))
        config = converter.our_config(weights, ctx_len, **fields)
        published = Published(config, converter.from_published(weights), converter.unused(weights))
    except InvalidValue as error:
        raise DamagedFile(f"{path} holds no model that timemix can read: {error}") from error
    _check(path, published, converter.published_name)
    return published


def _without_prefixes(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names without the prefixes of wrapped models."""
    named = {}
    for name, x in weights.items():
        short = _PREFIXES.sub("", name)
        if short in named:
            raise DamagedFile(f"{path} has {short!r} several times, with different prefixes; keep only one of them")
        named[short] = x
    return named


def _exported(path: Path, weights: dict[str, Tensor], document: dict[str, Any]) -> Published:
    """Return the model in a folder of `timemix export --to hf`, which other programs may have trained further."""
    settings = document.get("timemix")
    if not isinstance(settings, dict) or not isinstance(settings.get("arch"), str):
        raise DamagedFile(f"{path / 'config.json'} has no settings of timemix; restore it from a copy")
    try:
        config = model_config(**(settings | {"vocab_size": document.get("vocab_size")}))
    except InvalidValue as error:
        raise DamagedFile(f"{path / 'config.json'} has wrong settings of timemix: {error}") from error
    if other := sorted(name for name in weights if not name.startswith(PREFIX)):
        raise DamagedFile(f"{path} has the unknown weight {other[0]!r}; restore it from a copy")
    published = Published(config, {name.removeprefix(PREFIX): x for name, x in weights.items()}, {})
    _check(path, published, lambda name: PREFIX + name)
    return published


def _architecture(path: Path, weights: dict[str, Tensor], document: dict[str, Any] | None) -> Architecture:
    """Return the architecture of weights, or raise DamagedFile with the name of the version that the weights have."""
    known = {each.version: each for each in ARCHITECTURES.values() if each.version is not None}
    *first, last = (f"RWKV-{version}" for version in sorted(known))
    ours = f"{', '.join(first)} and {last}"
    if document is not None:
        forms = {version: each.hugging_face for version, each in known.items() if each.hugging_face is not None}
        types = {load_part(form).MODEL_TYPE: version for version, form in forms.items()}
        found = model_type(path, document)
        version = (types | _MODEL_TYPES).get(found)
        what = f"the config.json in {path} has model_type {found!r}"
    else:
        version = version_of(set(weights))
        what = f"{path} has no weight of a model of RWKV, such as 'blocks.0.att.key.weight'"
    if version is None:
        raise DamagedFile(f"{what}; give weights of {ours}: a file of the original code, or a folder of Hugging Face")
    if version not in known:
        raise DamagedFile(f"{path} holds weights of RWKV-{version}, which timemix does not support; import {ours}")
    if document is not None and known[version].hugging_face is None:
        raise DamagedFile(
            f"{path} is a folder of Hugging Face with RWKV-{version}, which timemix does not support; give a file of"
            " the original code"
        )
    return known[version]


def _check(path: Path, published: Published, name_in_file: Callable[[str], str]) -> None:
    """Check that weights have the names, shapes and types of the model, and are finite."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in LanguageModel(published.config).state_dict().items()}
    for name in sorted(shapes.keys() | published.weights.keys()):
        x = published.weights.get(name)
        if x is None or name not in shapes:
            where = "lacks" if x is None else "has the unknown weight"
            raise DamagedFile(f"{path} {where} {name_in_file(name)!r}; restore it from a copy")
        theirs = name_in_file(name)
        if x.shape != shapes[name]:
            raise DamagedFile(
                f"{path} is damaged: {theirs!r} is {list(x.shape)}, not {list(shapes[name])}; restore it from a copy"
            )
        check_numbers(path, theirs, x)


def check_numbers(path: Path, name: str, x: Tensor) -> None:
    """Check that a tensor of a file has a supported dtype and finite numbers.

    Args:
        path: The file.
        name: Name of the tensor in the file.
        x: The tensor.

    Raises:
        DamagedFile: The dtype is not supported, or a number is not finite.
    """
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise DamagedFile(f"{path} has {name!r} in {x.dtype}; give bfloat16, float16, float32 or float64")
    if not torch.isfinite(x).all():
        raise DamagedFile(f"{path} is damaged: {name!r} has a number that is not finite; restore it from a copy")
