"""Folders of Hugging Face: `config.json` with the settings of a model, and its weights in one or several files."""

from pathlib import Path
from typing import Any

from torch import Tensor

from timemix.errors import DamagedFile, MissingFile
from timemix.storage.json_files import read_json
from timemix.storage.tensors import read_tensors
from timemix.storage.torch_files import read_torch_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and the settings in a folder.

    Args:
        folder: The folder.

    Returns:
        Weights by the names in the folder, mapped from the files, and the content of `config.json`.

    Raises:
        MissingFile: The folder has no `config.json` or no weights.
        FileError: A file is damaged or cannot be read.
    """
    if not (folder / "config.json").exists():
        raise MissingFile(f"{folder} has no config.json; give a folder of Hugging Face, or a .pth file")
    document = read_json(folder / "config.json")
    if (folder / WEIGHTS).exists():
        return read_tensors(folder / WEIGHTS), document
    if (folder / INDEX).exists():
        return _read_parts(folder), document
    if (folder / PICKLED).exists():
        return read_torch_file(folder / PICKLED), document
    raise MissingFile(f"{folder} has neither {WEIGHTS} nor {INDEX} nor {PICKLED}; restore it from a copy")


def _read_parts(folder: Path) -> dict[str, Tensor]:
    """Read weights from the files that an index names."""
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise DamagedFile(f"{folder / INDEX} is damaged: it has no weight_map; restore it from a copy")
    if outside := sorted({file for file in files.values() if Path(file).name != file}):
        raise DamagedFile(f"{folder / INDEX} is damaged: it names the file {outside[0]!r}; restore it from a copy")
    found: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        tensors = read_tensors(folder / file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise DamagedFile(f"{folder} has {twice[0]!r} in two files; restore it from a copy")
        found |= tensors
    if missing := sorted(files.keys() - found.keys()):
        raise DamagedFile(f"{folder} is incomplete: no file has {missing[0]!r}; restore it from a copy")
    return found


def model_type(folder: Path, document: dict[str, Any]) -> str:
    """Return the field `model_type` of a `config.json`. Raise DamagedFile if the field is not a text."""
    found = document.get("model_type")
    if not isinstance(found, str):
        raise DamagedFile(f"{folder / 'config.json'} has model_type {found!r}; restore it from a copy")
    return found
