"""Small models of every kind, for the tests of models, generation, the engine and evaluation."""

import dataclasses

import torch

from timemix.models.language_model import LanguageModel
from timemix.models.registry import ARCHITECTURES, model_config

CTX = 12

VARIANTS = {name: model_config(name) for name in ARCHITECTURES} | {
    "shift by 1, 2, 3": model_config("rwkv1", token_shift=(0.25, 0.0, 0.3)),
    "shift interpolated": model_config("mha_shift", token_shift=(0.5, 0.25), token_shift_top=()),
    "no tables": model_config("rwkv1", alpha=False, beta=False, gamma=False),
    "no tables, pro": model_config("mha_pro", alpha=False, beta=False, gamma=False),
    "weighted": model_config("rwkv1", denominator="weighted"),
    "weighted, original": model_config("rwkv1", denominator="weighted", initial="original"),
    "free W": model_config("rwkv1", weights="free"),
    "free W, weighted": model_config("rwkv1", weights="free", denominator="weighted"),
    "exponentials, odd": model_config("rwkv1_exp", exponentials=5, taps=2),
    "one exponential": model_config("rwkv1_exp", exponentials=1, alpha=False, beta=False, gamma=False),
    "zero, rotary": model_config("mha_rotary", initial="zero"),
    "one head": model_config("rwkv1", heads=1),
    "a head per channel": model_config("rwkv1", heads=16),
    "a head per channel, pro": model_config("mha_pro", heads=16),
    "relu2": model_config("rwkv1", activation="relu2"),
    "grouped heads": model_config("llama", kv_heads=2),
}


def build(config, dtype=torch.float64, noise=0.3, **fields):
    """Return a small model with every parameter moved away from its special initial value."""
    sizes = {"vocab_size": 11, "ctx_len": CTX, "layers": 3, "channels": 16}
    model = LanguageModel(dataclasses.replace(config, **(sizes | fields))).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=noise)
    return model


def heads_of(arch, heads):
    """Return the field `heads` for `model_config`; empty for an architecture without heads."""
    return {"heads": heads} if hasattr(ARCHITECTURES[arch].config, "heads") else {}


def step_tolerance(weights):
    """Return the largest error of a compiled step against the model with rounded weights, for numbers of size 1.

    With bfloat16 weights, processors with an instruction for bfloat16 also round the inputs of linear maps.
    """
    return 0.03 if weights == "bfloat16" else 1e-5


def assert_step_close(found, expected, weights):
    """Compare what a compiled step returns with what the model with rounded weights returns.

    Rounded inputs make one number in a thousand differ by 0.2 in a model this small, so bfloat16 compares the root
    of the mean square: at most 0.03 of that of the expected numbers. Other weights compare the largest error.
    """
    if weights == "bfloat16":
        assert (found - expected).square().mean() <= 0.03**2 * expected.square().mean()
        return
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / largest, expected / largest, atol=step_tolerance(weights), rtol=0)


def numbers_kept(blocks, x):
    """Return how many numbers the blocks keep for the backward pass from x (B, T, C), without their weights."""
    kept, carry = {}, None

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    weights = {p.data_ptr() for block in blocks for p in block.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for block in blocks:
            x, _, carry = block(x, carry=carry)
    return sum(n for pointer, n in kept.items() if pointer not in weights)


def varied(config) -> LanguageModel:
    """Return a model whose tables are all different and positive, as after training."""
    model = LanguageModel(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.rand_like(p) + 0.5 if p.ndim < 3 and ".mixer." in name else 0.3 * torch.randn_like(p))
    return model
