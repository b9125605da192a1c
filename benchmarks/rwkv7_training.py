"""The training part of benchmarks/rwkv7.py."""

from dataclasses import dataclass, replace

import torch
from other_programs import differs, hf_model, rwkv4_of_transformers
from rwkv7_common import CPU, Record, random_model, rwkv7, say, square_product
from torch import Tensor, nn

from timemix.bench.measure import StepSpeed, measure_training
from timemix.bench.race import Contender, Heat, race
from timemix.config.run import RunConfig, TrainConfig
from timemix.evaluation.loss import cross_entropy
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.low_rank import LowRank
from timemix.models.registry import model_config
from timemix.runtime.device import autocast
from timemix.runtime.machine import keep_freed_memory
from timemix.training.optim import build_optimizers


@dataclass(frozen=True)
class Sizes:
    """Sizes of a benchmark."""

    layers: int
    channels: int
    vocab_size: int
    lengths: tuple[int, int, int]
    """Context lengths of the comparison with Llama."""
    small: tuple[int, int]
    """Context length and batch size of the small model."""
    seconds: float
    """Mean time to spend on each contender, in seconds."""


REAL = Sizes(12, 768, 4096, (512, 2048, 8192), (256, 12), 20.0)
TOY = Sizes(2, 64, 32, (16, 32, 64), (16, 2), 0.01)


def llama(config: ModelConfig) -> ModelConfig:
    """Return the settings of a Llama with as many weights in each layer: 12 C^2."""
    return model_config(
        "llama",
        layers=config.layers,
        channels=config.channels,
        heads=config.heads,
        vocab_size=config.vocab_size,
        ctx_len=config.ctx_len,
        ffn_ratio=8 / 3,
    )


class Training:
    """A training step on random tokens, with clipping and AdamW.

    Args:
        name: Name of the contender.
        model: Model that maps tokens (B, T) to logits, to a tuple that starts with logits, or to an object with them.
        batch_size: B.
        ctx_len: T.
        precision: "float32" or "bfloat16".
        optimized: Module with the parameters, if `model` is a compiled form of it.
    """

    def __init__(
        self, name: str, model: nn.Module, batch_size: int, ctx_len: int, precision: str, optimized: nn.Module
    ) -> None:
        self.name, self.model, self.precision = name, model, precision
        self.parameters = list(optimized.parameters())
        self.optimizers = (
            build_optimizers(optimized, TrainConfig(), precision)
            if isinstance(optimized, LanguageModel)
            else [torch.optim.AdamW(self.parameters, lr=1e-4)]
        )
        vocab_size = optimized.config.vocab_size
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(vocab_size, (batch_size, ctx_len + 1), generator=generator)

    def logits(self) -> Tensor:
        with autocast(self.precision, CPU):
            found = self.model(self.tokens[:, :-1])
        return found[0] if isinstance(found, tuple) else found if isinstance(found, Tensor) else found.logits

    def __call__(self) -> None:
        cross_entropy(self.logits(), self.tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def contender(self) -> Contender:
        return Contender(self.name, self, self.tokens[:, 1:].numel())


def step(
    config: ModelConfig, batch_size: int, precision: str = "float32", model: LanguageModel | None = None
) -> Training:
    model = model or random_model(config)
    return Training(f"{config.arch} {precision}", model, batch_size, config.ctx_len, precision, model)


def products(config: ModelConfig, batch_size: int, precision: str) -> Contender:
    """Return the matrix products of a training step alone, forward and backward."""
    model, dtype = LanguageModel(config), getattr(torch, precision)
    rows, pairs = batch_size * config.ctx_len, []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            pairs.append((torch.randn(rows, module.in_features), module.weight.detach()))
        if isinstance(module, LowRank):
            for weight in (module.down_weight, module.up_weight):
                pairs.append((torch.randn(rows, len(weight)), weight.detach().T))
    pairs = [(x.to(dtype), w.to(dtype)) for x, w in pairs]

    def call() -> None:
        for x, weight in pairs:
            y = x @ weight.T
            y @ weight
            y.T @ x

    return Contender(f"its matrix products alone {precision}", call, rows)


def with_share(heat: Heat, config: ModelConfig, size: int) -> Heat:
    """Add the share of the speed of `square_product` by 6 N D, where N does not count the embedding."""
    model = LanguageModel(config)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.embedding.weight.numel()
    seconds = {row.name.split()[-1]: row.seconds for row in heat.paths if row.name.startswith("one product")}
    paths = []
    for row in heat.paths:
        if row.tokens_per_second and not row.name.startswith("one product"):
            peak = 2 * size**3 / seconds[row.name.split()[-1]]
            row = replace(row, share_of_peak=6 * weights * row.tokens_per_second / peak)
        paths.append(row)
    return replace(heat, paths=paths)


def beside_rwkv7_hf(sizes: Sizes, layers: int, channels: int, batch_size: int) -> Heat:
    """Time a training step beside rwkv7-hf in plain PyTorch, with equal weights."""
    config = rwkv7(layers, channels, sizes.vocab_size, min(128, sizes.lengths[1]))
    ctx_len = config.ctx_len
    ours = random_model(config)
    contenders = []
    try:
        theirs = Training("rwkv7-hf float32", hf := hf_model(ours), batch_size, ctx_len, "float32", hf)
        mine = step(config, batch_size, model=ours)
        contenders.append(theirs.contender())
        contenders[0].fault = differs(theirs.logits(), mine.logits(), 1e-4)
    except ImportError:
        say("rwkv7-hf is not installed: it is skipped")
    contenders.append(step(config, batch_size, model=ours).contender())
    title = f"{config.size_words()}, batch {batch_size}"
    return Heat(title=title, paths=race(contenders, sizes.seconds, CPU, say))


def earlier(arch: str, layers: int, channels: int, vocab_size: int, ctx_len: int) -> ModelConfig:
    """Return the settings of an architecture from rwkv4 to rwkv6, with heads of 64 channels."""
    heads = {} if arch == "rwkv4" else {"heads": max(1, channels // 64)}
    sizes = {"layers": layers, "channels": channels, "vocab_size": vocab_size, "ctx_len": ctx_len}
    return model_config(arch, **sizes, **heads)


def of_the_peak(sizes: Sizes, config: ModelConfig) -> Heat:
    """Time a training step in both precisions, beside its matrix products alone and one large product."""
    size, contenders = 2048 if sizes is REAL else 64, []
    for precision in ("float32", "bfloat16"):
        contenders += [step(config, 4, precision).contender(), products(config, 4, precision)]
        contenders.append(square_product(size, precision))
    paths = race(contenders, sizes.seconds, CPU, say)
    return with_share(Heat(title=f"{config.size_words()}, batch 4", paths=paths), config, size)


def beside_rwkv4_of_transformers(sizes: Sizes, layers: int, channels: int, ctx_len: int) -> Heat:
    """Time a training step of rwkv4 beside RwkvForCausalLM of transformers, a loop over tokens, with equal weights."""
    config = earlier("rwkv4", layers, channels, sizes.vocab_size, ctx_len)
    ours = random_model(config)
    mine, contenders = step(config, 1, model=ours), []
    try:
        theirs = Training("RwkvForCausalLM float32", hf := rwkv4_of_transformers(ours), 1, ctx_len, "float32", hf)
        contenders.append(theirs.contender())
        contenders[0].fault = differs(theirs.logits(), mine.logits(), 1e-4)
    except ImportError:
        say("transformers is not installed: its RwkvForCausalLM is skipped")
    contenders.append(mine.contender())
    title = f"{config.size_words()}, batch 1"
    return Heat(title=title, paths=race(contenders, sizes.seconds, CPU, say))


def long_context(sizes: Sizes) -> Heat:
    """Time a training step at a context length of 4,096 and of 512, with the peak memory of a step."""
    short, long = sizes.lengths[0], 8 * sizes.lengths[0]
    contenders, memory = [], {}
    for ctx_len in (short, long):
        config, batch_size = rwkv7(sizes.layers, sizes.channels, sizes.vocab_size, ctx_len), long // ctx_len
        each = step(config, batch_size).contender()
        each.name = f"{batch_size} x {ctx_len} float32"
        contenders.append(each)
        train = TrainConfig(batch_size=batch_size, precision="float32")
        measured = measure_training(RunConfig(model=config, train=train), 1)
        if isinstance(measured, StepSpeed):
            memory[each.name] = measured.peak_memory
    paths = race(contenders, sizes.seconds, CPU, say)
    paths = [replace(row, call_memory=memory.get(row.name)) for row in paths]
    return Heat(title=f"{long} tokens per step", paths=paths)


def beside_llama(sizes: Sizes, ctx_len: int) -> Heat:
    """Time a training step beside Llama of timemix and, at the shortest context, of transformers, of equal size."""
    batch_size = max(1, 4 * sizes.lengths[0] // ctx_len)
    config = rwkv7(sizes.layers, sizes.channels, sizes.vocab_size, ctx_len)
    contenders = [step(llama(config), batch_size).contender(), step(config, batch_size).contender()]
    # Compiling takes minutes for each length.
    if ctx_len == sizes.lengths[0] and (theirs := transformers_llama(llama(config))) is not None:
        name = "transformers Llama float32 compiled"
        compiled = torch.compile(theirs)
        contenders.append(Training(name, compiled, batch_size, ctx_len, "float32", theirs).contender())
    title = f"{config.size_words()}, batch {batch_size}"
    return Heat(title=title, paths=race(contenders, sizes.seconds, CPU, say))


def transformers_llama(config: ModelConfig) -> nn.Module | None:
    """Return the Llama of transformers with the sizes of a Llama of timemix; None without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        say("transformers is not installed: its Llama is skipped")
        return None
    found: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.channels,
            intermediate_size=round(config.ffn_ratio * config.channels),
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.ctx_len,
            use_cache=False,
        )
    )
    return found


def small(sizes: Sizes) -> Heat:
    """Time a training step of a small model beside an rwkv1 with as many parameters."""
    ctx_len, batch_size = sizes.small
    channels = min(128, sizes.channels)
    config = rwkv7(4, channels, 65, ctx_len)
    count = sum(p.numel() for p in LanguageModel(config).parameters())

    def first(ratio: float) -> ModelConfig:
        return model_config(
            "rwkv1", layers=4, channels=channels, heads=4, vocab_size=65, ctx_len=ctx_len, ffn_ratio=ratio
        )

    # The number of parameters of rwkv1 grows by 3 C^2 in each layer for each unit of ffn_ratio.
    missing = count - sum(p.numel() for p in LanguageModel(first(2.5)).parameters())
    equal = first(2.5 + missing / (4 * 3 * channels**2))
    contenders = []
    for precision in ("float32", "bfloat16"):
        contenders += [step(each, batch_size, precision).contender() for each in (equal, config)]
    title = f"{count:,} parameters, ctx_len {ctx_len}, batch {batch_size}"
    return Heat(title=title, paths=race(contenders, sizes.seconds / 4, CPU, say))


def training(record: Record, sizes: Sizes) -> None:
    keep_freed_memory()
    record.part("training beside rwkv7-hf", lambda: beside_rwkv7_hf(sizes, sizes.layers, sizes.channels, batch_size=1))
    small_channels = min(256, sizes.channels)
    record.part("small training beside rwkv7-hf", lambda: beside_rwkv7_hf(sizes, 4, small_channels, batch_size=2))
    config = rwkv7(sizes.layers, sizes.channels, sizes.vocab_size, sizes.lengths[0])
    record.part("share of the peak", lambda: of_the_peak(sizes, config))
    record.part("long context", lambda: long_context(sizes))
    for ctx_len in sizes.lengths:
        record.part(f"beside Llama at ctx_len {ctx_len}", lambda ctx_len=ctx_len: beside_llama(sizes, ctx_len))
    record.part("small model", lambda: small(sizes))


def training_of_earlier(record: Record, sizes: Sizes) -> None:
    """Time training steps of rwkv4, rwkv5 and rwkv6."""
    keep_freed_memory()
    ctx_len = sizes.lengths[0]
    for arch in ("rwkv4", "rwkv5", "rwkv6"):
        config = earlier(arch, sizes.layers, sizes.channels, sizes.vocab_size, ctx_len)
        record.part(f"share of the peak: {arch}", lambda config=config: of_the_peak(sizes, config))
    for layers, channels in ((sizes.layers, sizes.channels), (4, min(256, sizes.channels))):
        name = f"rwkv4 beside RwkvForCausalLM, {layers} layers, {channels} channels"
        record.part(name, lambda a=layers, b=channels: beside_rwkv4_of_transformers(sizes, a, b, ctx_len))
