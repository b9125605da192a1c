"""Compare the speed of a training step with the naive implementation and other models, for `timemix bench train`."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from timemix.bench.baselines import (
    LIBRARY,
    PLAIN,
    WITHOUT_LIBRARY,
    library_like,
    naive_backend,
    naive_config,
    rotary_like,
)
from timemix.bench.race import Contender, Heat, Report, Say, machine_now, race, too_large
from timemix.config.run import TrainConfig
from timemix.evaluation.loss import cross_entropy
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.ops.common import fused
from timemix.runtime.device import autocast, choose_device, choose_precision
from timemix.runtime.machine import keep_freed_memory
from timemix.training.compiling import choose_compile, compiled_model
from timemix.training.optim import build_optimizers

WITHOUT_C = "by torch's operators"


def bench_train(model: ModelConfig, train: TrainConfig, *, seconds: float, say: Say) -> Report:
    """Compare the speed of a training step on random tokens with other models of about equal size.

    The model runs as in `timemix train`, then without its C code. The model also runs compiled if `compile` is "on", or
    if `compile` is "auto" and a speedup is expected. The baselines are the naive implementation in float32, rotary
    attention, and the Llama of `transformers` if `transformers` is installed.

    Args:
        model: An rwkv1 with tables f, alpha and beta.
        train: Training settings: batch size, accumulation, precision, device and optimizer.
        seconds: Mean time to spend on each implementation, in seconds.
        say: Function that prints a progress line.

    Raises:
        InvalidValue: The model is not an rwkv1, or lacks one of the tables f, alpha and beta.
        Unavailable: The machine lacks the device.
    """
    naive = naive_config(model)
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
    plain = LanguageModel(naive).to(device)
    plain.load_state_dict(ours.state_dict())
    rotary = LanguageModel(rotary_like(model)).to(device)

    contenders = [_step(PLAIN, plain, plain, tokens, "float32", train)]
    contenders[0].fault = too_large(naive.layers * naive.heads * naive.ctx_len**2, device)
    with naive_backend(), _c_or_not(PLAIN), torch.no_grad():
        expected = _logits(plain, tokens[:, :-1], "float32")
    ours.recompute = rotary.recompute = train.recompute
    models: dict[str, nn.Module] = {model.arch: ours, rotary.config.arch: rotary}
    if (library := library_like(model, device)) is not None:
        models[LIBRARY] = library
    else:
        say(WITHOUT_LIBRARY)
    for name, each in models.items():
        called = {f"{name} {precision}": each}
        if each is ours and ours.block.runs_in_c(model, "float32", device):
            called[f"{name} {precision} {WITHOUT_C}"] = each
        in_one = each is ours and ours.block.runs_in_c(model, precision, device)
        wanted, why = choose_compile(train.compile, math.inf, device, fused=in_one)
        if wanted:
            called[f"{name} {precision} compiled"] = compiled_model(each, device, train.accumulation)
        elif each is ours:
            say(f"not compiled: {why}")
        for label, form in called.items():
            contender = _step(label, form, each, tokens, precision, train)
            if each is ours:
                with _c_or_not(label):
                    contender.fault = _off(_logits(form, tokens[:, :-1], precision), expected, precision)
            contenders.append(contender)
    with naive_backend():
        paths = race(contenders, seconds, device, say)
    machine = machine_now(device)
    rows = []
    for row in paths:
        own = models.get(row.name.partition(f" {precision}")[0], ours)
        weights = sum(p.numel() for n, p in own.named_parameters() if p.ndim == 2 and "mixer.f" not in n)
        share = None
        if row.tokens_per_second:
            peak = machine.peak("float32" if row.name == PLAIN else precision)
            share = 6 * weights * row.tokens_per_second / peak
        rows.append(replace(row, share_of_peak=share, parameters=sum(p.numel() for p in own.parameters())))
    work = f"training step: {model.size_words()}, batch {shape[0]}; {precision} ({reason})"
    return Report(work, machine, [Heat(ctx_len=model.ctx_len, paths=rows)])


def _c_or_not(path: str) -> AbstractContextManager[None]:
    """Return a context that disables the C code for some contenders.

    The contenders are the naive implementation, and implementations whose names end with WITHOUT_C.
    """
    return fused.left_out() if path == PLAIN or path.endswith(WITHOUT_C) else nullcontext()


def _off(logits: Tensor, expected: Tensor, precision: str) -> str | None:
    """Return a message if logits differ from the logits of the naive implementation, otherwise None."""
    worst = float((logits - expected).abs().max() / expected.abs().max())
    if worst <= (0.03 if precision == "bfloat16" else 1e-4):
        return None
    return f"parity failed: the logit error is {worst:.1e} times the largest logit"


def _logits(model: nn.Module, tokens: Tensor, precision: str) -> Tensor:
    with autocast(precision, tokens.device):
        found = model(tokens)
    result: Tensor = (found[0] if isinstance(found, tuple) else found.logits).detach().float()
    return result


def _step(
    name: str, called: nn.Module, owner: nn.Module, tokens: Tensor, precision: str, train: TrainConfig
) -> Contender:
    """Return a training step as a contender. The step clips gradients and runs the optimizer, as in the trainer."""
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
