"""Settings of a run: names, defaults and help texts. This module does not import PyTorch.

A `RunConfig` describes a run by the settings of its model, data and training. The command line generates its flags from
the dataclasses of this module, with the text below each field as help. The file config.toml in a run folder is a
`RunConfig` in TOML format.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import tomli_w

from timemix.config.version_1 import flattened
from timemix.data.config import DataConfig
from timemix.errors import DamagedFile, InvalidValue
from timemix.models.config import ModelConfig, Recompute
from timemix.models.registry import DEFAULT_ARCHITECTURE, find_architecture, list_architectures, model_config
from timemix.storage.settings import UNFIT, check_range, from_dict, nearest_divisors, parse_toml, to_dict

FORMAT_VERSION = 2
"""Current format version of config.toml. In version 1, the table `model` had the subtables `mixer` and `ffn`."""


Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "float32", "bfloat16", "float64"]


OptimizerName = Literal["adamw", "muon"]


Strategy = Literal["replicate", "shard"]


Tune = Literal["all", "state", "lora"]


MOST_RANK = 2**16
"""Largest rank of a low-rank term."""

MOST_STEPS = 10**8 - 1
"""Largest number of steps of a run, since the step number in the name of a checkpoint has eight digits."""

BUDGETS = ("steps", "seconds", "tokens", "epochs")
"""Fields that set the length of a run. A config may set only one of these fields."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def check_budget(given: Mapping[str, Any]) -> None:
    """Check that at most one training setting sets the length of the run.

    Raises:
        InvalidValue: More than one setting sets the length of the run.
    """
    named = [f"train.{name} {given[name]}" for name in BUDGETS if given.get(name) is not None]
    if len(named) > 1:
        raise InvalidValue(
            f"{' and '.join(named)} exclude one another: each sets the length of the run; set only one of them"
        )


def read_count(tokens: int | str) -> int:
    """Parse a number of tokens, such as 20000, "20M" or "1.5B".

    Raises:
        InvalidValue: The value is not a positive number, with or without one of the units k, M, B and T.
    """
    found = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?)([kmbt]?)", str(tokens).strip().lower(), re.ASCII)
    count = Decimal(found[1]) * _UNITS[found[2]] if found else Decimal(0)
    if count < 1:
        raise InvalidValue(f"train.tokens is {str(tokens)!r}; it must be a positive number, such as 20M, 1.5B or 20000")
    return int(count)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training: optimization, schedule, validation, checkpoints and samples."""

    steps: int = 2000
    """Length of the run in optimizer steps, from 1 to 99999999.
    Alternatives to steps: --train.seconds, --train.tokens and --train.epochs."""
    seconds: float | None = None
    """Length of the run in seconds, above 0, with validations and checkpoints, converted to steps at the start.
    Default: --train.steps sets the length of the run."""
    tokens: int | str | None = None
    """Length of the run in tokens, at least 1, such as 20M or 1.5B, rounded up to whole steps.
    Default: --train.steps sets the length of the run."""
    epochs: float | None = None
    """Length of the run as a number of passes over the training text, above 0, such as 2.5, rounded up to whole steps.
    Default: --train.steps sets the length of the run."""
    batch_size: int = 12
    """Number of training windows per optimizer step, at least 1, summed over all pieces of --train.accumulation."""
    contexts: int = 1
    """Length of a training window in units of --model.ctx-len, at least 1.
    An architecture with bounded context allows only the value 1."""
    accumulation: int = 1
    """Number of pieces in which a batch is computed, at least 1, to save memory.
    The number must divide --train.batch-size."""
    lr: float = 3e-3
    """Largest learning rate, at least 0."""
    lr_final: float = 1e-4
    """Learning rate at the end of the run, at least 0.
    On the command line, a smaller --train.lr without --train.lr-final is also the last learning rate."""
    embedding_lr: float = 1.0
    """Learning rate of the embedding as a multiple of --train.lr, at least 0."""
    schedule: Schedule = "cosine"
    """Schedule of the learning rate from --train.lr to --train.lr-final.
    With `constant`, the learning rate decays only over the last share of the run, --train.decay."""
    warmup: float = 0.0
    """Share of the run, from 0 to 1, over which the learning rate rises from 0 (in rwkv4 from 0.2 --train.lr, in rwkv5
    to rwkv7 from 0.01 --train.lr)."""
    decay: float = 0.2
    """Last share of the run, from 0 to 1, over which the learning rate of --train.schedule constant decays linearly."""
    optimizer: OptimizerName = "adamw"
    """Optimizer: `adamw`, or `muon` for the matrices inside blocks and AdamW for all other parameters."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the first and second moment, each from 0 up to but not including 1."""
    eps: float = 1e-8
    """AdamW's epsilon, above 0."""
    weight_decay: float = 0.0
    """Weight decay of the linear weights inside blocks, at least 0. In rwkv4 to rwkv7, it also
    applies to embedding and head."""
    clip: float = 1.0
    """Largest norm of the gradient, at least 0 (0: no clipping).
    Gradients of larger norm are scaled down to --train.clip."""
    precision: Precision = "auto"
    """Precision of the matrix products. `auto` is bfloat16 on processors that support bfloat16, otherwise float32."""
    device: str = "auto"
    """PyTorch device, such as cpu, cuda or cuda:1. `auto` is cuda if available, otherwise cpu."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the training step. `auto` compiles if compilation is supported and saves time over the run."""
    recompute: Recompute = "none"
    """Activations recomputed to save memory: `none`, `cheap` (all but matrix products), or `all` (whole blocks)."""
    tune: Tune = "all"
    """Trained parameters: `all` weights; or, with --from and frozen weights, the initial `state` of the recurrence, or
    low-rank terms of linear maps (`lora`)."""
    lora_rank: int = 8
    """Rank of the low-rank terms of --train.tune lora, from 1 to 65536, unless --train.lora-modules sets another."""
    lora_alpha: float = 16.0
    """Strength of --train.tune lora, above 0. The factor of the low-rank terms is this number divided by the rank."""
    lora_modules: tuple[str, ...] = ("*",)
    """Linear maps of a block that get a low-rank term, by name or pattern, such as mixer.key or ffn.*.
    NAME=RANK sets the rank of these maps, such as mixer.key=16. The last name that matches a map sets its rank."""
    strategy: Strategy = "replicate"
    """Use of several processes (torchrun): each process holds a whole model (`replicate`) or a part of it (`shard`)."""
    seed: int = 1
    """Random seed of initial values, batches and dropout, from 0 to 2^64 - 1."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl, at least 1."""
    valid_every: int = 250
    """Steps between validations on the whole held-out text, at least 1."""
    save_every: int = 500
    """Steps between checkpoints, at least 1. Only the newest and the best checkpoint remain on disk."""
    sample_every: int = 0
    """Steps between text samples, printed and appended to samples.txt, at least 0
    (0: samples only at the end of the run)."""
    sample_prompts: tuple[str, ...] = ()
    """Beginnings of the text samples, one sample for each prompt. Default: one sample that begins as a document,
    or with a newline if the vocabulary has no end-of-text token."""
    patience: int = 0
    """Number of validations without a lower loss after which training stops early, at least 0
    (0: no early stopping)."""
    full_disk: Literal["stop", "continue"] = "stop"
    """Action if a checkpoint cannot be written: `stop`, or `continue` and try again at the next checkpoint."""
    spike: float = 6.0
    """Smallest loss spike to report, in standard deviations above the preceding losses, at least 0 (0: no report)."""
    save_bad_batches: bool = False
    """Whether to save each batch whose loss spikes or is not finite, in the folder bad-batches/ of the run folder."""
    hook_errors: Literal["warn", "stop"] = "warn"
    """Action if a --hook function or a --track service fails: `warn` and continue, or save a checkpoint and `stop`."""

    def __post_init__(self) -> None:
        # Only a converted run without fine-tuning has 0 steps: `new_run` refuses other runs of 0 steps.
        check_range("train.steps", self.steps, 0, MOST_STEPS)
        check_budget({name: getattr(self, name) for name in BUDGETS if name != "steps"})
        for name in ("seconds", "epochs"):
            if (length := getattr(self, name)) is not None and not 0 < length < math.inf:
                raise InvalidValue(f"train.{name} is {length}; it must be above 0 and finite")
        if self.tokens is not None:
            read_count(self.tokens)
        for name in ("sample_every", "patience"):
            check_range(f"train.{name}", getattr(self, name), 0, 2**31 - 1)
        for name in ("batch_size", "contexts", "accumulation", "log_every", "valid_every", "save_every"):
            check_range(f"train.{name}", getattr(self, name), 1, 2**31 - 1)
        for name in ("lr", "lr_final", "embedding_lr", "weight_decay", "clip", "spike", "seed"):
            check_range(f"train.{name}", getattr(self, name), 0)
        # With 0, AdamW divides 0 by 0 for a row of the embedding without a gradient.
        if not 0 < self.eps < math.inf:
            raise InvalidValue(f"train.eps is {self.eps}; it must be above 0 and finite")
        if self.seed >= 2**64:
            raise InvalidValue(f"train.seed is {self.seed}; it must be below 2^64")
        if self.batch_size % self.accumulation:
            raise InvalidValue(
                f"train.accumulation={self.accumulation} does not divide train.batch_size={self.batch_size};"
                f" nearest divisors: {nearest_divisors(self.accumulation, self.batch_size)}"
            )
        check_range("train.lora_rank", self.lora_rank, 1, MOST_RANK)
        if not 0 < self.lora_alpha < math.inf:
            raise InvalidValue(f"train.lora_alpha is {self.lora_alpha}; it must be above 0 and finite")
        if not self.lora_modules:
            raise InvalidValue("train.lora_modules is empty; give at least one name, such as mixer.key")
        for text in self.lora_modules:
            _pattern_and_rank(text, self.lora_rank)
        if self.tune != "all" and self.optimizer == "muon":
            raise InvalidValue(
                f"train.optimizer is 'muon', which trains all matrices, but train.tune is {self.tune!r}; set"
                " train.optimizer to 'adamw'"
            )
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidValue(f"train.{name} is {getattr(self, name)}; it must be a share of the run, from 0 to 1")
        if len(self.betas) != 2 or any(not 0 <= b < 1 for b in self.betas):
            raise InvalidValue(f"train.betas is {list(self.betas)}; it must be two numbers from 0 to below 1")

    @property
    def lora_ranks(self) -> tuple[tuple[str, int], ...]:
        """The patterns of `lora_modules` with their ranks."""
        return tuple(_pattern_and_rank(text, self.lora_rank) for text in self.lora_modules)


def _pattern_and_rank(text: str, default: int) -> tuple[str, int]:
    """Parse an element of `TrainConfig.lora_modules`: "PATTERN", or "PATTERN=RANK"."""
    pattern, equals, digits = text.partition("=")
    if not equals:
        return pattern, default
    rank = int(digits) if re.fullmatch(r"\d{1,5}", digits, re.ASCII) else 0
    if not (pattern and 1 <= rank <= MOST_RANK):
        raise InvalidValue(
            f"train.lora_modules has {text!r}; it must be NAME=RANK with a rank from 1 to {MOST_RANK}, such as"
            " mixer.key=16, and spaces between several of them"
        )
    return pattern, rank


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=lambda: model_config(DEFAULT_ARCHITECTURE))
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    start: str | None = None
    """Run folder or checkpoint from which training takes the initial weights and the tokenizer."""
    start_state: str | None = None
    """Session file from which a run with `train.tune` "state" takes the first values of its learned state."""

    def __post_init__(self) -> None:
        if self.train.contexts > 1 and find_architecture(self.model.arch).bounded:
            raise InvalidValue(
                f"train.contexts is {self.train.contexts}, but the context of {self.model.arch} is bounded by ctx_len;"
                " set train.contexts to 1, or choose an architecture with unbounded context:"
                f" {', '.join(list_architectures(bounded=False))}"
            )
        if self.data.order == "carried" and find_architecture(self.model.arch).bounded:
            raise InvalidValue(
                f"data.order is 'carried', but {self.model.arch} has no state to carry past ctx_len; set data.order to"
                " 'epoch', or choose an architecture with unbounded context:"
                f" {', '.join(list_architectures(bounded=False))}"
            )

    @staticmethod
    def narrowed(data: dict[str, Any]) -> dict[str, type]:
        """Return the types of the fields that depend on the values in `data`: the config class of the architecture."""
        model = data.get("model")
        arch = model.get("arch", DEFAULT_ARCHITECTURE) if isinstance(model, dict) else DEFAULT_ARCHITECTURE
        return {"model": find_architecture(arch).config}

    @property
    def window(self) -> int:
        """Number of tokens in a training window."""
        return self.train.contexts * self.model.ctx_len


def to_toml(config: RunConfig) -> str:
    """Return the content of the config.toml for a config."""
    return tomli_w.dumps({"format_version": FORMAT_VERSION} | to_dict(config))


def read_toml(path: Path) -> RunConfig:
    """Read the config of a run from its config.toml.

    Raises:
        FileError: The file is missing, is not TOML, has a newer format version, or has an invalid field or value.
    """
    data = parse_toml(path)
    try:
        return from_dict(RunConfig, current(data))
    except UNFIT as error:
        raise DamagedFile(f"{path}: {error}") from error


def current(data: dict[str, Any], version: int | None = None) -> dict[str, Any]:
    """Convert the tables of a config.toml from any supported format version to the current version.

    Args:
        data: The parsed config.toml.
        version: Format version to assume if the file has no `format_version`.

    Raises:
        InvalidValue: The version is missing or not supported.
    """
    version = data.get("format_version", version)
    if version is None:
        raise InvalidValue("format_version is missing, so this is no config.toml of a run; restore it from a copy")
    if version not in (1, FORMAT_VERSION):
        raise InvalidValue(
            f"format_version is {version!r}, but this timemix supports 1 and {FORMAT_VERSION}; update timemix"
        )
    tables = {name: value for name, value in data.items() if name != "format_version"}
    if "format_version" in data and isinstance(own := tables.get("data", {}), dict):
        # Files without the field `hold_out` are from a version that always held out the end of the source.
        tables["data"] = {"hold_out": "end"} | own
    return flattened(tables) if version == 1 else tables
