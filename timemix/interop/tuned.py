"""Import of states and low-rank terms that RWKV-PEFT has trained beside published weights.

    state:  blocks.N.att.time_state                 (H, values N, keys N), for each layer
    LoRA:   NAME.lora_A (R, inputs), NAME.lora_B (outputs, R), for some linear maps NAME.weight
            merged weight = NAME.weight + alpha / R lora_B lora_A

A file does not give alpha.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timemix.data.config import DataConfig
from timemix.errors import DamagedFile, InvalidValue
from timemix.generation.session import Session, session_to_bytes
from timemix.interop.importing import save_imported
from timemix.interop.published import check_numbers
from timemix.models.layers.lora import merged
from timemix.models.registry import find_architecture, load_part
from timemix.runs.load import Loaded, load
from timemix.storage.files import check_name, new_file, refuse_existing
from timemix.storage.tensors import read_tensors
from timemix.storage.torch_files import read_torch_file

STATE, DOWN, UP = ".att.time_state", ".lora_A", ".lora_B"

LORA_ALPHA = 16.0
"""Factor of the low-rank terms if nobody gives another."""


@dataclass(frozen=True)
class ImportedTuning:
    """The result of an import.

    Args:
        kind: "state" or "lora".
        tensors: Number of states, or of linear maps with low-rank terms.
    """

    kind: str
    tensors: int


def import_tuned(path: Path, run: Path, out: Path, *, alpha: float | None = None) -> ImportedTuning:
    """Import a state as a session of a run, or low-rank terms as a new run with merged weights.

    Args:
        path: A `.pth` file or a safetensors file of RWKV-PEFT.
        run: Run of the weights beside which the file was trained.
        out: File of the session, or folder of the new run. It must not exist.
        alpha: Factor of the low-rank terms, multiplied by the rank; above 0. RWKV-PEFT calls it lora_alpha.
            Default: 16.

    Returns:
        What the file contains.

    Raises:
        AlreadyExists: `out` exists.
        InvalidValue: The architecture of the run has no such state, or `alpha` is not above 0, or is given for a state.
        FileError: A file cannot be read, is damaged, or does not fit the run.
        CannotWrite: The session or the run cannot be written.
    """
    check_name(out)
    refuse_existing(out)
    if alpha is not None and not 0 < alpha < float("inf"):
        raise InvalidValue(f"lora_alpha is {alpha}; it must be above 0 and finite")
    tensors = read_tensors(path) if path.suffix.lower() == ".safetensors" else read_torch_file(path)
    for name, x in tensors.items():
        check_numbers(path, name, x)
    own = {name: x for name, x in tensors.items() if name.endswith((STATE, DOWN, UP))}
    if not own:
        raise DamagedFile(
            f"{path} has neither a tuned state (att.time_state) nor low-rank terms (lora_A, lora_B); give such a file,"
            " or import weights without --for"
        )
    if other := sorted(tensors.keys() - own.keys()):
        raise DamagedFile(
            f"{path} holds the weight {other[0]!r} too; merge all weights with the program that trained them, and"
            " import the merged weights without --for"
        )
    base = load(run, mapped=True)
    entry = find_architecture(base.config.model.arch)
    if entry.version is None:
        raise InvalidValue(f"{run} is a model of {entry.name}, which has no published form; give a run of RWKV-4 to 7")
    converter = load_part(str(entry.weights))
    if base.model.learned_state is not None:
        raise InvalidValue(f"{run} has a learned state; give the run whose weights were frozen: {base.config.start}")
    if any(name.endswith(STATE) for name in own):
        if alpha is not None:
            raise InvalidValue(f"lora_alpha has no effect on {path}, which holds a tuned state; leave lora_alpha out")
        session = Session(_state(path, own, base, converter), tokens=(), unread=0)
        with new_file(out) as temporary:
            temporary.write_bytes(session_to_bytes(session, base.model))
        return ImportedTuning("state", len(own))
    weights = _with_terms(path, own, base, converter, LORA_ALPHA if alpha is None else alpha)
    train = replace(base.config.train, steps=0, seconds=None, tokens=None, tune="all")
    old = base.config.data
    data = DataConfig(source="", tokenizer=old.tokenizer, unknown=old.unknown, template=old.template)
    config = replace(base.config, start=None, start_state=None, train=train, data=data)
    save_imported(out, weights, config, base.tokenizer)
    return ImportedTuning("lora", len(own) // 2)


def _state(path: Path, tensors: dict[str, Tensor], base: Loaded, converter: Any) -> Any:
    """Return the state before the first token that a file holds."""
    convert = getattr(converter, "state_from_published", None)
    if convert is None:
        raise InvalidValue(
            f"{base.folder} is a model of {base.config.model.arch}, which has no matrix states; give a run of RWKV-5, 6"
            " or 7"
        )
    state = base.model.init_state(1)
    names = [f"blocks.{layer}{STATE}" for layer in range(len(state.layers))]
    _check_names(path, tensors, names)
    for name, layer in zip(names, state.layers, strict=True):
        found = convert(tensors[name])
        _check_shape(path, name, found, tuple(layer["wkv"].shape[1:]))
        layer["wkv"].copy_(found)
        if not layer["wkv"].isfinite().all():
            raise DamagedFile(f"{path}: {name!r} has numbers that exceed float32; give a state of smaller numbers")
    return state


def _with_terms(
    path: Path, tensors: dict[str, Tensor], base: Loaded, converter: Any, alpha: float
) -> dict[str, Tensor]:
    """Return the weights of a model with the low-rank terms of a file, in the dtypes of the model."""
    weights = dict(base.model.state_dict())
    maps = {
        converter.published_name(f"{name}.weight").removesuffix(".weight"): f"{name}.weight"
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear) and (name.startswith("blocks.") or module is base.model.head)
    }
    stems = {name.removesuffix(DOWN).removesuffix(UP) for name in tensors}
    if unknown := sorted(stems - maps.keys()):
        raise DamagedFile(
            f"{path} has low-rank terms of {unknown[0]!r}, which the model in {base.folder} lacks; give the run that"
            " was tuned"
        )
    _check_names(path, tensors, [stem + end for stem in stems for end in (DOWN, UP)])
    for stem in sorted(stems):
        down, up, weight = tensors[stem + DOWN], tensors[stem + UP], weights[maps[stem]]
        rank = len(down) if down.ndim else 0
        _check_shape(path, stem + DOWN, down, (max(1, rank), weight.shape[1]))
        _check_shape(path, stem + UP, up, (weight.shape[0], rank))
        whole = weights[maps[stem]] = merged(weight, down.float(), up.float(), alpha / rank)
        if not torch.isfinite(whole).all():
            raise InvalidValue(
                f"the low-rank terms of {stem!r} in {path} exceed {weight.dtype} with lora_alpha {alpha:g}; give the"
                " lora_alpha of their training"
            )
    return weights


def _check_names(path: Path, tensors: dict[str, Tensor], needed: list[str]) -> None:
    """Check that a file has the needed tensors and no others."""
    for name in sorted(tensors.keys() ^ set(needed)):
        where = "has the unknown tensor" if name in tensors else "lacks"
        raise DamagedFile(f"{path} {where} {name!r}; give the file and the run that belong together")


def _check_shape(path: Path, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise DamagedFile(
            f"{path} does not fit the run: {name!r} is {list(x.shape)}, not {list(shape)}; give the run that was tuned"
        )
