"""Settings of a new run from a TOML file. The file may have all or only some fields of a config.toml."""

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from timemix.config.presets import DEFAULT_PRESET, preset
from timemix.config.run import FORMAT_VERSION, RunConfig, check_budget, current
from timemix.errors import DamagedFile
from timemix.models.config import ModelConfig
from timemix.models.registry import find_architecture
from timemix.storage.settings import UNFIT, from_dict, parse_toml, to_dict


def config_from_file(path: Path, name: str = DEFAULT_PRESET, arch: str | None = None) -> RunConfig:
    """Return the config in a file. A preset supplies the fields that the file lacks.

    The vocabulary size always comes from the preset: training later sets the final vocabulary size from the tokenizer.

    Args:
        path: TOML file with the fields of a config.toml. Any field may be missing, including `format_version`.
        name: Name of the preset.
        arch: Architecture that replaces the architecture in the file; None: no replacement. Fields that both
            architectures have, with the same type, keep their values from the file.

    Raises:
        FileError: The file is missing, is not TOML, has a newer format version, or has an invalid field or value.
        InvalidValue: The preset or `arch` is unknown.
    """
    data = parse_toml(path)
    try:
        tables = current(data, FORMAT_VERSION)
        model = tables.get("model")
        given = model if isinstance(model, dict) else {}
        own = given.get("arch", arch)
        if own is not None:
            find_architecture(own)
        check_budget(train if isinstance(train := tables.get("train"), dict) else {})
    except UNFIT as error:
        raise DamagedFile(f"{path}: {error}") from error
    base, other = preset(name, own), preset(name, arch or own)
    try:
        config = from_dict(RunConfig, _merged(to_dict(base), tables))
        config = replace(config, model=replace(config.model, vocab_size=base.model.vocab_size))
        if other.model.arch != base.model.arch:
            config = replace(config, model=_carried(config.model, given, other.model))
        return config
    except UNFIT as error:
        raise DamagedFile(f"{path}: {error}") from error


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two dictionaries of TOML tables. A field in `over` replaces the field of the same name in `under`."""
    both = {name: under[name] | table for name, table in over.items() if isinstance(table, dict) and name in under}
    return under | over | both


def _carried(old: ModelConfig, given: dict[str, Any], new: ModelConfig) -> ModelConfig:
    """Return the settings `new`, with the value of `old` in each given field of equal type in both classes."""
    theirs, ours = typing.get_type_hints(type(old)), typing.get_type_hints(type(new))
    same = [name for name in given if name not in ("arch", "vocab_size") and ours.get(name) == theirs[name]]
    return replace(new, **{name: getattr(old, name) for name in same})
