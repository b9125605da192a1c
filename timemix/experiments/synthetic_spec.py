"""The part of an experiment file that describes synthetic tasks."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from timemix.config.run import RunConfig
from timemix.errors import InvalidValue, nearest
from timemix.experiments.synthetic_tasks import KEYS, TASKS
from timemix.experiments.variants import (
    NO_FILE_NAME,
    Variant,
    check_different,
    check_variants,
    flat,
    merged,
    variant_config,
)

LARGEST_SIZE = 65536
"""Largest size of a sequence."""
TRAINING_FIELDS = (
    *("steps", "batch_size", "lr", "lr_final", "embedding_lr", "schedule", "warmup", "decay"),
    *("optimizer", "betas", "eps", "weight_decay", "clip", "precision", "seed"),
)
"""Training settings that determine the result of a run. All other settings of `train` and `data` have no effect."""


@dataclass(frozen=True)
class TaskSetting:
    """A task, the sizes of its sequences in training and tests, and the settings of the models for this task."""

    name: str
    """Name of the setting in the table, and beginning of the names of its result files."""
    size: int
    """Largest size of a training sequence."""
    tests: tuple[int, ...]
    """Sizes at which the trained model is tested. Sizes above `size` test the model beyond the trained length."""
    task: str = ""
    """Name of the task, a key of TASKS. Default: `name`."""
    set: dict[str, Any] = field(default_factory=dict)
    """Fields of a run's config that all variants have for this task."""

    def __post_init__(self) -> None:
        if self.kind not in TASKS:
            raise InvalidValue(f"unknown task {self.kind!r}{nearest(self.kind, TASKS)}")
        if not self.name or set(self.name) & NO_FILE_NAME:
            raise InvalidValue(f"task name {self.name!r} cannot name a file; use letters, digits and hyphens")
        most = KEYS if self.kind == "recall" else LARGEST_SIZE
        if not self.tests or not all(1 <= n <= most for n in (self.size, *self.tests)):
            raise InvalidValue(
                f"task {self.name!r}: size is {self.size} and tests is {list(self.tests)}; give at least one test, and"
                f" sizes from 1 to {most}"
            )

    @property
    def kind(self) -> str:
        """Name of the task, a key of TASKS."""
        return self.task or self.name


@dataclass(frozen=True)
class TaskVerdict:
    """A claim that one variant has a higher accuracy than another variant."""

    claim: str
    """The claim as a sentence."""
    better: str
    """Name of the variant that has the higher accuracy if the claim holds."""
    worse: str
    """Name of the variant that has the lower accuracy if the claim holds."""
    task: str
    """Name of the task setting."""
    size: int
    """Size of the test, a value of the setting's `tests`."""


@dataclass(frozen=True)
class Cell:
    """One run of an experiment: a variant on a task, with a learning rate and a seed."""

    task: TaskSetting
    variant: Variant
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run and of its file."""
        return f"{self.task.name}.{self.variant.name}.lr-{self.lr:g}.seed-{self.seed}"


@dataclass(frozen=True)
class SyntheticExperiment:
    """Content of an experiment file that trains every variant on synthetic tasks and measures its accuracy."""

    title: str
    variants: tuple[Variant, ...]
    tasks: tuple[TaskSetting, ...]
    """The tasks. Every variant is trained on each task alone."""
    lrs: tuple[float, ...]
    """Learning rates. Each variant has its best learning rate for each task, found with seed 0."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of each variant and task, with one run per seed."""
    rows: int = 256
    """Number of sequences of a test."""
    preset: str = "cpu-small"
    """Name of the preset of all variants."""
    base: dict[str, Any] = field(default_factory=dict)
    """Fields of a run's config that all variants share."""
    verdicts: tuple[TaskVerdict, ...] = ()
    """Claims to test."""

    def __post_init__(self) -> None:
        check_variants(self.variants, self.verdicts)
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise InvalidValue(f"tasks have the names {names}; give at least one task, and each task its own name")
        if not self.lrs or len(set(self.lrs)) < len(self.lrs) or self.rows < 1:
            raise InvalidValue(
                f"lrs is {list(self.lrs)} and rows is {self.rows}; give different lrs, and at least 1 row"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 1:
            raise InvalidValue(f"seeds is {list(self.seeds)}; give different seeds, each at least 1")
        for verdict in self.verdicts:
            if verdict.size not in next((task.tests for task in self.tasks if task.name == verdict.task), ()):
                raise InvalidValue(
                    f"a verdict names the task {verdict.task!r} at the size {verdict.size}, which no test has"
                )
        cells = [Cell(*run, seed=0).name for run in itertools.product(self.tasks, self.variants, self.lrs)]
        if repeated := [name for name in cells if cells.count(name) > 1]:
            raise InvalidValue(
                f"two runs have the same name, {repeated[0]!r}; give tasks and variants names without dots, and lrs"
                " that differ in their first six digits"
            )
        for task in self.tasks:
            check_different(
                {v.name: [self.config(task, v, lr, self.seeds[0]) for lr in self.lrs] for v in self.variants}
            )

    def only(self, names: tuple[str, ...]) -> "SyntheticExperiment":
        """Return the experiment with some of its tasks, and the verdicts on these tasks.

        Args:
            names: Names of the tasks.

        Raises:
            InvalidValue: The experiment lacks a task, or `names` is empty.
        """
        known = {task.name: task for task in self.tasks}
        if not names:
            raise InvalidValue(f"tasks is empty; give at least one of {', '.join(known)}")
        for name in names:
            if name not in known:
                raise InvalidValue(f"the experiment has no task {name!r}{nearest(name, known)}")
        verdicts = tuple(verdict for verdict in self.verdicts if verdict.task in names)
        return replace(self, tasks=tuple(known[name] for name in dict.fromkeys(names)), verdicts=verdicts)

    def config(self, task: TaskSetting, variant: Variant, lr: float, seed: int) -> RunConfig:
        """Return the config of a run. ctx_len is the length of the longest sequence in training and tests.

        Raises:
            InvalidValue: A field or a value is not supported. The message names the variant.
        """
        given = merged(self.base, task.set)
        for name in flat(merged(given, variant.set)):
            part, _, field_name = name.partition(".")
            is_ignored = part == "data" or (part == "train" and field_name not in TRAINING_FIELDS)
            # The experiment and the task set these fields of each run.
            if is_ignored or name in ("train.lr", "train.seed", "model.ctx_len", "model.vocab_size"):
                raise InvalidValue(
                    f"variant {variant.name!r}: {name} has no effect on synthetic tasks; leave {name} out"
                )
        config = variant_config(self.preset, given, variant, {"train.lr": lr})
        if not config.train.steps:
            raise InvalidValue(f"variant {variant.name!r}: train.steps is 0; give a run at least 1 step")
        kind = TASKS[task.kind]
        longest = max(kind.length(size) for size in (task.size, *task.tests))
        model = replace(config.model, ctx_len=longest, vocab_size=kind.vocab_size)
        return replace(config, model=model, train=replace(config.train, seed=seed))
