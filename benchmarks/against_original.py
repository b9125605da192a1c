"""Compare the speed of training and generation with the original code of 2021, alternating in one process.

    git clone --branch 0.01 https://github.com/BlinkDL/RWKV-LM original
    python benchmarks/against_original.py original --json out.json

The original code runs as published, in float32, with its own model, optimizer and clipping. To generate a character,
the original code recomputes a window of ctx_len tokens. timemix runs as in `timemix train` and `timemix sample`. Before
the timing, both programs get the same weights, and their logits must agree to 1e-4. Peak memory is the growth of a
fresh process during three training steps, uncompiled in both programs.
"""

import argparse
import importlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from timemix.config.run import RunConfig, TrainConfig
from timemix.generation.generate import generate_tokens
from timemix.generation.sampler import Sampler
from timemix.models.language_model import LanguageModel, block_class
from timemix.models.layers.token_shift import TokenShift
from timemix.models.registry import model_config
from timemix.models.rwkv1.weights import from_published
from timemix.ops.rwkv1.api import wkv1
from timemix.runtime import machine
from timemix.runtime.device import autocast, choose_precision
from timemix.runtime.machine import keep_freed_memory, matrix_product_peak, resident_memory
from timemix.training.compiling import choose_compile
from timemix.training.optim import build_optimizers

SIZES = {
    "cpu-small": {"layers": 4, "heads": 4, "channels": 128, "ctx_len": 64, "batch_size": 12},
    "seed, ffn_ratio 2.5": {"layers": 5, "heads": 8, "channels": 512, "ctx_len": 256, "batch_size": 16},
    "the same at ctx_len 2048": {"layers": 5, "heads": 8, "channels": 512, "ctx_len": 2048, "batch_size": 2},
}
SAMPLED = "seed, ffn_ratio 2.5"
LONG = "the same at ctx_len 2048"
VOCAB = 65
CPU = torch.device("cpu")


def build(module, sizes: dict) -> tuple[torch.nn.Module, LanguageModel]:
    """Create the original model and a timemix model with the same random weights, and check their logits."""
    config = module.GPTConfig(
        VOCAB,
        sizes["ctx_len"],
        model_type="RWKV",
        n_layer=sizes["layers"],
        n_head=sizes["heads"],
        n_embd=sizes["channels"],
    )
    original = module.GPT(config)
    fields = {k: v for k, v in sizes.items() if k != "batch_size"}
    ours = LanguageModel(model_config("rwkv1", vocab_size=VOCAB, ffn_ratio=2.5, activation="mish", **fields))
    with torch.no_grad():
        for p in original.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    ours.load_state_dict(from_published({name: p.detach() for name, p in original.named_parameters()}))
    tokens = torch.randint(0, VOCAB, (2, sizes["ctx_len"]))
    with torch.no_grad():
        difference = (original(tokens)[0] - ours(tokens)[0]).abs().max().item()
    if difference > 1e-4:
        raise SystemExit(f"parity failed: logits differ by {difference:.2e}; nothing is timed")
    return original, ours


def alternate(a, b, rounds: int, warmup: int = 2) -> tuple[list[float], list[float]]:
    """Time two functions in alternation. Return the seconds of each call of `a`, and of each call of `b`."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + warmup):
        for call, kept in zip((a, b), times, strict=True):
            start = time.perf_counter()
            call()
            if i >= warmup:
                kept.append(time.perf_counter() - start)
    return times


def summary(unit_count: int, original: list[float], ours: list[float]) -> dict:
    """Return the median speeds of both programs, and the median, minimum and maximum ratio of paired calls."""
    ratios = sorted(a / b for a, b in zip(original, ours, strict=True))
    return {
        "original_per_second": unit_count / statistics.median(original),
        "ours_per_second": unit_count / statistics.median(ours),
        "ratio_median": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
    }


def steps(module, sizes: dict, compiled: bool) -> tuple[Callable[[], None], Callable[[], None], LanguageModel]:
    """Return a training step of the original, a training step of timemix, and the timemix model."""
    original, ours = build(module, sizes)
    settings = RunConfig(train=TrainConfig(lr=6e-4)).train
    their_settings = argparse.Namespace(weight_decay=0.0, learning_rate=6e-4, betas=(0.9, 0.99))
    their_optimizer = original.configure_optimizers(their_settings)
    (our_optimizer,) = build_optimizers(ours, settings)
    precision, _ = choose_precision("auto", CPU)
    called = torch.compile(ours, dynamic=False) if compiled else ours
    x, y = (torch.randint(0, VOCAB, (sizes["batch_size"], sizes["ctx_len"])) for _ in range(2))

    def their_step():
        _, loss = original(x, y)
        original.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(original.parameters(), 1.0)
        their_optimizer.step()
        loss.item()

    def our_step():
        with autocast(precision, CPU):
            logits, _ = called(x)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        our_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        our_optimizer.step()
        loss.item()

    return their_step, our_step, ours


def training(module, sizes: dict, rounds: int) -> dict:
    """Time a training step of both programs."""
    precision, reason = choose_precision("auto", CPU)
    # Compile if `auto` would compile a long run. A run of the preset `cpu-small` itself is too short for compiling.
    config = model_config("rwkv1")
    fused = block_class(config).runs_in_c(config, precision, CPU)
    compiled, compile_reason = choose_compile("auto", math.inf, CPU, fused=fused)
    keep_freed_memory()
    their_step, our_step, ours = steps(module, sizes, compiled)
    figures = summary(sizes["batch_size"] * sizes["ctx_len"], *alternate(their_step, our_step, rounds))
    matrix_weights = sum(p.numel() for n, p in ours.named_parameters() if p.ndim == 2 and "mixer.f" not in n)
    peak = matrix_product_peak(precision, CPU)
    figures["share_of_peak"] = 6 * matrix_weights * figures["ours_per_second"] / peak
    reasons = {"precision": precision, "reason": reason, "compiled": compiled, "compile_reason": compile_reason}
    return figures | reasons | {"peak_gflops": peak / 1e9}


def time_mix(module, sizes: dict, rounds: int) -> dict:
    """Time forward and backward pass of the time-mix without its linear maps: token-shift, the op, gate and gamma."""
    original, ours = build(module, sizes)
    theirs, mixer, shift = original.blocks[0].attn, ours.blocks[0].mixer, TokenShift(ours.config, 0)
    for name in ("key", "value", "receptance", "output"):
        setattr(theirs, name, torch.nn.Identity())
    B, T, C = sizes["batch_size"], sizes["ctx_len"], sizes["channels"]
    x = torch.randn(B, T, C, requires_grad=True)

    def their_call():
        theirs(x).sum().backward()

    def our_call():
        shifted, _ = shift(x)
        k = shifted.view(B, T, sizes["heads"], -1)
        y, _ = wkv1(k, k, mixer.f, mixer.alpha, mixer.beta)
        (shifted.sigmoid() * y.flatten(2) * mixer.gamma[:, None]).sum().backward()

    their_call()
    expected, x.grad = x.grad, None
    our_call()
    if not torch.allclose(x.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise SystemExit("parity failed: gradients of the time-mix differ; nothing is timed")
    return summary(B * T, *alternate(their_call, our_call, rounds))


def peak_memory(arguments: argparse.Namespace) -> dict:
    """Measure the bytes that three training steps add to a fresh process, for the original and for timemix."""
    peaks = {}
    for whose in ("original", "ours"):
        command = [sys.executable, __file__, str(arguments.original), "--peak-of", whose]
        peaks[whose] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return peaks | {"share": peaks["ours"] / peaks["original"]}


def print_peak(module, whose: str) -> None:
    """Print the bytes that three training steps add to this process."""
    their_step, our_step, _ = steps(module, SIZES[LONG], compiled=False)
    if whose == "ours":
        keep_freed_memory()
    before = resident_memory()
    for _ in range(3):
        their_step() if whose == "original" else our_step()
    print(machine.peak_memory(torch.device("cpu")) - before)


def sampling(module, sizes: dict, tokens: int, rounds: int) -> dict:
    """Time the generation of `tokens` tokens after a prompt of 32 tokens."""
    original, ours = build(module, sizes)
    ours.eval()
    utils = importlib.import_module("src.utils")
    ctx_len = sizes["ctx_len"]
    prompt = np.random.default_rng(0).integers(0, VOCAB, 32)

    def their_loop():
        x = np.pad(prompt, (0, ctx_len - len(prompt)))
        length = len(prompt)
        for _ in range(tokens):
            with torch.no_grad():
                out, _ = original(torch.tensor(x[-ctx_len:], dtype=torch.long)[None])
            position = -1 if length >= ctx_len else length - 1
            token = utils.sample_logits(out, position, temperature=1.0, min_p_pow=2.0, min_p_ratio=0.02)
            x = np.append(x, token) if length >= ctx_len else x
            if length < ctx_len:
                x[length] = token
            length += 1

    def our_loop():
        for _ in generate_tokens(ours, [prompt.tolist()], tokens, Sampler(top_a=0.02)):
            pass

    return summary(tokens, *alternate(their_loop, our_loop, rounds, warmup=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="clone of RWKV-LM at tag 0.01")
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of training steps; default: 15")
    parser.add_argument("--peak-of", choices=["original", "ours"], help="print the peak memory of a program, bytes")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.original))
    module = importlib.import_module("src.model")
    torch.manual_seed(0)
    if arguments.peak_of:
        return print_peak(module, arguments.peak_of)
    results: dict = {"torch": torch.__version__, "threads": torch.get_num_threads(), "training": {}, "sampling": {}}
    for name, sizes in SIZES.items():
        rounds = arguments.rounds * 8 if name == "cpu-small" else max(3, arguments.rounds // (sizes["ctx_len"] // 256))
        results["training"][name] = training(module, sizes, rounds)
        print(name, "training", json.dumps(results["training"][name]))
    results["time-mix"] = time_mix(module, SIZES[LONG], max(3, arguments.rounds // 2))
    print("time-mix alone at ctx_len 2048", json.dumps(results["time-mix"]))
    results["peak memory"] = peak_memory(arguments)
    print("peak memory at ctx_len 2048", json.dumps(results["peak memory"]))
    results["sampling"][SAMPLED] = sampling(module, SIZES[SAMPLED], tokens=100, rounds=3)
    print(SAMPLED, "sampling", json.dumps(results["sampling"][SAMPLED]))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
