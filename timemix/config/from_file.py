"""Settings of a new run from a file: a run's config.toml, or one written by hand with only some fields."""

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from timemix.config.presets import DEFAULT_PRESET, preset
from timemix.config.run import FORMAT_VERSION, RunConfig, check_budget, current
from timemix.errors import DamagedFile
from timemix.models.config import ModelConfig
from timemix.models.registry import DEFAULT_ARCHITECTURE, find_architecture
from timemix.storage.settings import UNFIT, from_dict, parse_toml, to_dict


def config_from_file(path: Path, name: str = DEFAULT_PRESET, arch: str | None = None) -> RunConfig:
    """Return the settings of a file over those of a preset.

    The vocabulary size is the preset's: the tokens of the new run decide it.

    Args:
        path: TOML of the form of a run folder's config.toml; any field, and `format_version`, may be missing.
        name: Preset that gives the missing fields.
        arch: Architecture instead of that of the file; the fields that both have in the same sense are kept.

    Raises:
        FileError: For a file that is missing, not TOML or of a newer format, or has a wrong field or value.
    """
    data = parse_toml(path)
    try:
        tables = current(data, FORMAT_VERSION)
        model = tables.get("model")
        given = model if isinstance(model, dict) else {}
        own = given.get("arch", arch or DEFAULT_ARCHITECTURE)
        find_architecture(own)
        check_budget(train if isinstance(train := tables.get("train"), dict) else {})
    except UNFIT as error:
        raise DamagedFile(f"{path}: {error}") from error
    base, other = preset(name, own), preset(name, arch or own)
    try:
        config = from_dict(RunConfig, _merged(to_dict(base), tables))
        config = replace(config, model=replace(config.model, vocab_size=base.model.vocab_size))
        if other.model.arch != own:
            config = replace(config, model=_carried(config.model, given, other.model))
        return config
    except UNFIT as error:
        raise DamagedFile(f"{path}: {error}") from error


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return the tables `over` laid upon the tables `under`, field by field."""
    both = {name: under[name] | table for name, table in over.items() if isinstance(table, dict) and name in under}
    return under | over | both


def _carried(old: ModelConfig, given: dict[str, Any], new: ModelConfig) -> ModelConfig:
    """Return `new` with those of the `given` fields of `old` that have the same type in its class."""
    theirs, ours = typing.get_type_hints(type(old)), typing.get_type_hints(type(new))
    same = [name for name in given if name not in ("arch", "vocab_size") and ours.get(name) == theirs[name]]
    return replace(new, **{name: getattr(old, name) for name in same})
