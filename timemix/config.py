"""Every setting: its name, default and help text, without importing torch.

A run is described by `RunConfig` = model + data + train. The command line generates its flags from these
dataclasses (the text below each field is its help), and `config.toml` in a run folder is their dump.
"""

import dataclasses
import difflib
import sys
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from timemix.errors import UserError
from timemix.files import read_text

FORMAT_VERSION = 1

LARGEST_TOML = 256 * 2**10
MOST_DOTS = 200
"""In a line of a TOML file: a dotted key takes the parser time and memory by the square of its parts."""

Initial = Literal["zero", "original"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["auto", "float32", "bfloat16", "float64"]
TokenizerKind = Literal["character", "byte", "word", "subword"]
Unknown = Literal["error", "unk", "byte"]
OptimizerName = Literal["adamw", "muon"]
Recompute = Literal["none", "cheap", "all"]
Strategy = Literal["replicate", "shard"]


@dataclass(frozen=True)
class TimeMixConfig:
    """Mixer of `rwkv1`."""

    alpha: bool = True
    """Learn alpha_h(u), the weight of a source position."""
    beta: bool = True
    """Learn beta_h(t), the weight of a target position."""
    gamma: bool = True
    """Learn gamma(t), the output weight of a position."""
    weights: Literal["decomposed", "free"] = "decomposed"
    """decomposed: f_h(t-u) alpha_h(u) beta_h(t); free: one number W_h[t,u] for each pair, as in AFT."""
    denominator: Literal["plain", "weighted"] = "plain"
    """plain: running sum of exp(k); weighted: W = exp(f + alpha + beta) in it too (AFT's form)."""
    backend: Literal["auto", "dense", "blocked", "spectral", "reference"] = "auto"
    """How wkv is computed; auto takes the fastest that serves."""

    def __post_init__(self) -> None:
        if self.weights == "free" and self.backend in ("blocked", "spectral"):
            raise UserError(f"model.mixer.backend {self.backend} needs decomposed weights; free ones take dense")


@dataclass(frozen=True)
class ExpTimeMixConfig:
    """Mixer of `rwkv1_exp`."""

    exponentials: int = 8
    """K: decaying exponentials whose sum is f_h(lag); the state has so many numerators for each channel."""
    taps: int = 0
    """M: lags at which f_h has a number of its own besides."""
    alpha: bool = True
    """Learn alpha_h(u), the weight of a source position."""
    beta: bool = True
    """Learn beta_h(t), the weight of a target position."""
    gamma: bool = True
    """Learn gamma(t), the output weight of a position."""


@dataclass(frozen=True)
class AttentionConfig:
    """Mixer of `mha_rotary` and `mha_shift`."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        _check_rotary_base(self.rotary_base)


@dataclass(frozen=True)
class ProAttentionConfig:
    """Mixer of `mha_pro`."""

    alpha: bool = True
    """Learn alpha_h(u), the weight of a source position."""
    beta: bool = True
    """Learn beta_h(t), the weight of a target position."""
    gamma: bool = True
    """Learn gamma(t), the output weight of a position."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        _check_rotary_base(self.rotary_base)


@dataclass(frozen=True)
class ChannelMixConfig:
    """Feed-forward half of `rwkv1`, `rwkv1_exp` and `mha_pro`."""

    activation: Literal["gelu", "mish", "relu2", "silu"] = "gelu"
    """Activation of the key branch."""


@dataclass(frozen=True)
class GegluConfig:
    """Feed-forward half of `mha_rotary` and `mha_shift`."""

    activation: Literal["gelu", "mish", "relu2", "silu"] = "gelu"
    """Activation of the gating branch."""


MixerConfig = TimeMixConfig | ExpTimeMixConfig | AttentionConfig | ProAttentionConfig
FfnConfig = ChannelMixConfig | GegluConfig


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and size."""

    arch: str = "rwkv1"
    """Architecture: rwkv1, rwkv1_exp, mha_rotary, mha_shift or mha_pro."""
    vocab_size: int = 256
    """Entries of the vocabulary; training sets it from the tokenizer."""
    ctx_len: int = 64
    """Context length in tokens."""
    layers: int = 4
    """Number of blocks."""
    heads: int = 4
    """Number of heads; divides channels."""
    channels: int = 128
    """Width of the model."""
    ffn_ratio: float = 3.0
    """Hidden size of the feed-forward half, as a multiple of channels."""
    token_shift: tuple[float, ...] = (0.5,)
    """Fractions of the channels taken from 1, 2, 3 ... tokens back."""
    token_shift_top: tuple[float, ...] | None = None
    """The same for the last layer, interpolated over the layers between; None: as token_shift."""
    dropout: float = 0.0
    """Dropout of the embedding and of the output of each half of a block."""
    initial: Initial = "zero"
    """Initial values: `original` (2021) or `zero` (late 2021: every block starts as the identity)."""
    mixer: MixerConfig = field(default_factory=TimeMixConfig)
    ffn: FfnConfig = field(default_factory=ChannelMixConfig)

    def __post_init__(self) -> None:
        if self.arch not in _ARCHITECTURE_PARTS:
            raise UserError(f"unknown architecture {self.arch!r}{nearest(self.arch, _ARCHITECTURE_PARTS)}")
        mixer, ffn = _ARCHITECTURE_PARTS[self.arch]
        if type(self.mixer) is not mixer or type(self.ffn) is not ffn:
            raise UserError(f"architecture {self.arch} takes {mixer.__name__} and {ffn.__name__}")
        for name, most in LARGEST_MODEL.items():
            check_range(f"model.{name}", getattr(self, name), 1, most)
        if self.channels % self.heads:
            divisors = [h for h in range(1, self.channels + 1) if self.channels % h == 0]
            close = min(divisors, key=lambda h: abs(h - self.heads))
            raise UserError(
                f"model.heads {self.heads} does not divide model.channels {self.channels};"
                f" the nearest that does is {close}"
            )
        if isinstance(self.mixer, ExpTimeMixConfig):
            check_range("model.mixer.exponentials", self.mixer.exponentials, 1, self.ctx_len)
            check_range("model.mixer.taps", self.mixer.taps, 0, self.ctx_len)
        if not 0 < self.ffn_ratio <= 1000 or self.ffn_hidden < 1:
            raise UserError(f"model.ffn_ratio {self.ffn_ratio} gives the feed-forward half no sensible size")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout {self.dropout} is not in [0, 1)")
        for name in ("token_shift", "token_shift_top"):
            fractions = getattr(self, name) or ()
            if len(fractions) > MOST_FRACTIONS:
                raise UserError(f"model.{name} has {len(fractions)} fractions; it may have {MOST_FRACTIONS}")
            if any(not 0 <= x <= 1 for x in fractions) or sum(fractions) > 1 + 1e-9:
                raise UserError(f"model.{name} {list(fractions)}: fractions lie in [0, 1] and sum to at most 1")

    @staticmethod
    def narrowed(data: dict[str, Any]) -> dict[str, Any]:
        """Types of the fields that depend on the architecture which `data` names."""
        arch = data.get("arch", "rwkv1")
        if not isinstance(arch, str) or arch not in _ARCHITECTURE_PARTS:
            raise UserError(f"unknown architecture {arch!r}{nearest(str(arch), ARCHITECTURES)}")
        mixer, ffn = _ARCHITECTURE_PARTS[arch]
        return {"mixer": mixer, "ffn": ffn}

    @property
    def head_size(self) -> int:
        return self.channels // self.heads

    @property
    def ffn_hidden(self) -> int:
        return int(self.ffn_ratio * self.channels)


@dataclass(frozen=True)
class DataConfig:
    """Text, its split, and how it becomes tokens."""

    source: str = "builtin"
    """A file, folder, glob, prepared folder, `builtin`, or a named download (`timemix data --help`)."""
    valid: str | None = None
    """Source of the validation text; None: the end of the source."""
    valid_fraction: float = 0.1
    """Share of the source, at its end, held out for validation when `valid` is not given."""
    encoding: str = "utf-8"
    """Encoding of the text files: any that Python knows."""
    tokenizer: TokenizerKind = "character"
    """What a token is."""
    vocab_size: int = 4096
    """Largest vocabulary of a subword or word tokenizer."""
    unknown: Unknown = "error"
    """What encodes text outside the vocabulary: nothing, <unk>, or its bytes."""
    valid_tokens: int | None = None
    """Keep at most this many tokens of the held-out text, in 20 pieces spread evenly over it; None: all."""
    order: Literal["random", "epoch"] = "random"
    """Batches: windows at random places, or each window once per epoch."""

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"data.valid_fraction {self.valid_fraction} is not in [0, 1)")
        check_range("data.vocab_size", self.vocab_size, 1, LARGEST_MODEL["vocab_size"])
        if self.valid_tokens is not None:
            check_range("data.valid_tokens", self.valid_tokens, 1, 2**63 - 1)


@dataclass(frozen=True)
class TrainConfig:
    """Optimization, its schedule, and what is reported and saved when."""

    steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 12
    """Windows of ctx_len tokens per step, over all accumulated pieces."""
    contexts: int = 1
    """Make a window this many times ctx_len long; more than 1 for an architecture whose context has no end."""
    accumulation: int = 1
    """Pieces into which a batch is cut to save memory; divides batch_size."""
    lr: float = 3e-3
    """Largest learning rate."""
    lr_final: float = 1e-4
    """Learning rate at the end."""
    embedding_lr: float = 1.0
    """Learning rate of the embedding as a multiple of that of all the rest."""
    schedule: Schedule = "cosine"
    """Way from lr to lr_final; `constant` holds lr, then decays over the last `decay` of the run."""
    warmup: float = 0.0
    """Share of the run's tokens over which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the run's tokens over which `constant` decays linearly."""
    optimizer: OptimizerName = "adamw"
    """adamw; or muon for the matrices inside blocks, with AdamW for all the rest."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Weight decay of the linear weights inside blocks; nothing else is decayed."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    precision: Precision = "auto"
    """Of the matrix products; auto: bfloat16 where the processor has it, else float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the training step (torch.compile); auto: where it can be done and the run gains by it."""
    recompute: Recompute = "none"
    """What the backward pass computes again to save memory: nothing, all but products, or whole blocks."""
    strategy: Strategy = "replicate"
    """Of several processes under torchrun: replicate holds the model in each, shard cuts it up over them."""
    seed: int = 1
    """Seed of initial values, batches and dropout."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    valid_every: int = 250
    """Steps between validations on the whole held-out text."""
    save_every: int = 500
    """Steps between checkpoints; the newest and the best are kept."""
    full_disk: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written: stop, or go on with the last good one and try again at the next."""
    spike: float = 6.0
    """Report a loss this many standard deviations above those of the steps before; 0 reports none."""
    save_bad_batches: bool = False
    """Write the batch of a loss that spikes or is not finite to bad-batches/ in the run folder."""

    def __post_init__(self) -> None:
        # Checkpoints are numbered by eight digits.
        check_range("train.steps", self.steps, 1, 10**8 - 1)
        for name in ("batch_size", "contexts", "accumulation", "log_every", "valid_every", "save_every"):
            check_range(f"train.{name}", getattr(self, name), 1, 2**31 - 1)
        for name in ("lr", "lr_final", "embedding_lr", "eps", "weight_decay", "clip", "spike", "seed"):
            check_range(f"train.{name}", getattr(self, name), 0)
        if self.seed >= 2**64:
            raise UserError(f"train.seed is {self.seed}; it must be below 2^64")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.accumulation {self.accumulation} does not divide train.batch_size {self.batch_size}"
            )
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"train.{name} {getattr(self, name)} is a share of the run, from 0 to 1")
        if len(self.betas) != 2 or any(not 0 <= b < 1 for b in self.betas):
            raise UserError(f"train.betas {list(self.betas)}: two numbers in [0, 1)")


@dataclass(frozen=True)
class RunConfig:
    """All that determines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    start: str | None = None
    """Run, or checkpoint, whose weights and tokenizer it begins with."""

    def __post_init__(self) -> None:
        if self.train.contexts > 1 and self.model.arch not in ENDLESS:
            raise UserError(
                f"train.contexts is {self.train.contexts}, but the context of {self.model.arch} ends at ctx_len;"
                f" that of {', '.join(ENDLESS)} has no end"
            )

    @property
    def window(self) -> int:
        """Tokens of a training window."""
        return self.train.contexts * self.model.ctx_len


_ARCHITECTURE_PARTS: dict[str, tuple[type[MixerConfig], type[FfnConfig]]] = {
    "rwkv1": (TimeMixConfig, ChannelMixConfig),
    "rwkv1_exp": (ExpTimeMixConfig, ChannelMixConfig),
    "mha_rotary": (AttentionConfig, GegluConfig),
    "mha_shift": (AttentionConfig, GegluConfig),
    "mha_pro": (ProAttentionConfig, ChannelMixConfig),
}
ARCHITECTURES = tuple(_ARCHITECTURE_PARTS)
ENDLESS = ("rwkv1_exp",)
"""Architectures whose context has no end: their state has one size at any position."""

# Far above what this program serves; what a damaged file asks for is refused before it is tried.
LARGEST_MODEL = {"vocab_size": 2**24, "ctx_len": 2**20, "layers": 1000, "heads": 2**16, "channels": 2**16}
MOST_FRACTIONS = 1000

_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {
        "model": {"layers": 4, "heads": 4, "channels": 128, "ctx_len": 128, "ffn_ratio": 2.5, "dropout": 0.2},
        "data": {"order": "epoch"},
        "train": {"steps": 1400, "batch_size": 16, "lr": 4e-3, "warmup": 0.02, "weight_decay": 0.1},
        "ffn": {"activation": "mish"},
    },
    "cpu-small": {
        "model": {"layers": 4, "heads": 4, "channels": 128, "ctx_len": 64, "ffn_ratio": 2.5},
        "data": {"order": "epoch"},
        "train": {"steps": 2000, "batch_size": 12, "lr": 4e-3, "warmup": 0.02, "weight_decay": 0.1},
        # Measured on tinyshakespeare: 0.008 nats better than gelu, as the 2021 code's comment says.
        "ffn": {"activation": "mish"},
    },
    # Aims at the lowest loss on tinyshakespeare in the time of nanoGPT's CPU configuration (benchmarks/records.md).
    "record": {
        "model": {
            "layers": 3,
            "heads": 4,
            "channels": 128,
            "ctx_len": 256,
            "ffn_ratio": 2.0,
            "token_shift": (0.5, 0.25),
        },
        "data": {"order": "epoch"},
        "train": {
            "steps": 1440,
            "batch_size": 8,
            "optimizer": "muon",
            "lr": 8e-3,
            "lr_final": 0.0,
            "embedding_lr": 3.0,
            "schedule": "linear",
            "warmup": 0.02,
            "betas": (0.9, 0.95),
            "weight_decay": 0.3,
            "valid_every": 2000,
            "save_every": 2000,
        },
        "ffn": {"activation": "silu"},
    },
    # 500,000 samples of 256 tokens; cosine without warm-up.
    "seed": {
        "model": {
            "layers": 5,
            "heads": 8,
            "channels": 512,
            "ctx_len": 256,
            "ffn_ratio": 3.0,
            "vocab_size": 136,
        },
        "train": {"steps": 7813, "batch_size": 64, "lr": 6e-4, "lr_final": 2e-4},
    },
}
PRESETS = tuple(_SIZES)


def architecture(arch: str, **fields: Any) -> ModelConfig:
    """Model config of an architecture with its own defaults, `fields` over them.

    Raises UserError for an unknown architecture or a value out of range.
    """
    if arch not in _ARCHITECTURE_PARTS:
        raise UserError(f"unknown architecture {arch!r}{nearest(arch, ARCHITECTURES)}")
    mixer, ffn = _ARCHITECTURE_PARTS[arch]
    own: dict[str, Any] = {"arch": arch, "mixer": mixer(), "ffn": ffn()}
    if not arch.startswith("rwkv1"):
        own["initial"] = "original"
    if arch == "mha_rotary":
        own["token_shift"] = ()
    return ModelConfig(**(own | fields))


def preset(name: str, arch: str = "rwkv1") -> RunConfig:
    """Run config of a preset for an architecture.

    Raises UserError for an unknown name.
    """
    if name not in _SIZES:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    sizes = _SIZES[name]
    train = dict(sizes["train"])
    model = architecture(arch, **sizes["model"])
    if isinstance(model.ffn, ChannelMixConfig):
        model = dataclasses.replace(model, ffn=ChannelMixConfig(**sizes.get("ffn", {})))
    # The published figure trained its attention models with a smaller step and weight decay.
    if name == "seed" and not arch.startswith("rwkv1"):
        train |= {"lr": 4e-4, "weight_decay": 0.01}
    return RunConfig(model=model, data=DataConfig(**sizes.get("data", {})), train=TrainConfig(**train))


def _check_rotary_base(base: float) -> None:
    if not 0 < base <= sys.float_info.max:
        raise UserError(f"model.mixer.rotary_base is {base}; it must be above 0, and finite")


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """End of an error sentence: the nearest right name, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def check_range(name: str, value: float, least: float, most: float = sys.float_info.max) -> None:
    if not value >= least:
        raise UserError(f"{name} is {value}; it must be at least {least}")
    if value > most:
        raise UserError(f"{name} is {value}; it must be at most {most}")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionary of a config dataclass; fields that are None are left out."""
    return dataclasses.asdict(config, dict_factory=lambda items: {k: v for k, v in items if v is not None})


Config = TypeVar("Config")


def from_dict(cls: type[Config], data: dict[str, Any], path: str = "") -> Config:
    """Config dataclass from a nested dictionary.

    Raises UserError for an unknown field (with the nearest right name) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    if narrowed := getattr(cls, "narrowed", None):
        hints |= narrowed(data)
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in hints:
            raise UserError(f"unknown field {path + name!r}{nearest(name, hints)}")
        values[name] = _checked(f"{path}{name}", value, hints[name])
    missing = [f.name for f in dataclasses.fields(typing.cast(Any, cls)) if f.name not in values and _required(f)]
    if missing:
        raise UserError(f"{path + missing[0]} is missing")
    return cls(**values)


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _checked(name: str, value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) or origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{name} is {value!r}; it must be a table")
        return value if origin is dict else from_dict(typing.cast(type, hint), value, f"{name}.")
    if origin is Literal:
        if value not in args:
            raise UserError(f"{name} is {value!r}{nearest(str(value), args)}")
        return value
    if origin is types.UnionType:
        return _checked(name, value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} is {value!r}; it must be a list")
        return tuple(_checked(name, item, args[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise UserError(f"{name} is {value!r}; it must be of type {hint.__name__}")
    return value


def to_toml(config: RunConfig) -> str:
    return tomli_w.dumps({"format_version": FORMAT_VERSION} | to_dict(config))


def parse_toml(path: Path) -> dict[str, Any]:
    """Contents of a TOML file. Raises UserError when it is missing, no TOML, or larger than any that serves."""
    text = read_text(path, LARGEST_TOML)
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MOST_DOTS:
            raise UserError(f"{path}: line {number} has {line.count('.')} dots; it may have {MOST_DOTS}: break it")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


UNFIT = (UserError, ValueError, ArithmeticError, RecursionError)
"""What `from_dict` raises for values of any kind: its own sentences, and numbers too large to show or to convert."""


def read_toml(path: Path) -> RunConfig:
    """Run config of a `config.toml`.

    Raises UserError when the file is missing, no TOML, of a newer format, or has a wrong field or value.
    """
    data = parse_toml(path)
    version = data.pop("format_version", None)
    try:
        if version != FORMAT_VERSION:
            raise UserError(f"it has format_version {version!r}; this timemix reads {FORMAT_VERSION}")
        return from_dict(RunConfig, data)
    except UNFIT as error:
        raise UserError(f"{path}: {error}") from None
