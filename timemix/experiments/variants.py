"""The variants of an experiment. Shared fields, fields of a variant and a tuning point override a preset."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from timemix.config.presets import preset
from timemix.config.run import RunConfig
from timemix.config.version_1 import flattened
from timemix.errors import InvalidValue, nearest
from timemix.models.registry import ARCHITECTURES
from timemix.storage.settings import from_dict, to_dict

NO_FILE_NAME = frozenset('/\\:*?"<>|\n')
"""Characters that the name of a variant or a task must not have, because it names files."""
MOST_VARIANTS = 1000
"""Largest number of variants of an experiment, and largest number of verdicts."""


class Claim(Protocol):
    """A verdict of any kind of experiment, which compares two variants."""

    @property
    def better(self) -> str: ...

    @property
    def worse(self) -> str: ...


@dataclass(frozen=True)
class Variant:
    """A variant of a comparison."""

    name: str
    """Name of the variant and of its folder."""
    set: dict[str, Any] = field(default_factory=dict)
    """Fields of a run's config that have other values in this variant than in `base`."""
    label: str = ""
    """Name of the variant in tables and pictures. Default: `name`."""
    color: str = ""
    """Color of the variant in pictures, in matplotlib notation. Default: a color of a colour-blind-safe palette."""

    @property
    def heading(self) -> str:
        """Name of the variant in tables and pictures."""
        return self.label or self.name


def variant_config(preset_name: str, base: dict[str, Any], variant: Variant, point: dict[str, Any]) -> RunConfig:
    """Return the config of a preset, with the fields of `base`, a variant and a tuning point replaced.

    Settings of the model in `base` that the variant's architecture lacks, and another architecture has, are left out.

    Args:
        preset_name: Name of the preset.
        base: Config fields that all variants share.
        variant: The variant.
        point: Fields of the tuning point, with dotted names such as "train.lr".

    Raises:
        InvalidValue: A field or a value is not supported. The message names the variant.
    """
    try:
        own = merged(flattened(variant.set), flattened(nested(point)))
        shared = flattened(base)
        known = preset(preset_name, named_architecture(merged(shared, own))).model.__dataclass_fields__
        if isinstance(shared.get("model"), dict):
            model = {name: x for name, x in shared["model"].items() if name in known or not _is_setting(name)}
            shared = shared | {"model": model}
        own = merged(shared, own)
        config = from_dict(RunConfig, merged(to_dict(preset(preset_name, named_architecture(own))), own))
        if any(getattr(config.train, name) is not None for name in ("seconds", "tokens", "epochs")):
            raise InvalidValue(
                "train.seconds, train.tokens and train.epochs cannot be set in an experiment; give the experiment"
                " tokens or seconds"
            )
        return config
    except InvalidValue as error:
        raise InvalidValue(f"variant {variant.name!r}: {error}") from error


def _is_setting(name: str) -> bool:
    """Return whether any architecture has a setting."""
    return any(name in each.config.__dataclass_fields__ for each in ARCHITECTURES.values())


def named_architecture(fields: dict[str, Any]) -> str | None:
    """Return the architecture that fields of a run's config name; None if they name no architecture."""
    model = fields.get("model", {})
    return str(model["arch"]) if isinstance(model, dict) and "arch" in model else None


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested dictionaries. Values of `high` take precedence.

    Raises:
        InvalidValue: A name is a table in one dictionary and a value in the other dictionary.
    """
    both = dict(low)
    for name, value in high.items():
        old = both.get(name)
        if name in both and isinstance(old, dict) != isinstance(value, dict):
            raise InvalidValue(f"{name} is {(value if isinstance(old, dict) else old)!r}; it must be a table")
        both[name] = merged(old, value) if isinstance(old, dict) else value
    return both


def flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return nested fields with dotted names: `{"train": {"lr": 1}}` becomes `{"train.lr": 1}`."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return leaves


def nested(point: dict[str, Any]) -> dict[str, Any]:
    """Return fields with dotted names as nested fields: `{"train.lr": 1}` becomes `{"train": {"lr": 1}}`."""
    tree: dict[str, Any] = {}
    for path, value in point.items():
        for part in reversed(path.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return tree


def check_variants(variants: Sequence[Variant], verdicts: Sequence[Claim]) -> None:
    """Check the number, names, labels and colors of the variants of an experiment, and the names in its verdicts.

    Raises:
        InvalidValue: A check fails.
    """
    names = [v.name for v in variants]
    if max(len(variants), len(verdicts)) > MOST_VARIANTS:
        raise InvalidValue(
            f"the experiment has {len(variants)} variants and {len(verdicts)} verdicts; give at most {MOST_VARIANTS} of"
            " each"
        )
    if not names:
        raise InvalidValue("the experiment has no variant; add [[variants]] with a name")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidValue(f"two variants have the name {name!r}; give each variant its own name")
        if not name or name.startswith(".") or set(name) & NO_FILE_NAME:
            raise InvalidValue(f"variant name {name!r} cannot name a folder; use letters, digits and hyphens")
    labels = [v.heading for v in variants]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise InvalidValue(f"two variants have the label {label!r}; give each variant its own label")
    for variant in variants:
        if variant.color and not _is_color(variant.color):
            raise InvalidValue(
                f"variant {variant.name!r}: {variant.color!r} is not a matplotlib color; give a color such as red or"
                " #D55E00"
            )
    for verdict in verdicts:
        for name in (verdict.better, verdict.worse):
            if name not in names:
                raise InvalidValue(f"a verdict names the variant {name!r}{nearest(name, names)}")
        if verdict.better == verdict.worse:
            raise InvalidValue(f"a verdict compares the variant {verdict.better!r} with itself; name two variants")


def check_different(runs_of: dict[str, list[RunConfig]]) -> None:
    """Check that no two variants have the same runs.

    Args:
        runs_of: Configs of the runs by name of the variant.

    Raises:
        InvalidValue: Two variants have the same runs.
    """
    for (one, runs), (other, others) in itertools.combinations(runs_of.items(), 2):
        if runs == others:
            raise InvalidValue(
                f"variants {one!r} and {other!r} have the same settings, so their runs would be bit-identical;"
                " change a setting of one, or remove it"
            )


def _is_color(color: str) -> bool:
    from matplotlib.colors import is_color_like

    return color != "none" and is_color_like(color)
