"""Measure what the rounding of weights costs a trained model: increase of the held-out loss, and divergence.

python benchmarks/rounding.py RUN [--tokens 200000]

Every format rounds the linear weights, and all arithmetic is float32, so the result is the same on every machine.
Q4_0 is the format of ggml with 4.5 bits per weight: whole numbers from -8 to 7, and a float16 scale for each 32 inputs.
The divergence is the mean Kullback-Leibler divergence from the predictions of the model with float32 weights. The
divergence varies less than the loss between formats of similar error.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

import timemix
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import GROUP, quantized, rounded


def in_sixteen_equal_steps(weight: Tensor) -> Tensor:
    """Round as Q4_0: the number of largest magnitude in a group is -8 steps."""
    groups = weight.view(len(weight), -1, GROUP)
    step = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    # A group of zeros has step 0.
    codes = (groups / torch.where(step == 0, 1, step) + 8.5).floor().clamp(0, 15) - 8
    return (codes * step.half().float()).view_as(weight)


def q4_0(model: LanguageModel, *, head: bool) -> LanguageModel:
    """Return a copy of a model whose linear weights are rounded to Q4_0, and the head to Q4_0 or to int8."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                if module is model.head and not head:
                    integers, scale = quantized(module.weight)
                    module.weight.copy_(integers * scale[:, None])
                else:
                    module.weight.copy_(in_sixteen_equal_steps(module.weight))
    return model


@torch.no_grad()
def scores(model: LanguageModel, windows: Tensor) -> Tensor:
    """Return the log-probabilities (windows, T, V) of the model for windows (windows, T + 1) of tokens."""
    return model(windows[:, :-1])[0].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a trained model, with its data")
    parser.add_argument("--tokens", type=int, default=200_000, help="largest number of held-out tokens")
    asked = parser.parse_args()
    loaded = timemix.load(asked.run)
    model, length = loaded.model.float(), loaded.config.model.ctx_len
    held_out = loaded.corpus().valid
    count = min(asked.tokens, len(held_out) - 1) // length
    starts = torch.arange(count) * length
    windows = torch.stack([torch.from_numpy(held_out[int(s) : int(s) + length + 1].astype("int64")) for s in starts])
    models = {name: rounded(model, name) for name in ("float32", "bfloat16", "int8", "int4")}
    models |= {"Q4_0": q4_0(model, head=True), "Q4_0, head in int8": q4_0(model, head=False)}
    loss, divergence = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    for part in windows.split(16):
        exact = scores(model, part)
        for name, each in models.items():
            found = exact if name == "float32" else scores(each, part)
            loss[name] -= float(found.gather(-1, part[:, 1:, None]).sum(dtype=torch.float64))
            divergence[name] += float((exact.exp() * (exact - found)).sum(dtype=torch.float64))
    tokens = count * length
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{loaded.config.model.arch}, {parameters:,} parameters, {tokens:,} held-out tokens")
    print(f"loss with float32 weights: {loss['float32'] / tokens:.4f} nats\n")
    print("| format | increase of the loss, nats | divergence, nats |\n| --- | --- | --- |")
    for name in list(models)[1:]:
        print(f"| {name} | {(loss[name] - loss['float32']) / tokens:.5f} | {divergence[name] / tokens:.5f} |")


if __name__ == "__main__":
    main()
