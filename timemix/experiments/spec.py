"""Read experiment files. An experiment file describes variants to compare on equal terms, and claims to test."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from timemix.config.presets import preset
from timemix.config.run import RunConfig
from timemix.config.version_1 import flattened
from timemix.errors import DamagedFile, InvalidValue, MissingFile, nearest
from timemix.experiments.synthetic_spec import SyntheticExperiment
from timemix.experiments.variants import (
    Variant,
    check_different,
    check_variants,
    flat,
    merged,
    named_architecture,
    variant_config,
)
from timemix.models.registry import find_architecture
from timemix.storage.settings import UNFIT, from_dict, parse_toml

TUNING_SEED = 0
"""Seed of all tuning runs."""
PROMPT_TOKENS = 32
"""Number of held-out tokens in a prompt of a sampling experiment."""
MOST_TUNING_RUNS = 10_000
"""Largest number of tuning runs of an experiment."""


@dataclass(frozen=True)
class Verdict:
    """A claim that one variant reaches a lower held-out loss than another."""

    claim: str
    """The claim as a sentence."""
    better: str
    """Name of the variant that has the lower loss if the claim holds."""
    worse: str
    """Name of the variant that has the higher loss if the claim holds."""
    at_step: int | None = None
    """Step at which the held-out losses are compared, a multiple of `train.valid_every`. Default: the last step."""
    first_positions: int | None = None
    """Number of positions at the start of the window whose losses are compared. Needs `by_position`. Default: all
    positions."""


@dataclass(frozen=True)
class SpeedVerdict:
    """A claim that one variant is faster or needs less memory than another variant at the longest context length."""

    claim: str
    """The claim as a sentence."""
    better: str
    """Name of the variant that is faster or needs less memory if the claim holds."""
    worse: str
    """Name of the variant that is slower or needs more memory if the claim holds."""
    of: Literal["tokens_per_second", "memory"] = "tokens_per_second"
    """Quantity to compare: speed or peak memory."""


@dataclass(frozen=True)
class Experiment:
    """Content of an experiment file that compares trained variants.

    The config of a variant is the preset, overridden by the fields of `base`, of the variant's `set` and of its best
    tuning point.
    """

    title: str
    variants: tuple[Variant, ...]
    tokens: int | None = None
    """Number of training tokens of every run."""
    seconds: float | None = None
    """Training time of every run in seconds, instead of `tokens`. One measurement per variant gives the step count."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of each variant, with one run per seed."""
    preset: str = "cpu-small"
    """Name of the preset of all variants."""
    base: dict[str, Any] = field(default_factory=dict)
    """Fields of a run's config that all variants share."""
    tune: dict[str, Any] = field(default_factory=dict)
    """Grid of config fields, such as `train.lr = [1e-3, 3e-3]`.

    Every point is trained with seed 0 and validated on the last 5 % of the training text.
    """
    prompts: tuple[str, ...] = ()
    """Prompts of the generated samples. Default: the beginning of the held-out text."""
    verdicts: tuple[Verdict, ...] = ()
    """Claims to test."""
    by_position: bool = False
    """Whether to measure the held-out loss also at each position of the window."""

    def __post_init__(self) -> None:
        check_variants(self.variants, self.verdicts)
        if (self.tokens is None) == (self.seconds is None):
            raise InvalidValue("the budget is missing or given twice; give either tokens or seconds")
        if not 0 < (self.tokens if self.tokens is not None else self.seconds or 0) < math.inf:
            budget = f"tokens is {self.tokens}" if self.tokens is not None else f"seconds is {self.seconds}"
            raise InvalidValue(f"{budget}; it must be above 0 and finite")
        if not self.seeds:
            raise InvalidValue("seeds is empty; give at least one seed")
        if len(set(self.seeds)) < len(self.seeds):
            raise InvalidValue(f"seeds is {list(self.seeds)}, with a repeated seed; give each seed once")
        if min(self.seeds) < 0 or (self.tune and TUNING_SEED in self.seeds):
            raise InvalidValue(
                f"seeds is {list(self.seeds)}; all seeds must be at least 1, since tuning uses seed {TUNING_SEED}"
            )
        for key, values in flat(self.tune).items():
            if not isinstance(values, list) or not values:
                raise InvalidValue(f"tune.{key} is {values!r}; it must be a list of values")
            if any(values.count(each) > 1 for each in values):
                raise InvalidValue(f"tune.{key} is {values}, with a repeated value; give each value once")
            if key.startswith("data."):
                raise InvalidValue(
                    f"tune.{key} cannot be tuned, since all points of a grid have one text; leave tune.{key} out"
                )
        runs = len(self.variants) * math.prod(map(len, flat(self.tune).values()))
        if runs > MOST_TUNING_RUNS:
            raise InvalidValue(f"tune asks for {runs} runs, more than {MOST_TUNING_RUNS}; give fewer values")
        if "" in self.prompts:
            raise InvalidValue("a prompt is empty; give at least one character")
        runs_of = {variant.name: self._check_runs(variant) for variant in self.variants}
        check_different(runs_of)
        lengths = sorted({run.model.ctx_len for runs in runs_of.values() for run in runs})
        if self.by_position and len(lengths) > 1:
            raise InvalidValue(
                f"by_position is true, but the variants have ctx_len {' and '.join(map(str, lengths))}; give all"
                " variants one ctx_len, or set by_position = false"
            )
        if any(v.first_positions is not None for v in self.verdicts) and not self.by_position:
            raise InvalidValue("a verdict has first_positions, but by_position is false; set by_position = true")

    def _check_runs(self, variant: Variant) -> list[RunConfig]:
        """Return the configs of a variant with the first seed, one per tuning point, and check its verdicts."""
        runs = [self.config(variant, point, self.seeds[0]) for point in self.points_of(variant).values()]
        train, ctx_len = runs[-1].train, runs[-1].model.ctx_len
        for verdict in self.verdicts:
            if variant.name not in (verdict.better, verdict.worse):
                continue
            step, first = verdict.at_step, verdict.first_positions
            if step is not None and (step < 0 or step % train.valid_every or (self.tokens and step > train.steps)):
                raise InvalidValue(
                    f"at_step={step} of a verdict is not a validated step; give a multiple of train.valid_every"
                    f" ({train.valid_every}) within the run"
                )
            if first is not None and not 1 <= first <= ctx_len:
                raise InvalidValue(
                    f"first_positions={first} of a verdict must be at least 1 and at most the ctx_len of variant"
                    f" {variant.name!r}, {ctx_len}"
                )
        return runs

    def check_steps(self, counts: Mapping[str, int | None]) -> None:
        """Check that the step of each verdict is within the steps that a budget of seconds gives.

        Args:
            counts: Number of steps by name of the variant; None: the budget is in tokens, and was checked before.

        Raises:
            InvalidValue: The step of a verdict is after the last step of a variant.
        """
        for verdict in self.verdicts:
            for name in (verdict.better, verdict.worse):
                steps = counts[name]
                if verdict.at_step is not None and steps is not None and verdict.at_step > steps:
                    raise InvalidValue(
                        f"at_step={verdict.at_step} of a verdict is after the last step of variant {name!r}, whose"
                        f" budget of {self.seconds:g} s gives {steps} steps; give a smaller at_step, or more seconds"
                    )

    def tuning_points(self) -> list[dict[str, Any]]:
        """Return every combination of the values of the tuning grid, or one empty point without a grid."""
        grid = flat(self.tune)
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def points_of(self, variant: Variant) -> dict[int, dict[str, Any]]:
        """Return the distinct tuning points of a variant. The keys are the indices of the points in `tuning_points`.

        The tuning of a variant ignores a field that its architecture lacks, if another variant has this field.
        """
        left_out = [key for key in flat(self.tune) if self._lacks(variant, key) and not self._all_lack(key)]
        first = {key: flat(self.tune)[key][0] for key in left_out}
        return {
            number: {key: value for key, value in point.items() if key not in first}
            for number, point in enumerate(self.tuning_points())
            if all(point[key] == value for key, value in first.items())
        }

    def _lacks(self, variant: Variant, key: str) -> bool:
        arch = preset(self.preset, named_architecture(flattened(merged(self.base, variant.set)))).model.arch
        name = key.rpartition(".")[2]
        return key.startswith("model.") and name not in find_architecture(arch).config.__dataclass_fields__

    def _all_lack(self, key: str) -> bool:
        return all(self._lacks(variant, key) for variant in self.variants)

    def config(self, variant: Variant, point: dict[str, Any], seed: int, steps: int | None = None) -> RunConfig:
        """Return the run config of a variant at a tuning point.

        Args:
            variant: The variant.
            point: Fields of the tuning point.
            seed: Seed of the run.
            steps: Number of steps. Default: the number that the budget in tokens gives.

        Raises:
            InvalidValue: A field or a value is not supported. The message names the variant.
        """
        config = variant_config(self.preset, self.base, variant, point)
        if steps is None:
            steps = config.train.steps
            if self.tokens is not None:
                steps = max(1, round(self.tokens / (config.train.batch_size * config.window)))
        return replace(config, train=replace(config.train, seed=seed, steps=steps))


@dataclass(frozen=True)
class SamplingExperiment:
    """Content of an experiment file that compares filters of next-token probabilities at equal entropy.

    Two models train first. The writer model generates texts. The larger judge model measures the loss of these texts.
    """

    title: str
    writer: dict[str, Any]
    """Config fields of the writer model, which generates texts."""
    judge: dict[str, Any]
    """Config fields of the judge model, which measures the loss of the texts."""
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.3)
    """Temperatures at which the filters are compared."""
    top_a: tuple[float, ...] = (0.005, 0.02, 0.05, 0.1, 0.2)
    """Factors of top-a in the sweep at temperature 1."""
    powers: tuple[float, ...] = (1.0, 2.0, 3.0)
    """Powers of top-a in the sweep at temperature 1."""
    samples: int = 64
    """Number of generated texts per setting."""
    tokens: int = 256
    """Number of tokens of each generated text."""
    preset: str = "cpu-small"
    """Name of the preset of both models."""
    base: dict[str, Any] = field(default_factory=dict)
    """Fields of a run's config that both models share."""

    def __post_init__(self) -> None:
        if self.samples < 2 or self.tokens < 8 or not (self.temperatures and self.top_a and self.powers):
            raise InvalidValue(
                f"samples is {self.samples} and tokens is {self.tokens}, or a list is empty; give at least 2 samples of"
                " 8 tokens, and values of temperatures, top_a and powers"
            )
        if not all(0 < t < math.inf for t in self.temperatures):
            raise InvalidValue(f"temperatures is {list(self.temperatures)}; each must be above 0 and finite")
        if not (all(0 < a <= 1 for a in self.top_a) and all(0 <= p < math.inf for p in self.powers)):
            raise InvalidValue(
                f"top_a is {list(self.top_a)} and powers is {list(self.powers)}; every top_a must be above 0 and at"
                " most 1, and every power at least 0"
            )
        self.config("writer")
        limit = self.config("judge").model.ctx_len
        if PROMPT_TOKENS + self.tokens > limit:
            length = f"{PROMPT_TOKENS} tokens of prompt and {self.tokens} of text"
            raise InvalidValue(
                f"{length} exceed the judge model's ctx_len {limit}; give fewer tokens or a larger judge.model.ctx_len"
            )

    def config(self, name: Literal["writer", "judge"]) -> RunConfig:
        """Return the run config of the writer model or of the judge model.

        Raises:
            InvalidValue: A field or a value is not supported.
        """
        return variant_config(self.preset, self.base, Variant(name, getattr(self, name)), {})


@dataclass(frozen=True)
class SpeedExperiment:
    """Content of an experiment file that compares the speed and memory of a training step by context length."""

    title: str
    variants: tuple[Variant, ...]
    ctx_lens: tuple[int, ...]
    """Context lengths in tokens. Each length must divide `tokens`."""
    tokens: int
    """Number of tokens of a training step. A batch has tokens / ctx_len windows."""
    rounds: int = 3
    """Number of measurements of each variant at each length. A 95 % interval needs at least 2 measurements."""
    preset: str = "cpu-small"
    """Name of the preset of all variants."""
    base: dict[str, Any] = field(default_factory=dict)
    """Fields of a run's config that all variants share."""
    vocab_size: int = 80
    """Size of the vocabulary."""
    verdicts: tuple[SpeedVerdict, ...] = ()
    """Claims to test."""

    def __post_init__(self) -> None:
        check_variants(self.variants, self.verdicts)
        if self.rounds < 1 or not self.ctx_lens or any(t < 1 or self.tokens % t for t in self.ctx_lens):
            raise InvalidValue(
                f"ctx_lens is {list(self.ctx_lens)}, tokens is {self.tokens} and rounds is {self.rounds}; give at least"
                " one ctx_len and one round, and only values of ctx_lens that divide tokens"
            )
        for variant in self.variants:
            self.config(variant, self.ctx_lens[0])

    def config(self, variant: Variant, ctx_len: int) -> RunConfig:
        """Return the run config of a variant at a context length.

        Raises:
            InvalidValue: A field or a value is not supported. The message names the variant.
        """
        config = variant_config(self.preset, self.base, variant, {})
        model = replace(config.model, ctx_len=ctx_len, vocab_size=self.vocab_size)
        return replace(config, model=model, train=replace(config.train, batch_size=self.tokens // ctx_len))


def with_data(experiment: "AnyExperiment", source: str | None, valid: str | None) -> "AnyExperiment":
    """Return an experiment with another text.

    Args:
        experiment: The experiment.
        source: Source of the new text; None: keep the text of the experiment.
        valid: Source of the new validation text; None: keep the validation text of the experiment.
    """
    data = {name: text for name, text in (("source", source), ("valid", valid)) if text is not None}
    return replace(experiment, base=merged(experiment.base, {"data": data})) if data else experiment


def shipped() -> list[Path]:
    """Return the paths of the experiment files that come with timemix."""
    return sorted((Path(__file__).parent / "claims").glob("*.toml"))


def find_experiment(name: str) -> Path:
    """Return the path of an experiment file.

    Args:
        name: Name of an experiment that comes with timemix, or path of a file.

    Raises:
        MissingFile: The name is neither a known experiment nor the path of a file.
    """
    known = {path.stem: path for path in shipped()}
    if name in known:
        return known[name]
    if Path(name).suffix == ".toml" or Path(name).is_file():
        return Path(name)
    raise MissingFile(f"there is no experiment {name!r}{nearest(name, known)}; you can also name a .toml file")


KINDS: dict[str, type] = {
    "training": Experiment,
    "speed": SpeedExperiment,
    "sampling": SamplingExperiment,
    "synthetic": SyntheticExperiment,
}
AnyExperiment = Experiment | SpeedExperiment | SamplingExperiment | SyntheticExperiment


def read_experiment(path: Path) -> AnyExperiment:
    """Read an experiment file. The field `kind` of the file selects a class in KINDS and defaults to "training".

    The field `extends` names another experiment, whose fields are the defaults of all fields of the file.

    Args:
        path: The TOML file.

    Raises:
        FileError: The file is missing or not TOML, or has an unknown field or an unsupported value. The message names
            the file.
    """
    data = _fields(path)
    kind = data.pop("kind", "training")
    try:
        if not isinstance(kind, str) or kind not in KINDS:
            raise InvalidValue(f"unknown kind {kind!r}{nearest(str(kind), KINDS)}")
        return from_dict(KINDS[kind], data)
    except UNFIT as error:
        raise DamagedFile(f"{path}: {error}") from error


def _fields(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the fields of an experiment file, with the fields of the experiment that the file extends.

    Args:
        path: The file.
        above: Files that extend this file.
    """
    data = parse_toml(path)
    name = data.pop("extends", None)
    if name is None:
        return data
    if not isinstance(name, str):
        raise DamagedFile(f"{path}: extends is {name!r}; it must be the name of an experiment or of a file")
    lower = path.parent / name if Path(name).suffix == ".toml" else find_experiment(name)
    if lower.resolve() in (chain := (*above, path.resolve())):
        raise DamagedFile(f"{path}: extends is {name!r}, which extends this file; remove one of the fields")
    fields = _fields(lower, chain)
    # An experiment has one budget.
    for budget, other in (("tokens", "seconds"), ("seconds", "tokens")):
        if budget in data:
            fields.pop(other, None)
    try:
        return merged(fields, data)
    except InvalidValue as error:
        raise DamagedFile(f"{path}: {error}") from error
