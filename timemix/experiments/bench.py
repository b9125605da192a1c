"""Speed side by side in one run: the op, or a training step, against a plain writing, attention, and the machine.

Each path must first give what the plain writing gives; the figures of one that does not are withheld. Paths take turns,
so that what else the machine does falls on all of them.
"""

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix._version import __version__
from timemix.config.run import TrainConfig
from timemix.errors import UserError
from timemix.evaluation.loss import cross_entropy
from timemix.experiments.table import markdown_table
from timemix.models.config import ModelConfig, TimeMixConfig, architecture
from timemix.models.language_model import LanguageModel
from timemix.models.rwkv1.time_mix import fusible, in_c
from timemix.ops.common import fused
from timemix.ops.rwkv1.api import BACKENDS, K_MAX, K_MIN, wkv1
from timemix.runtime.device import autocast, choose_device, choose_precision
from timemix.runtime.machine import free_memory, keep_freed_memory, matrix_product_peak, memory_bandwidth
from timemix.training.compiling import choose_compile
from timemix.training.optim import build_optimizers

PLAIN = "plain float32"
WITHOUT_C = "by torch's operators"
Say = Callable[[str], None]


@dataclass
class Contender:
    """A path in a benchmark: what is timed, how many tokens that is, and why its figure is withheld, if it is."""

    name: str
    call: Callable[[], object]
    tokens: int
    fault: str | None = None


def plain_wkv1(
    k: Tensor, v: Tensor, f: Tensor, alpha: Tensor, beta: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """The formula of 2021 as anyone would write it: W as a matrix, one einsum, a running sum. Shapes as in `wkv1`."""
    T = k.shape[1]
    lag = torch.arange(T, device=k.device)[:, None] - torch.arange(T, device=k.device)
    W = (f[:, lag.clamp(min=0)] * alpha[:, None, :T] * beta[:, :T, None]).masked_fill(lag < 0, 0)
    exp_k = k.clamp(K_MIN, K_MAX).exp()
    return torch.einsum("htu,buhn->bthn", W, exp_k * v) / exp_k.cumsum(1), None


def bench_op(
    *, ctx_lens: Sequence[int], batch_size: int, heads: int, channels: int, seconds: float, device: str, say: Say
) -> dict[str, Any]:
    """Forward and backward of wkv1 alone, each form in float32 and, where the device has it, bfloat16, and of fused
    attention of that size.

    Raises UserError for a device that this machine does not have, or sizes that make no head.
    """
    if channels % heads or min(*ctx_lens, batch_size, heads) < 1:
        raise UserError(f"{channels} channels cannot be cut into {heads} heads, or a size is below 1")
    where, _ = choose_device(device)
    precision, reason = choose_precision("auto", where)
    dtypes = [torch.float32, torch.bfloat16] if precision == "bfloat16" else [torch.float32]
    say(f"{' and '.join(str(d).removeprefix('torch.') for d in dtypes)}: {reason}")
    keep_freed_memory()
    results = []
    for T in ctx_lens:
        shape = (batch_size, T, heads, channels // heads)
        torch.manual_seed(0)
        x = {n: torch.randn(shape, device=where) for n in ("k", "v")}
        x["f"] = torch.rand(heads, T, device=where) * 0.1
        x |= {n: 1 + 0.1 * torch.randn(heads, T, device=where) for n in ("alpha", "beta")}
        contenders = [_op(PLAIN, plain_wkv1, x, torch.float32)]
        for form in ("dense", "blocked", "spectral"):
            for dtype in dtypes:
                name = f"{form} {str(dtype).removeprefix('torch.')}"
                contenders.append(_op(name, lambda *a, form=form: wkv1(*a, backend=form), x, dtype))
        contenders += [_attention(shape, dtype, where) for dtype in dtypes]
        for contender in contenders:
            if contender.name == PLAIN or contender.name.startswith("dense"):
                contender.fault = contender.fault or too_large(heads * T * T, where)
        say(f"ctx_len {T}")
        results.append({"ctx_len": T, "paths": race(contenders, seconds, where, say)})
    work = f"wkv1 alone, forward and backward: batch {batch_size}, {heads} heads, {channels} channels"
    return {"work": work, "machine": machine_now(where), "results": results}


def too_large(matrix: int, device: torch.device) -> str | None:
    """Why matrices of so many numbers do not fit: three and their gradients, in float32."""
    free, needed = free_memory(device), 24 * matrix
    if free is None or needed < free:
        return None
    return f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"


def _op(name: str, form: Callable[..., tuple[Tensor, Any]], x: dict[str, Tensor], dtype: torch.dtype) -> Contender:
    def run(x: dict[str, Tensor]) -> list[Tensor]:
        y, _ = form(*x.values())
        y.backward(torch.ones_like(y))
        gradients = [cast(Tensor, a.grad) for a in x.values()]
        for a in x.values():
            a.grad = None
        return [y.detach(), *gradients]

    def leaves(T: int, dtype: torch.dtype) -> dict[str, Tensor]:
        cut = {n: a[:, :T] for n, a in x.items()}
        return {
            n: (a.to(dtype) if n in "kv" or dtype == torch.float64 else a).clone().requires_grad_()
            for n, a in cut.items()
        }

    # An odd length: no block comes out even.
    short = min(x["k"].shape[1], 701)
    try:
        ours = run(leaves(short, dtype))
        theirs = [a.detach().float() for a in _plain(leaves(short, torch.float64))]
        worst = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
        allowed = 0.03 if dtype == torch.bfloat16 else 1e-4
        fault = None if worst <= allowed else f"parity failed: off by {worst:.1e} of the largest value"
    except (RuntimeError, ValueError) as error:
        fault = f"fails: {str(error).splitlines()[0]}"
    inputs = leaves(x["k"].shape[1], dtype)
    return Contender(name, lambda: run(inputs), x["k"].shape[:2].numel(), fault)


def _plain(x: dict[str, Tensor]) -> list[Tensor]:
    y, _ = plain_wkv1(**x)
    return [y, *torch.autograd.grad(y, list(x.values()), torch.ones_like(y))]


def _attention(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Contender:
    B, T, H, N = shape
    q, k, v = (torch.randn(B, H, T, N, dtype=dtype, device=device, requires_grad=True) for _ in range(3))

    def call() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    return Contender(f"attention {str(dtype).removeprefix('torch.')}", call, B * T)


def bench_train(model: ModelConfig, train: TrainConfig, *, seconds: float, say: Say) -> dict[str, Any]:
    """A training step of one size on random tokens: ours as `timemix train` runs it, without its C code, and compiled
    where that is asked for or pays; the plain writing in float32; rotary attention of the same size, and a Llama of the
    `transformers` library where that is installed.

    Raises UserError for another architecture than rwkv1 with tables.
    """
    mixer = model.mixer
    if not isinstance(mixer, TimeMixConfig) or mixer.weights == "free" or not (mixer.alpha and mixer.beta):
        raise UserError("bench train compares rwkv1, with alpha and beta, to the others; leave --model.arch out")
    device, _ = choose_device(train.device)
    precision, reason = choose_precision(train.precision, device)
    keep_freed_memory()
    torch.manual_seed(0)
    shape = (train.batch_size // train.accumulation, model.ctx_len)
    tokens = torch.randint(model.vocab_size, (shape[0], shape[1] + 1), device=device)
    ours = LanguageModel(model).to(device)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    plain = LanguageModel(replace(model, mixer=replace(mixer, backend=PLAIN))).to(device)  # type: ignore[arg-type]
    plain.load_state_dict(ours.state_dict())
    sizes = ("vocab_size", "ctx_len", "layers", "heads", "channels", "ffn_ratio")
    rotary = LanguageModel(architecture("mha_rotary", **{n: getattr(model, n) for n in sizes})).to(device)

    contenders = [_step(PLAIN, plain, plain, tokens, "float32", train)]
    contenders[0].fault = too_large(model.layers * model.heads * model.ctx_len**2, device)
    with _plain_backend(), _c_or_not(PLAIN), torch.no_grad():
        expected = _logits(plain, tokens[:, :-1], "float32")
    ours.recompute = rotary.recompute = train.recompute
    models: dict[str, nn.Module] = {"rwkv1": ours, "mha_rotary": rotary}
    if (llama := llama_like(model, device)) is not None:
        models["transformers Llama"] = llama
    else:
        say("transformers is not installed: its Llama is left out")
    for name, each in models.items():
        called = {f"{name} {precision}": each}
        if name == "rwkv1" and device.type == "cpu" and fusible(model) and fused.available():
            called[f"{name} {precision} {WITHOUT_C}"] = each
        in_one = name == "rwkv1" and in_c(model, precision, device)
        wanted, why = choose_compile(train.compile, math.inf, device, fused=in_one)
        if wanted:
            called[f"{name} {precision} compiled"] = cast(nn.Module, torch.compile(each, dynamic=False))
        elif name == "rwkv1":
            say(f"not compiled: {why}")
        for label, form in called.items():
            contender = _step(label, form, each, tokens, precision, train)
            if name == "rwkv1":
                with _c_or_not(label):
                    contender.fault = _off(_logits(form, tokens[:, :-1], precision), expected, precision)
            contenders.append(contender)
    with _plain_backend():
        paths = race(contenders, seconds, device, say)
    machine = machine_now(device)
    for row in paths:
        own = models.get(row["name"].partition(f" {precision}")[0], ours)
        weights = sum(p.numel() for n, p in own.named_parameters() if p.ndim == 2 and "mixer.f" not in n)
        if row.get("tokens_per_second"):
            used = "float32" if row["name"] == PLAIN else precision
            row["share_of_peak"] = 6 * weights * row["tokens_per_second"] / machine[f"{used}_peak"]
        row["parameters"] = sum(p.numel() for p in own.parameters())
    work = (
        f"training step: {model.layers} layers, {model.heads} heads, {model.channels} channels, ffn_ratio"
        f" {model.ffn_ratio}, ctx_len {model.ctx_len}, batch {shape[0]}, vocabulary {model.vocab_size};"
        f" {precision} ({reason})"
    )
    return {"work": work, "machine": machine, "results": [{"ctx_len": model.ctx_len, "paths": paths}]}


@contextmanager
def _plain_backend() -> Iterator[None]:
    """Within it, wkv1 has the plain writing among its backends."""
    BACKENDS[PLAIN] = lambda k, v, f, alpha, beta, *_: plain_wkv1(k, v, f, alpha, beta)
    try:
        yield
    finally:
        del BACKENDS[PLAIN]


def _c_or_not(path: str) -> AbstractContextManager[None]:
    """What a path runs in: the plain writing, and one that says so, by torch alone."""
    return fused.left_out() if path == PLAIN or path.endswith(WITHOUT_C) else nullcontext()


def _off(logits: Tensor, expected: Tensor, precision: str) -> str | None:
    """Why logits are not those of the plain writing."""
    worst = float((logits - expected).abs().max() / expected.abs().max())
    if worst <= (0.03 if precision == "bfloat16" else 1e-4):
        return None
    return f"parity failed: logits off by {worst:.1e} of the largest"


def _logits(model: nn.Module, tokens: Tensor, precision: str) -> Tensor:
    with autocast(precision, tokens.device):
        found = model(tokens)
    return (found[0] if isinstance(found, tuple) else found.logits).detach().float()


def _step(
    name: str, called: nn.Module, owner: nn.Module, tokens: Tensor, precision: str, train: TrainConfig
) -> Contender:
    """One step as the trainer takes it, optimizer and clipping included."""
    optimizers = build_optimizers(owner, train, precision)

    def call() -> None:
        with autocast(precision, tokens.device), _c_or_not(name):
            found = called(tokens[:, :-1])
        logits = found[0] if isinstance(found, tuple) else found.logits
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        cross_entropy(logits, tokens[:, 1:]).backward()
        if train.clip > 0:
            torch.nn.utils.clip_grad_norm_(owner.parameters(), train.clip)
        for optimizer in optimizers:
            optimizer.step()

    return Contender(name, call, tokens[:, 1:].numel())


def llama_like(model: ModelConfig, device: torch.device) -> nn.Module | None:
    """A Llama-style model of `transformers` with about as many parameters, None where that is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]
    except ImportError:
        return None
    C = model.channels
    # Three matrices of its feed-forward half and four of attention make the time-mix's 4 and the channel-mix's 1 + 3 r.
    hidden = int((model.ffn_ratio + 1 / 3) * C) // 8 * 8
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=C,
        intermediate_size=hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=model.ctx_len,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device)


def race(contenders: list[Contender], seconds: float, device: torch.device, say: Say) -> list[dict[str, Any]]:
    """Times of each path, all taking turns, until `seconds` have gone for each on average, three rounds at least."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {c.name: [] for c in contenders if c.fault is None}
    running = [c for c in contenders if c.fault is None]
    for contender in list(running):
        say(f"warming up {contender.name}")
        try:
            for _ in range(2):
                contender.call()
        except (RuntimeError, MemoryError) as error:
            contender.fault = f"fails: {next(iter(str(error).splitlines()), type(error).__name__)[:200]}"
            running.remove(contender)
    end = time.perf_counter() + seconds * len(running)
    rounds = 0
    while running and (rounds < 3 or time.perf_counter() < end):
        for contender in running:
            start = time.perf_counter()
            contender.call()
            synchronize()
            times[contender.name].append(time.perf_counter() - start)
        rounds += 1
    base = times.get(contenders[0].name) or None
    rows = []
    for contender in contenders:
        row: dict[str, Any] = {"name": contender.name}
        if contender.fault is not None:
            rows.append(row | {"withheld": contender.fault})
            continue
        own = times[contender.name]
        middle = statistics.median(own)
        row |= {"seconds": middle, "rounds": rounds, "tokens_per_second": contender.tokens / middle}
        if base is not None:
            work = contender.tokens / contenders[0].tokens
            ratios = sorted(work * a / b for a, b in zip(base, own, strict=True))
            row["ratio"] = {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
        rows.append(row)
    return rows


def machine_now(device: torch.device) -> dict[str, Any]:
    """What the figures depend on, and the limits, measured now."""
    peaks = {f"{p}_peak": matrix_product_peak(p, device) for p in ("float32", "bfloat16")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "timemix": f"{__version__}{_commit()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        **peaks,
        "bandwidth": memory_bandwidth(device),
    }


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that runs, where the package lies in a git work tree."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f" ({done.stdout.strip()})"


_MORE = {
    "share_of_peak": "share of peak, 6 N D",
    "share_of_floor": "share of the floor",
    "state_bytes": "state, bytes",
    "peak_memory": "largest memory of the process so far",
}


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a person reads it."""
    machine = report["machine"]
    parts = [
        f"{report['work']}. {machine['processor']}, {machine['threads']} threads, torch {machine['torch']},"
        f" timemix {machine['timemix']}, {machine['date']}. Measured in the same run: matrix products"
        f" {machine['float32_peak'] / 1e9:.0f} GFLOP/s in float32, {machine['bfloat16_peak'] / 1e9:.0f} in bfloat16;"
        f" memory read at {machine['bandwidth'] / 1e9:.0f} GB/s."
    ]
    for result in report["results"]:
        more = {key: head for key, head in _MORE.items() if any(key in row for row in result["paths"])}
        title = result.get("title", f"ctx_len {result.get('ctx_len')}")
        rows = [[title, "ms", "tokens/s", f"ratio to {result['paths'][0]['name']}", *more.values()]]
        for row in result["paths"]:
            if "withheld" in row:
                rows.append([row["name"], row["withheld"], *["-"] * (len(rows[0]) - 2)])
                continue
            ratio = row.get("ratio")
            spread = "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            cells = [row["name"], f"{1e3 * row['seconds']:.{1 if row['seconds'] > 0.01 else 3}f}"]
            cells += [f"{row['tokens_per_second']:,.0f}", spread]
            for key in more:
                value = row.get(key)
                cells.append("-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.0%}")
            rows.append(cells)
        parts.append(markdown_table(rows))
    return "\n\n".join(parts) + "\n"
