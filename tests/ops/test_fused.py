"""The fused training step: values and gradients agree with PyTorch's, for any shape and number of threads."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.helpers.models import VARIANTS
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples
from timemix.models.config import ShiftedConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.activations import ACTIVATIONS
from timemix.models.layers.channel_mix import ChannelMix
from timemix.models.layers.token_shift import TokenShift
from timemix.models.registry import model_config
from timemix.models.rwkv1.time_mix import fusible
from timemix.ops.common import fused
from timemix.ops.common.norms import norm_shift
from timemix.ops.rwkv1 import time_mix

pytestmark = pytest.mark.skipif(not fused.available(), reason="no C compiler on this machine")

SIZES = {"vocab_size": 13, "layers": 2, "channels": 48, "ctx_len": 300, "ffn_ratio": 1.7}


def logits_and_gradients(config, tokens, dtype=torch.float32, precision=torch.float32):
    torch.manual_seed(0)
    model = LanguageModel(dataclasses.replace(config, **SIZES))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    model.to(dtype)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        logits, _ = model(tokens)
    F.cross_entropy(logits.flatten(0, 1).to(dtype), tokens.roll(1, 1).flatten()).backward()
    # With one token, the recurrence of rwkv6 uses no decay, so the decay has no gradient.
    given = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    gradients = {name: gradient.double() for name, gradient in given.items()}
    return {"logits": logits.detach().double()} | gradients


def called(monkeypatch):
    """Record the names of the C kernels as they are called."""
    names, call = [], fused.call
    monkeypatch.setattr(fused, "call", lambda name, *arguments: names.append(name) or call(name, *arguments))
    return names


def in_torch(monkeypatch):
    monkeypatch.setattr(fused, "serves", lambda x: False)


def distances(a, exact):
    """Return relative errors of logits and of all gradients together; the exact value of one gradient may be 0."""
    logits = (a["logits"] - exact["logits"]).norm() / exact["logits"].norm()
    names = exact.keys() - {"logits"}
    off, size = ([x[n].norm() for n in names] for x in ({n: a[n] - exact[n] for n in names}, exact))
    return logits.item(), (torch.stack(off).norm() / torch.stack(size).norm()).item()


def test_fused_code_supports_training_and_long_texts_only():
    x = torch.zeros(1, 1, 4)
    assert fused.serves(x)
    assert fused.serves(x.bfloat16())
    assert not fused.serves(x.double())
    assert not fused.serves(x.half())
    with torch.autocast("cpu", torch.float16):
        assert not fused.serves(x)
    with torch.no_grad():
        assert not fused.serves(x)
        assert not fused.serves(x.expand(1, fused.ENOUGH_ROWS - 1, 4))
        assert fused.serves(x.expand(1, fused.ENOUGH_ROWS, 4))
    with fused.left_out():
        assert not fused.serves(x)
    assert fused.serves(x)


@pytest.mark.parametrize("rows", [fused.ENOUGH_ROWS - 1, fused.ENOUGH_ROWS])
def test_without_gradients_the_values_are_those_of_training(rows):
    model = LanguageModel(model_config("rwkv1", **SIZES, initial="original"))
    tokens = torch.randint(13, (1, rows))
    with torch.no_grad():
        logits, _ = model(tokens)
    torch.testing.assert_close(logits, model(tokens)[0])


WITH_MIXTURES = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
CONFIGS = VARIANTS | {name: model_config("rwkv1", activation=name) for name in ACTIVATIONS}


@pytest.mark.parametrize(("name", "shape"), pairwise(CONFIGS, [(1, 1), (3, 7), (2, 65), (1, 300)], strength=1))
def test_a_model_is_as_exact_as_in_torch(name, shape, monkeypatch):
    config = CONFIGS[name]
    tokens = torch.randint(13, shape)
    names = called(monkeypatch)
    ours = logits_and_gradients(config, tokens)
    of_2021 = isinstance(config, ShiftedConfig)
    assert ({"timemix_norm_shift", "timemix_norm_shift_back"} <= set(names)) == of_2021
    assert ("timemix_divide_back" in names) == fusible(config)
    assert ({"timemix_mixtures_back", "timemix_activate_back"} <= set(names)) == (config.arch in WITH_MIXTURES)
    assert ("timemix_gates_back" in names) == (config.arch in ("rwkv1", "rwkv1_exp", "mha_pro"))
    in_torch(monkeypatch)
    exact = logits_and_gradients(config, tokens, torch.float64)
    theirs = logits_and_gradients(config, tokens)
    # Gradients of a single token are sums of few terms, so their error varies with the token.
    least = 1e-7 if tokens.numel() > 1 else 5e-6
    for one, other in zip(distances(ours, exact), distances(theirs, exact), strict=True):
        assert one <= max(1.5 * other + 1e-7, least)


@pytest.mark.parametrize("arch", ["rwkv1", "rwkv1_exp", "mha_pro", "rwkv7"])
def test_bfloat16_products_are_as_exact_as_in_torch(arch, monkeypatch):
    tokens = torch.randint(13, (2, 129))
    config = model_config(arch)
    ours = logits_and_gradients(config, tokens, precision=torch.bfloat16)
    in_torch(monkeypatch)
    exact = logits_and_gradients(config, tokens, torch.float64)
    theirs = logits_and_gradients(config, tokens, precision=torch.bfloat16)
    for one, other in zip(distances(ours, exact), distances(theirs, exact), strict=True):
        assert 1e-4 < one <= 1.2 * other


def gradients(y, leaves):
    torch.manual_seed(5)
    return torch.autograd.grad(y, leaves, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))


def leaf(*shape, scale=1.0):
    return (torch.randn(shape) * scale).requires_grad_()


@examples(60)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    C=st.integers(1, 40),
    fractions=st.lists(st.floats(0, 0.33), max_size=3),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_norm_and_shift_of_any_size(B, T, C, fractions, scale, seed):
    torch.manual_seed(seed)
    shift = TokenShift(model_config("rwkv1", channels=C, heads=1, token_shift=tuple(fractions)), 0)
    # Nearly equal channels would leave few digits of their differences, here as in PyTorch.
    x = ((torch.randn(B, T, C) + 8 * (-1.0) ** torch.arange(C)) * scale).requires_grad_()
    weight, bias = leaf(C), leaf(C)
    y = norm_shift(x, weight, bias, 1e-5, shift.edges, torch.float32)
    wide = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    expected, _ = shift(F.layer_norm(wide[0], (C,), *wide[1:], eps=1e-5))
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(y, (x, weight, bias)), gradients(expected, wide), strict=True):
        torch.testing.assert_close(one.double(), other, atol=3e-5 * max(1, other.abs().max()), rtol=1e-4)


@examples(60)
@given(
    rows=st.integers(1, 40),
    hidden=st.integers(1, 40),
    C=st.integers(1, 20),
    name=st.sampled_from(fused.ACTIVATION_KINDS),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_gates_of_any_size(rows, hidden, C, name, scale, seed):
    torch.manual_seed(seed)
    kvr, bias = leaf(rows, 2 * hidden + C, scale=scale), leaf(2 * hidden + C)
    y = torch.cat(fused.gates(kvr, bias, C, name), 1)
    wide = [each.detach().double().requires_grad_() for each in (kvr, bias)]
    k, v, r = (wide[0] + wide[1]).split([hidden, hidden, C], 1)
    expected = torch.cat([ACTIVATIONS[name](k) * v, r.sigmoid()], 1)
    torch.testing.assert_close(y.double(), expected, atol=1e-6 * (1 + expected.abs().max().item()), rtol=1e-5)
    for one, other in zip(gradients(y, (kvr, bias)), gradients(expected, wide), strict=True):
        torch.testing.assert_close(one.double(), other, atol=3e-6 * max(1, other.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", fused.ACTIVATION_KINDS)
def test_activated(name, dtype):
    x = (torch.randn(3, 5, 7) * 4).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = fused.activated(x, name), ACTIVATIONS[name](wide)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 3e-6
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    for one, other in zip(gradients(y, [x]), gradients(expected, [wide]), strict=True):
        torch.testing.assert_close(one.double(), other, atol=3 * tolerance, rtol=3 * tolerance)


@pytest.mark.parametrize("by", ["gate", "gamma"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 33, 24)])
def test_scaled(shape, by):
    B, T, C = shape
    leaves = leaf(B, T, C), leaf(C), leaf(B, T, C) if by == "gate" else leaf(T + 2)
    wide = [each.detach().double().requires_grad_() for each in leaves]
    factor = wide[2] if by == "gate" else wide[2][:T, None]
    y, expected = fused.scaled(*leaves), (wide[0] + wide[1]) * factor
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(gradients(y, leaves), gradients(expected, wide), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_channel_mix_takes_rows_of_any_shape():
    half = ChannelMix(model_config("rwkv1", **SIZES))
    x = torch.randn(2, 3, 48)
    torch.testing.assert_close(half(x.flatten(0, 1)), half(x).flatten(0, 1))
    with pytest.raises(ValueError, match="by has 2 factors for 3 positions"):
        fused.scaled(x, torch.zeros(48), torch.ones(2))


def test_gradients_of_one_output_alone():
    kvr, bias = leaf(2, 5, 12), leaf(12)
    for i, parts in enumerate([slice(0, 8), slice(0, 4), slice(8, 12)]):
        (gradient,) = torch.autograd.grad(time_mix.weigh(kvr, bias, None, 2)[i].sum(), kvr)
        used = torch.zeros(12, dtype=torch.bool)
        used[parts] = True
        assert torch.equal(gradient.abs().sum((0, 1)) > 0, used)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", ["mixer.key", "mixer.value", "mixer.receptance", "ffn.key", "ffn.receptance"])
def test_what_is_not_a_number_stays_so(weight, precision):
    """A diverging run must give a non-finite loss, although keys are clamped and sigmoids are bounded."""
    model = LanguageModel(model_config("rwkv1", **SIZES, initial="original"))
    with torch.no_grad():
        model.get_submodule(f"blocks.0.{weight}").weight.fill_(torch.nan)
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        logits, _ = model(torch.randint(13, (2, 9)))
    assert logits.isnan().any()


def test_bits_do_not_depend_on_the_threads():
    tokens = torch.randint(13, (3, 130))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fused_parts(tokens)
        for more in (2, 3, 10):
            torch.set_num_threads(more)
            assert all(torch.equal(a, b) for a, b in zip(one, fused_parts(tokens), strict=True))
    finally:
        torch.set_num_threads(threads)


def fused_parts(tokens):
    torch.manual_seed(0)
    B, T, C, heads = *tokens.shape, 48, 4
    x, weight, bias, kvr, kvr_bias = leaf(B, T, C), leaf(C), leaf(C), leaf(B, T, 3 * C), leaf(3 * C)
    alpha, beta, gamma = leaf(heads, T), leaf(heads, T), leaf(T)
    normed = norm_shift(x, weight, bias, 1e-5, (0, 20, 30), torch.float32)
    source, total, gate = time_mix.weigh(kvr, kvr_bias, alpha, heads)
    y = time_mix.divide(source, total, gate, beta).flatten(2) + normed
    hidden, gate = fused.gates(kvr, kvr_bias, C, "mish")
    y = fused.scaled(y, bias, gamma) + fused.scaled(hidden, bias, gate)
    return [y, *gradients(y, (x, weight, bias, kvr, kvr_bias, alpha, beta, gamma))]


def test_without_a_compiler_torch_does_it(monkeypatch):
    config, tokens = model_config("rwkv1"), torch.randint(13, (2, 20))
    ours = logits_and_gradients(config, tokens)
    monkeypatch.setattr(fused, "_library", lambda: (None, "no C compiler was found"))
    theirs = logits_and_gradients(config, tokens)
    assert max(distances(ours, theirs)) < 1e-5
