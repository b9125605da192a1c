"""The time-mix of RWKV-7 in C: results and gradients equal the formulas in PyTorch, for any shape and value."""

import platform
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.helpers.tiers import examples, slow
from timemix.ops.rwkv7 import compiled, wkv7
from timemix.ops.rwkv7.time_mix import Products, Vectors, time_mix

pytestmark = pytest.mark.skipif(not compiled.KERNELS.compiles(), reason="no C compiler on this machine")

EPS = 64e-5
NAMES = (*Products._fields, *(f"vector {name}" for name in Vectors._fields), "first", "state")


def formula(products, vectors, first, state, eps, resets=None):
    """Compute `time_mix` in PyTorch, by the formulas of the paper."""
    H, N = state.shape[1:3]

    def heads(x):
        return x.view(*x.shape[:-1], H, N)

    k, v = products.key, products.value
    if first is not None:
        v = v + (first - v) * torch.sigmoid(products.residual + vectors.residual)
    w = -0.6065306597126334 * torch.sigmoid(products.decay + vectors.decay)
    a = torch.sigmoid(products.rate + vectors.rate)
    kk = F.normalize(heads(k * vectors.removal), dim=-1, eps=1e-12)
    k = k * (1 + (a - 1) * vectors.replacement)
    r, w, k, v, a = map(heads, (products.receptance, w, k, v, a))
    y, end = wkv7(r, w, k, v, -kk, kk * a, state, resets=resets, backend="reference")
    y = F.layer_norm(y, (N,), eps=eps) * heads(vectors.norm_weight) + heads(vectors.norm_bias)
    y = y + (r * k * heads(vectors.bonus)).sum(-1, keepdim=True) * v
    return y.flatten(2) * products.gate, end


def arguments(B, T, H, N, *, layer=1, seed=0, **values):
    """Draw the arguments by name. A keyword sets an argument to a number or, if it is a string, scales the argument."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict.fromkeys(Products._fields, (B, T, H * N)) | {"first": (B, T, H * N), "state": (B, H, N, N)}
    drawn = {name: torch.randn(shapes.get(name, (H * N,)), generator=generator) for name in NAMES}
    for name, value in values.items():
        drawn[name] = drawn[name] * float(value) if isinstance(value, str) else torch.full_like(drawn[name], value)
    if not layer:
        drawn |= dict.fromkeys(("residual", "vector residual", "first"))
    return drawn


def results(function, given_arguments, dtype=torch.float32, products=None):
    """Return y, the next state and all gradients, in float64. `products` is the dtype of the products."""
    dtypes = dict.fromkeys(NAMES, dtype) | dict.fromkeys(Products._fields, products or dtype)
    leaves = {
        name: None if x is None else x.detach().clone().to(dtypes[name]).requires_grad_()
        for name, x in given_arguments.items()
    }
    *tensors, first, state = (leaves[name] for name in NAMES)
    y, end = function(Products(*tensors[:7]), Vectors(*tensors[7:]), first, state, EPS)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (y, end)]
    ((y * weights[0]).sum() + (end * weights[1]).sum()).backward()
    gradients = {name: x.grad.double() for name, x in leaves.items() if x is not None}
    return {"y": y.detach().double(), "end": end.detach().double()} | gradients


def assert_close(found, expected, limit):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Some gradients are 0 in exact arithmetic, as those of a direction in a head of one channel.
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=0.1)
        assert error < limit, (name, float(error))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("N", [1, 5, 16, 32, 64, slow(80), slow(128), slow(256)])
@pytest.mark.parametrize("T", [1, 16, 35])
def test_values_and_gradients_of_any_size(T, N, layer):
    given_arguments = arguments(2, T, 3, N, layer=layer)
    assert_close(results(time_mix, given_arguments), results(formula, given_arguments, torch.float64), 2e-5)


HARD = {
    "directions of length 0": {"vector removal": 0.0},
    "directions shorter than 1e-12": {"vector removal": 1e-14},
    "keys of zero": {"key": 0.0},
    "equal values in a head": {"value": 0.0, "first": 0.0, "state": 0.0},
    "arguments of sigmoids above 1,000": dict.fromkeys(("decay", "rate", "residual"), "1e3"),
    "large products": dict.fromkeys(("receptance", "key", "value", "gate"), "100"),
    "decays near 1": {"decay": -13.0, "vector decay": 0.0},
    "decays at the bound": {"decay": 50.0},
}


@pytest.mark.parametrize("T", [3, slow(200)])
@pytest.mark.parametrize("kind", HARD)
def test_hard_values(kind, T):
    given_arguments = arguments(1, T, 2, 64, **HARD[kind])
    expected = results(formula, given_arguments, torch.float64)
    assert_close(results(time_mix, given_arguments), expected, 2e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_bfloat16_products_are_rounded_once(layer):
    """Only reading and writing products rounds: the results are those of the same numbers in float32, rounded."""
    given_arguments = arguments(2, 40, 2, 32, layer=layer)
    for name in Products._fields:
        given_arguments[name] = None if given_arguments[name] is None else given_arguments[name].bfloat16().float()
    found = results(time_mix, given_arguments, products=torch.bfloat16)
    expected = results(formula, given_arguments, torch.float64)
    # The gradient of y is rounded to bfloat16 too.
    assert_close(found, expected, 2**-7)


FLAGS = ["-mno-avx512f", "-mno-avx2"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("N", [5, 64])
def test_other_processors(monkeypatch, flag, N):
    monkeypatch.setattr(compiled.KERNELS, "flags", (*compiled.FLAGS, flag))
    given_arguments = arguments(1, 20, 2, N)
    assert_close(results(time_mix, given_arguments), results(formula, given_arguments, torch.float64), 2e-5)


def test_bits_do_not_depend_on_the_threads():
    given_arguments, before, found = arguments(3, 20, 3, 16), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 20):
            torch.set_num_threads(threads)
            found.append(results(time_mix, given_arguments))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@examples(40)
@given(cut=st.integers(1, 39), N=st.sampled_from([3, 32]), seed=st.integers(0, 99))
def test_a_text_in_two_parts_is_bit_identical(cut, N, seed):
    drawn = arguments(2, 40, 1, N, seed=seed)
    *tensors, first, state = (drawn[name] for name in NAMES)
    products, vectors = Products(*tensors[:7]), Vectors(*tensors[7:])
    before = state.clone()
    y, end = time_mix(products, vectors, first, state, EPS)
    assert torch.equal(state, before)
    parts = []
    for part in (slice(0, cut), slice(cut, 40)):
        piece, state = time_mix(Products(*(x[:, part] for x in products)), vectors, first[:, part], state, EPS)
        parts.append(piece)
    assert torch.equal(torch.cat(parts, 1), y)
    assert torch.equal(state, end)


@pytest.mark.parametrize("T", [1, 35])
def test_resets_give_the_values_and_gradients_of_the_formula(T):
    resets = torch.rand(2, T, generator=torch.Generator().manual_seed(3)) < 0.3
    resets[0, 0] = resets[1, -1] = True
    drawn = arguments(2, T, 3, 16)
    found = results(partial(time_mix, resets=resets), drawn)
    assert_close(found, results(partial(formula, resets=resets), drawn, torch.float64), 2e-5)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("state", (3, 3, 16, 16), r"state has shape .* it must be \(2, 3, 16, 16\)"),
        ("state", (2, 3, 16, 8), r"state has shape"),
        ("first", (2, 34, 48), r"first has shape .* it must be \(2, 35, 48\)"),
        ("resets", (2, 34), r"resets has shape .* it must be \(2, 35\)"),
    ],
)
def test_arguments_of_another_shape_are_refused(name, shape, message):
    drawn = arguments(2, 35, 3, 16)
    *tensors, first, state = (drawn[each] for each in NAMES)
    given_arguments = {"first": first, "state": state, "resets": None}
    given_arguments[name] = torch.zeros(shape, dtype=torch.bool if name == "resets" else torch.float32)
    with pytest.raises(ValueError, match=message):
        time_mix(Products(*tensors[:7]), Vectors(*tensors[7:]), eps=EPS, **given_arguments)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_number_stays_so(name):
    """A diverging run must give a non-finite loss, although sigmoids are bounded."""
    drawn = arguments(1, 4, 1, 5, **{name: torch.nan})
    *tensors, first, state = (drawn[each] for each in NAMES)
    y, _ = time_mix(Products(*tensors[:7]), Vectors(*tensors[7:]), first, state, EPS)
    assert y.isnan().any()
