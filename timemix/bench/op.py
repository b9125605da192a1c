"""Compare the speed of wkv1 with the naive implementation and with attention, for `timemix bench op`."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from timemix.bench.baselines import FORMS, OP, PLAIN, attention, plain_wkv1
from timemix.bench.race import Contender, Heat, Report, Say, machine_now, race, too_large
from timemix.errors import InvalidValue
from timemix.runtime.device import choose_device, choose_precision
from timemix.runtime.machine import keep_freed_memory


def bench_op(
    *, ctx_lens: Sequence[int], batch_size: int, heads: int, channels: int, seconds: float, device: str, say: Say
) -> Report:
    """Time forward and backward pass of wkv1, beside the naive implementation and fused attention of equal size.

    Each backend of wkv1 (dense, blocked, spectral) runs in float32, and in bfloat16 if the device supports bfloat16.

    Args:
        ctx_lens: Context lengths to time, in tokens.
        batch_size: Number of sequences.
        heads: Number of heads, a divisor of `channels`.
        channels: Total number of channels of all heads.
        seconds: Mean time to spend on each implementation at each context length, in seconds.
        device: PyTorch device.
        say: Function that prints a progress line.

    Raises:
        InvalidValue: A size is below 1, or `heads` does not divide `channels`.
        Unavailable: The machine lacks the device.
    """
    if channels % heads or min(*ctx_lens, batch_size, heads) < 1:
        raise InvalidValue(
            f"heads={heads} does not divide channels={channels}, or a size is below 1; give sizes of at least 1, and a"
            " divisor of channels as heads"
        )
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
        for form in FORMS:
            for dtype in dtypes:
                name = f"{form} {str(dtype).removeprefix('torch.')}"
                contenders.append(_op(name, lambda *a, form=form: OP(*a, backend=form), x, dtype))
        contenders += [attention(shape, dtype, where) for dtype in dtypes]
        for contender in contenders:
            if contender.name == PLAIN or contender.name.startswith("dense"):
                contender.fault = contender.fault or too_large(heads * T * T, where)
        say(f"ctx_len {T}")
        results.append(Heat(ctx_len=T, paths=race(contenders, seconds, where, say)))
    work = f"wkv1 alone, forward and backward pass: batch {batch_size}, {heads} heads, {channels} channels"
    return Report(work, machine_now(where), results)


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

    # The length 701 is odd, so that the last block of every backend is incomplete.
    short = min(x["k"].shape[1], 701)
    try:
        ours = run(leaves(short, dtype))
        theirs = [a.detach().float() for a in _plain(leaves(short, torch.float64))]
        worst = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
        allowed = 0.03 if dtype == torch.bfloat16 else 1e-4
        fault = None if worst <= allowed else f"parity failed: the error is {worst:.1e} times the largest value"
    except (RuntimeError, ValueError) as error:
        fault = f"fails: {str(error).splitlines()[0]}"
    inputs = leaves(x["k"].shape[1], dtype)
    return Contender(name, lambda: run(inputs), x["k"].shape[:2].numel(), fault)


def _plain(x: dict[str, Tensor]) -> list[Tensor]:
    y, _ = plain_wkv1(**x)
    return [y, *torch.autograd.grad(y, list(x.values()), torch.ones_like(y))]
