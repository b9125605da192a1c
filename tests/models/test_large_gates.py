"""Compiled steps with gates, rates, residuals and decays of 200 and -200: finite, and equal to the model."""

import pytest
import torch

from tests.helpers.models import assert_step_close, build
from timemix.generation.decode import build_step
from timemix.models.registry import model_config

LARGE = 200.0

MAPS = {
    "rwkv1": ("mixer.receptance", "ffn.receptance"),
    "rwkv1_exp": ("mixer.receptance", "ffn.receptance"),
    "rwkv4": ("mixer.receptance", "ffn.receptance"),
    "rwkv5": ("mixer.gate", "ffn.receptance"),
    "rwkv6": ("mixer.gate", "ffn.receptance"),
    "rwkv7": ("mixer.gate",),
}
"""The linear maps whose outputs are the arguments of a sigmoid or silu."""


def small_model(arch, **fields):
    sizes = {"vocab_size": 19, "layers": 2, "channels": 32, "ctx_len": 16} | fields
    return build(model_config(arch), torch.float32, 0.1, **sizes)


def signs(n):
    """Return n numbers, 1 and -1 in turn."""
    return 1 - 2.0 * (torch.arange(n) % 2)


def set_outputs(model, names):
    """Let each output of some linear maps be 200 or -200, up to token-shift: the first input of each map is 1."""
    for block in model.blocks:
        for norm in (block.mixer_norm, block.ffn_norm):
            norm.weight[0], norm.bias[0] = 0, 1
        for name in names:
            module = block.get_submodule(name)
            # A low-rank map has its activation after the first of its two matrices (inputs, outputs).
            weight = module.down_weight.t() if hasattr(module, "down_weight") else module.weight
            weight.zero_()
            weight[:, 0] = LARGE * signs(len(weight))
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()


def check_step(model):
    tokens, counts = torch.randint(19, (13,)), torch.tensor([12])
    with torch.no_grad():
        expected, after = model(tokens[None], model.init_state(1))
    step, slot = build_step(model, backend="compiled"), torch.tensor([0])
    found, state = step(tokens[:12], model.init_state(1), slot, counts, torch.arange(12))
    last, state = step(tokens[12:], state, slot)
    found = torch.cat((found, last))
    assert found.isfinite().all()
    assert_step_close(found, expected[0], "float32")
    for own, theirs in zip(state.layers, after.layers, strict=True):
        for name in own:
            assert_step_close(own[name], theirs[name], "float32")


@pytest.mark.parametrize("arch", MAPS)
def test_gates(arch):
    model = small_model(arch)
    with torch.no_grad():
        set_outputs(model, MAPS[arch])
    check_step(model)


@pytest.mark.parametrize("name", ["decay", "rate", "residual"])
def test_decays_rates_and_residuals_of_rwkv7(name):
    model = small_model("rwkv7")
    with torch.no_grad():
        for block in model.blocks:
            if (low_rank := getattr(block.mixer, name)) is not None:
                low_rank.bias.copy_(LARGE * signs(32))
    check_step(model)


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5", "rwkv6"])
def test_decays(arch):
    """The log-decay -exp(decay) is 0 or minus infinity in float32."""
    model = small_model(arch)
    with torch.no_grad():
        for block in model.blocks:
            decay = block.mixer.decay if arch != "rwkv6" else block.mixer.decay.bias
            decay.copy_(LARGE * signs(decay.numel()).view_as(decay))
    check_step(model)


@pytest.mark.parametrize("activation", ["gelu", "mish", "relu2", "silu"])
def test_activations_of_rwkv1(activation):
    model = small_model("rwkv1", activation=activation)
    with torch.no_grad():
        set_outputs(model, ("ffn.key",))
    check_step(model)


def test_silu_of_llama():
    """Inputs of silu up to several hundred, of both signs."""
    model = small_model("llama", layers=1)
    with torch.no_grad():
        model.blocks[0].ffn.gate.weight.mul_(1000)
    check_step(model)
