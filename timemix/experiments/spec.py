"""Experiment files: what is compared, on equal terms, and what would confirm a claim."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from timemix.config.presets import preset
from timemix.config.run import RunConfig
from timemix.config.version_1 import flattened
from timemix.errors import DamagedFile, InvalidValue, MissingFile, nearest
from timemix.models.registry import DEFAULT_ARCHITECTURE, find_architecture
from timemix.storage.settings import UNFIT, from_dict, parse_toml, to_dict

TUNING_SEED = 0
# Tokens of held-out text that the texts of a sampling experiment continue.
PROMPT_TOKENS = 32
MOST_VARIANTS = 1000
MOST_TUNING_RUNS = 10_000


@dataclass(frozen=True)
class Variant:
    """One of the things compared: `set` holds the fields of a run's config in which it differs from the rest."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    color: str = ""

    @property
    def heading(self) -> str:
        """What tables and pictures call it."""
        return self.label or self.name


@dataclass(frozen=True)
class Verdict:
    """A claim that one variant reaches a lower held-out loss than another."""

    claim: str
    better: str
    worse: str
    at_step: int | None = None
    """After this step, which must be validated, rather than at the end."""
    first_positions: int | None = None
    """Over so many first positions of the window rather than all; needs `by_position`."""


@dataclass(frozen=True)
class SpeedVerdict:
    """A claim that one variant is faster than another, or needs less memory, at the longest context length."""

    claim: str
    better: str
    worse: str
    of: Literal["tokens_per_second", "memory"] = "tokens_per_second"


@dataclass(frozen=True)
class Experiment:
    """An experiment file. Every variant is `preset`, then `base`, then its own `set`, then the best tuning point."""

    title: str
    variants: tuple[Variant, ...]
    tokens: int | None = None
    """Training tokens of every run."""
    seconds: float | None = None
    """Training time of every run instead: the steps that fit are measured once per variant."""
    seeds: tuple[int, ...] = (1, 2, 3)
    preset: str = "cpu-small"
    base: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    """Grid of config fields, `train.lr = [1e-3, 3e-3]`; tried with seed 0 on the last 5 % of the training text."""
    prompts: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    by_position: bool = False
    """Also measure the held-out loss at each position of the window."""

    def __post_init__(self) -> None:
        _check_variants(self.variants, self.verdicts)
        if (self.tokens is None) == (self.seconds is None):
            raise InvalidValue("give a budget: either tokens or seconds")
        if not 0 < (self.tokens if self.tokens is not None else self.seconds or 0) < math.inf:
            raise InvalidValue("the budget must be above 0, and finite")
        if not self.seeds:
            raise InvalidValue("it has no seeds")
        if len(set(self.seeds)) < len(self.seeds):
            raise InvalidValue(f"seeds {list(self.seeds)}: one stands twice")
        if min(self.seeds) < 0 or (self.tune and TUNING_SEED in self.seeds):
            raise InvalidValue(f"seeds {list(self.seeds)}: they start at 1, since tuning takes seed {TUNING_SEED}")
        for key, values in _flat(self.tune).items():
            if not isinstance(values, list) or not values:
                raise InvalidValue(f"tune.{key} is {values!r}; it must be a list of values")
            if key.startswith("data."):
                raise InvalidValue(f"tune.{key}: the text is the same for all points of a grid")
        runs = len(self.variants) * math.prod(map(len, _flat(self.tune).values()))
        if runs > MOST_TUNING_RUNS:
            raise InvalidValue(f"tune asks for {runs} runs; at most {MOST_TUNING_RUNS} can be made")
        if "" in self.prompts:
            raise InvalidValue("a prompt is empty; it needs at least one character")
        runs_of = {variant.name: self._check_runs(variant) for variant in self.variants}
        _check_different(runs_of)
        if any(v.first_positions is not None for v in self.verdicts) and not self.by_position:
            raise InvalidValue("a verdict on the first positions needs by_position = true")

    def _check_runs(self, variant: Variant) -> list[RunConfig]:
        """Runs of a variant with the first seed, one for each tuning point; raises InvalidValue if one cannot be."""
        runs = [self.config(variant, point, self.seeds[0]) for point in self.points_of(variant).values()]
        train = runs[-1].train
        for verdict in self.verdicts:
            step, judged = verdict.at_step, variant.name in (verdict.better, verdict.worse)
            if step and judged and (step % train.valid_every or (self.tokens and step > train.steps)):
                raise InvalidValue(f"a verdict asks for step {step}, which is not validated")
        return runs

    def tuning_points(self) -> list[dict[str, Any]]:
        """Every combination of the tuning grid; one empty point where there is none."""
        grid = _flat(self.tune)
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def points_of(self, variant: Variant) -> dict[int, dict[str, Any]]:
        """Return the points of the grid that differ for a variant, by their number in `tuning_points`.

        A field of the model that the variant's architecture lacks, and another variant's has, is left out.
        """
        left_out = [key for key in _flat(self.tune) if self._lacks(variant, key) and not self._all_lack(key)]
        first = {key: _flat(self.tune)[key][0] for key in left_out}
        return {
            number: {key: value for key, value in point.items() if key not in first}
            for number, point in enumerate(self.tuning_points())
            if all(point[key] == value for key, value in first.items())
        }

    def _lacks(self, variant: Variant, key: str) -> bool:
        arch = _architecture(flattened(merged(self.base, variant.set)))
        name = key.rpartition(".")[2]
        return key.startswith("model.") and name not in find_architecture(arch).config.__dataclass_fields__

    def _all_lack(self, key: str) -> bool:
        return all(self._lacks(variant, key) for variant in self.variants)

    def config(self, variant: Variant, point: dict[str, Any], seed: int, steps: int | None = None) -> RunConfig:
        """The run of a variant at a tuning point. `steps` overrides the budget in tokens.

        Raises TimemixError, naming the variant, for fields or values that no run takes.
        """
        config = variant_config(self.preset, self.base, variant, point)
        if steps is None:
            steps = config.train.steps
            if self.tokens is not None:
                steps = max(1, round(self.tokens / (config.train.batch_size * config.window)))
        return replace(config, train=replace(config.train, seed=seed, steps=steps))


@dataclass(frozen=True)
class SamplingExperiment:
    """Filters of a trained model's probabilities, compared at like entropy, and a sweep over the factors of top-a.

    `writer` and `judge` are fields of a run's config, trained first: the judge, a larger model, measures what the
    writer writes.
    """

    title: str
    writer: dict[str, Any]
    judge: dict[str, Any]
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.3)
    top_a: tuple[float, ...] = (0.005, 0.02, 0.05, 0.1, 0.2)
    powers: tuple[float, ...] = (1.0, 2.0, 3.0)
    samples: int = 64
    """Texts written per setting."""
    tokens: int = 256
    """Tokens of each."""
    preset: str = "cpu-small"
    base: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples < 2 or self.tokens < 8 or not (self.temperatures and self.top_a and self.powers):
            raise InvalidValue("give at least 2 samples of 8 tokens, and values of temperatures, top_a and powers")
        if not all(0 < t < math.inf for t in self.temperatures):
            raise InvalidValue(f"temperatures {list(self.temperatures)} must be above 0")
        if not (all(0 < a <= 1 for a in self.top_a) and all(0 <= p < math.inf for p in self.powers)):
            raise InvalidValue("top_a must lie above 0 and be at most 1, powers be 0 or more")
        self.config("writer")
        limit = self.config("judge").model.ctx_len
        if PROMPT_TOKENS + self.tokens > limit:
            length = f"{PROMPT_TOKENS} tokens of prompt and {self.tokens} of text"
            raise InvalidValue(f"{length} are more than the judge's ctx_len {limit}")

    def config(self, name: Literal["writer", "judge"]) -> RunConfig:
        """Run config of writer or judge. Raises TimemixError for fields or values that no run takes."""
        return variant_config(self.preset, self.base, Variant(name, getattr(self, name)), {})


@dataclass(frozen=True)
class SpeedExperiment:
    """Speed and memory of a training step, each variant at each context length, the same tokens per step throughout."""

    title: str
    variants: tuple[Variant, ...]
    ctx_lens: tuple[int, ...]
    tokens: int
    """Tokens of a step: the batch is tokens / ctx_len windows."""
    rounds: int = 3
    """Measurements of each, taken in turn; at least 2 give an interval."""
    preset: str = "cpu-small"
    base: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 80
    verdicts: tuple[SpeedVerdict, ...] = ()

    def __post_init__(self) -> None:
        _check_variants(self.variants, self.verdicts)
        if self.rounds < 1 or not self.ctx_lens or any(t < 1 or self.tokens % t for t in self.ctx_lens):
            raise InvalidValue("ctx_lens must divide tokens, and rounds be at least 1")
        for variant in self.variants:
            self.config(variant, self.ctx_lens[0])

    def config(self, variant: Variant, ctx_len: int) -> RunConfig:
        """Run config of a variant at a context length. Raises TimemixError for fields or values that no run takes."""
        config = variant_config(self.preset, self.base, variant, {})
        model = replace(config.model, ctx_len=ctx_len, vocab_size=self.vocab_size)
        return replace(config, model=model, train=replace(config.train, batch_size=self.tokens // ctx_len))


def _check_variants(variants: tuple[Variant, ...], verdicts: Sequence[Verdict | SpeedVerdict]) -> None:
    names = [v.name for v in variants]
    if max(len(variants), len(verdicts)) > MOST_VARIANTS:
        raise InvalidValue(
            f"it has {len(variants)} variants and {len(verdicts)} verdicts; at most {MOST_VARIANTS} of each"
        )
    if not names:
        raise InvalidValue("it has no variant; add [[variants]] with a name")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidValue(f"two variants have the name {name!r}")
        if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|\n'):
            raise InvalidValue(f"variant name {name!r} cannot name a folder")
    labels = [v.heading for v in variants]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise InvalidValue(f"two variants have the label {label!r}")
    for variant in variants:
        if variant.color and not _is_color(variant.color):
            raise InvalidValue(f"variant {variant.name!r}: {variant.color!r} is no color that matplotlib knows")
    for verdict in verdicts:
        for name in (verdict.better, verdict.worse):
            if name not in names:
                raise InvalidValue(f"a verdict names the variant {name!r}{nearest(name, names)}")


def _check_different(runs_of: dict[str, list[RunConfig]]) -> None:
    for (one, runs), (other, others) in itertools.combinations(runs_of.items(), 2):
        if runs == others:
            raise InvalidValue(
                f"variants {one!r} and {other!r} have the same settings, so their runs would be bit-identical;"
                " change a setting of one, or remove it"
            )


def _is_color(color: str) -> bool:
    from matplotlib.colors import is_color_like

    return is_color_like(color)


def variant_config(preset_name: str, base: dict[str, Any], variant: Variant, point: dict[str, Any]) -> RunConfig:
    """A preset with the fields of `base`, of the variant and of a tuning point over it.

    Raises InvalidValue, naming the variant, for fields or values that no run takes.
    """
    try:
        own: dict[str, Any] = {}
        for layer in (base, variant.set, _nested(point)):
            own = merged(own, flattened(layer))
        config = from_dict(RunConfig, merged(to_dict(preset(preset_name, _architecture(own))), own))
        if config.train.seconds is not None or config.train.tokens is not None:
            raise InvalidValue("train.seconds and train.tokens are for one run; give the experiment tokens or seconds")
        return config
    except InvalidValue as error:
        raise InvalidValue(f"variant {variant.name!r}: {error}") from error


def _architecture(fields: dict[str, Any]) -> str:
    """Return the architecture that the fields of a run's config name, or the default one."""
    model = fields.get("model", {})
    return str(model.get("arch", DEFAULT_ARCHITECTURE)) if isinstance(model, dict) else DEFAULT_ARCHITECTURE


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Nested tables of both; where they meet, the value of `high`.

    Raises InvalidValue where one has a table and the other a value.
    """
    both = dict(low)
    for name, value in high.items():
        old = both.get(name)
        if name in both and isinstance(old, dict) != isinstance(value, dict):
            raise InvalidValue(f"{name} is {(value if isinstance(old, dict) else old)!r}; it must be a table")
        both[name] = merged(old, value) if isinstance(old, dict) else value
    return both


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return leaves


def _nested(point: dict[str, Any]) -> dict[str, Any]:
    """`{"train.lr": 1}` as `{"train": {"lr": 1}}`."""
    tree: dict[str, Any] = {}
    for path, value in point.items():
        for part in reversed(path.split(".")):
            value = {part: value}
        tree = merged(tree, value)
    return tree


def with_data(experiment: "AnyExperiment", source: str | None, valid: str | None) -> "AnyExperiment":
    """The experiment on another text."""
    data = {name: text for name, text in (("source", source), ("valid", valid)) if text is not None}
    return replace(experiment, base=merged(experiment.base, {"data": data})) if data else experiment


def shipped() -> list[Path]:
    """Experiment files that come with the package."""
    return sorted((Path(__file__).parent / "claims").glob("*.toml"))


def find_experiment(name: str) -> Path:
    """A file by its path, or one that comes with the package by its name. Raises MissingFile for neither."""
    known = {path.stem: path for path in shipped()}
    if name in known:
        return known[name]
    if Path(name).suffix == ".toml" or Path(name).is_file():
        return Path(name)
    raise MissingFile(f"there is no experiment {name!r}{nearest(name, known)}; or name a .toml file")


KINDS: dict[str, type] = {"training": Experiment, "speed": SpeedExperiment, "sampling": SamplingExperiment}
AnyExperiment = Experiment | SpeedExperiment | SamplingExperiment


def read_experiment(path: Path) -> AnyExperiment:
    """An experiment file; its `kind` is one of KINDS, training where it names none.

    Raises TimemixError, naming the file, for a missing file, no TOML, an unknown field, or unsupported values.
    """
    data = parse_toml(path)
    kind = data.pop("kind", "training")
    try:
        if not isinstance(kind, str) or kind not in KINDS:
            raise InvalidValue(f"unknown kind {kind!r}{nearest(str(kind), KINDS)}")
        return from_dict(KINDS[kind], data)
    except UNFIT as error:
        raise DamagedFile(f"{path}: {error}") from error
