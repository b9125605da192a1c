"""wkv7: the loop against the formula, the chunks against the loop in outputs, states and all gradients, hard values."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.helpers.operators import (
    check_a_reset_forgets_a_nan,
    check_an_empty_batch_is_empty,
    check_lengths_are_clamped,
    stores_states,
)
from tests.helpers.tiers import examples, slow
from timemix.ops import common
from timemix.ops.rwkv7 import BACKENDS, choose_backend, compiled, library, wkv7

ON_THE_CPU = [name for name in BACKENDS if name != "fla"]
NAMES = ("r", "w", "k", "v", "a", "b", "state")
BOUND = -0.6065306597
"""Lowest log-decay of RWKV-7: -exp(-1/2)."""


def inputs(B, T, H, N, dtype=torch.float64, *, decay=None, direction=None, rate=None, key=None):
    """Draw the arguments of a layer of RWKV-7; a keyword replaces the random value."""
    r, k, v, kk, rates = (torch.randn(B, T, H, N, dtype=torch.float64) for _ in range(5))
    kk = F.normalize(kk if direction is None else kk * 1e-3 + direction, dim=-1)
    rates = torch.sigmoid(rates) if rate is None else torch.full_like(rates, rate)
    w = BOUND * torch.sigmoid(3 * torch.randn(B, T, H, N, dtype=torch.float64))
    w = w if decay is None else torch.full_like(w, decay)
    k = k if key is None else torch.full_like(k, key)
    state = torch.randn(B, H, N, N, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (r, w, k, v, -kk, kk * rates, state)]


def dtype_of(backend):
    return torch.float32 if backend == "c" else torch.float64


def results(arguments, backend, **options):
    """Return y, the last state and the gradients of all arguments, in float64."""
    arguments = [x.detach().clone().requires_grad_() for x in arguments]
    y, end = wkv7(*arguments, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, end)]
    ((y * weights[0]).sum() + (end * weights[1]).sum()).backward()
    return dict(zip(("y", "end", *NAMES), [y.detach(), end.detach(), *(x.grad for x in arguments)], strict=True))


def error(got, expected):
    """Return the largest difference relative to the largest expected value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def formula(r, w, k, v, a, b, state):
    """Return y and the state by the matrix form S (diag(e^w) + a b^T) + v k^T of one row and head, in numpy."""
    S, y = state, []
    for t in range(len(r)):
        S = S @ (np.diag(np.exp(w[t])) + np.outer(a[t], b[t])) + np.outer(v[t], k[t])
        y.append(S @ r[t])
    return np.stack(y), S


def test_the_loop_is_the_formula():
    arguments = inputs(2, 7, 3, 4)
    y, end = wkv7(*arguments, backend="reference")
    for row in range(2):
        for head in range(3):
            parts = [x.detach().numpy()[row, :, head] for x in arguments[:6]]
            expected_y, expected_end = formula(*parts, arguments[6].detach().numpy()[row, head])
            np.testing.assert_allclose(y[row, :, head].detach(), expected_y, atol=1e-13)
            np.testing.assert_allclose(end[row, head].detach(), expected_end, atol=1e-13)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 65, slow(513)])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_chunks_equal_the_loop(T, resets, lengths):
    torch.manual_seed(T)
    arguments = inputs(2, T, 2, 8)
    options = {
        "resets": torch.rand(2, T) < 0.1 if resets else None,
        "lengths": torch.tensor([T, max(1, T // 2)]) if lengths else None,
    }
    chunked, loop = (results(arguments, backend, **options) for backend in ("chunked", "reference"))
    for name, value in loop.items():
        assert error(chunked[name], value) < 1e-12, name


def assert_accurate(got, expected):
    for name, value in expected.items():
        # The gradient of w is a difference of sums over all later tokens.
        limit = 2e-6 if name in ("y", "end") else 1e-4 if name == "w" else 1e-5
        assert error(got[name], value) < limit, name


@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 65, slow(513)])
@pytest.mark.parametrize("N", [5, 32, 64])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_the_c_code_equals_the_loop(T, N, resets, lengths):
    torch.manual_seed(T)
    arguments = inputs(2, T, 2, N)
    options = {
        # A reset at the start of a chunk and at its second token.
        "resets": (torch.rand(2, T) < 0.1) | (torch.arange(T) % 16 < 2) if resets else None,
        "lengths": torch.tensor([T, max(1, T // 2)]) if lengths else None,
    }
    assert_accurate(results([x.float() for x in arguments], "c", **options), results(arguments, "reference", **options))


@pytest.mark.parametrize("changed", [{}, {"transposed": True}])
def test_the_c_code_is_bit_identical_for_any_threads_and_strides(changed):
    arguments = [x.float() for x in inputs(3, 40, 5, 64)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            given = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments] if changed else arguments
            found.append(results(given, "c"))
    finally:
        torch.set_num_threads(before)
    for name, value in results(arguments, "c").items():
        assert torch.equal(found[0][name], value), name
        assert torch.equal(found[1][name], value), name


HARD = {
    "decays at the bound": {"decay": BOUND},
    "decays near 1": {"decay": -1e-6},
    "directions all alike": {"direction": 1.0, "rate": 0.999, "decay": -1e-4},
    "rates near 0": {"rate": 1e-6},
    "rates near 1": {"rate": 1 - 1e-6},
    "keys of zero": {"key": 0.0},
}


@pytest.mark.parametrize("T", [65, slow(513)])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("backend", ["chunked", "c"])
def test_hard_values_in_float32(backend, kind, T):
    torch.manual_seed(3)
    arguments = inputs(1, T, 2, 64, **HARD[kind])
    expected = results(arguments, "reference")
    assert_accurate(results([x.float() for x in arguments], backend), expected)


def test_strong_decays_stay_finite():
    arguments = inputs(1, 130, 1, 8, decay=-2.5)
    expected = results(arguments, "reference")
    for name, value in results([x.float() for x in arguments], "chunked").items():
        assert error(value, expected[name]) < 1e-4, name


@pytest.mark.parametrize("backend", ON_THE_CPU)
@given(cut=st.integers(1, 19), data=st.data())
@examples(40)
def test_a_text_in_two_parts_is_the_whole(backend, cut, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    arguments = inputs(2, 20, 1, 3, dtype_of(backend))
    resets = torch.rand(2, 20) < 0.1
    y, end = wkv7(*arguments, resets=resets, backend=backend)
    parts, state = [], arguments[6]
    for part in (slice(0, cut), slice(cut, 20)):
        piece, state = wkv7(*(x[:, part] for x in arguments[:6]), state, resets=resets[:, part], backend=backend)
        parts.append(piece)
    # The C code computes token by token, so parts are bit-identical.
    atol = 0 if backend == "c" else 1e-12
    torch.testing.assert_close(torch.cat(parts, 1), y, atol=atol, rtol=0)
    torch.testing.assert_close(state, end, atol=atol, rtol=0)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_padding_changes_nothing_and_gets_no_gradient(backend):
    arguments = inputs(2, 9, 1, 4, dtype_of(backend))
    broken = [x.detach().clone() for x in arguments]
    for x in broken[:6]:
        x[1, 5:] = torch.nan
    lengths = torch.tensor([9, 5])
    clean = results(arguments, backend, lengths=lengths)
    for name, value in results(broken, backend, lengths=lengths).items():
        assert torch.equal(value.nan_to_num(7), clean[name]), name
    assert not clean["y"][1, 5:].any()


@pytest.mark.parametrize("backend", ["reference", "c"])
def test_a_reset_forgets_a_nan(backend):
    """In chunks, it does not: 0 * NaN is NaN."""
    check_a_reset_forgets_a_nan(wkv7, inputs(1, 80, 1, 4, dtype_of(backend)), range(6), backend)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_an_empty_batch_is_empty(backend):
    arguments = inputs(0, 70, 2, 4, dtype_of(backend))
    check_an_empty_batch_is_empty(results(arguments, backend), NAMES, arguments)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_lengths_outside_the_text_are_clamped(backend):
    check_lengths_are_clamped(results, inputs(3, 9, 1, 4, dtype_of(backend)), backend)


def test_a_reset_forgets_all_earlier_tokens():
    arguments = inputs(1, 80, 1, 4)
    resets = torch.zeros(1, 80, dtype=torch.bool)
    resets[0, 37] = True
    y, end = wkv7(*arguments, resets=resets)
    later, later_end = wkv7(*(x[:, 37:] for x in arguments[:6]), torch.zeros_like(arguments[6]))
    torch.testing.assert_close(y[:, 37:], later, atol=1e-12, rtol=0)
    torch.testing.assert_close(end, later_end, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_gradient_is_the_numerical_one(backend):
    arguments = inputs(1, 6, 1, 2)
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, backend=backend), arguments)


def test_a_state_is_returned_on_request_and_never_changed():
    for backend in ON_THE_CPU:
        *arguments, state = inputs(1, 5, 1, 2, dtype_of(backend))
        assert wkv7(*arguments, backend=backend)[1] is None
        before = state.detach().clone()
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                wkv7(*arguments, state, backend=backend)
            assert torch.equal(state, before)


def test_bfloat16_inputs_are_computed_in_float32():
    arguments = [x.detach().bfloat16() for x in inputs(1, 70, 1, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, end = wkv7(*arguments)
    expected, _ = wkv7(*(x.double() for x in arguments))
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert error(y, expected) < 2**-8


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("k", (1, 5, 1, 3), r"k has shape \(1, 5, 1, 3\); .* it must be \(1, 5, 1, 2\)"),
        ("state", (1, 1, 2, 3), r"state has shape .* it must be \(1, 1, 2, 2\)"),
        ("lengths", (2,), r"lengths has shape .* it must be \(1,\)"),
        ("resets", (1, 4), r"resets has shape .* it must be \(1, 5\)"),
        ("r", (1, 0, 1, 2), r"r has shape .* it must be \(batch, time >= 1, heads, head size\)"),
    ],
)
def test_wrong_shapes_are_refused(name, shape, words):
    arguments = dict(zip(NAMES, inputs(1, 5, 1, 2), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=words):
        wkv7(**arguments)


def test_resets_of_another_type_are_refused():
    with pytest.raises(ValueError, match="resets is torch.int64; it must be torch.bool"):
        wkv7(**dict(zip(NAMES, inputs(1, 5, 1, 2), strict=True)), resets=torch.zeros(1, 5, dtype=torch.int64))


def test_the_choice_of_the_backend():
    short, long = torch.zeros(1, 1, 1, 8, dtype=torch.float64), torch.zeros(1, 100, 1, 8, dtype=torch.float64)
    assert choose_backend("auto", short)[0] == "reference"
    assert choose_backend("auto", long)[0] == "chunked"
    assert choose_backend("auto", long.float())[0] == choose_backend("auto", short.float())[0] == "c"
    assert choose_backend("auto", torch.zeros(1, 100, 1, 257))[0] == "chunked"
    with pytest.raises(ValueError, match="backend='fast' is not supported; choose auto, reference, chunked, c"):
        choose_backend("fast", short)
    with pytest.raises(ValueError, match=r"backend='c' is not available: .* needs float32 on the cpu, not float64"):
        choose_backend("c", long)


def test_without_a_compiler_the_chunks_compute(monkeypatch):
    monkeypatch.setattr(compiled.KERNELS, "library", lambda: (None, "no C compiler was found"))
    x = torch.zeros(1, 100, 1, 8)
    assert choose_backend("auto", x)[0] == "chunked"
    with pytest.raises(ValueError, match="backend='c' is not available: no C compiler was found; choose auto"):
        choose_backend("c", x)


def fla_by_chunks(error=0.0):
    """Return a function with the arguments and layouts of `fla.ops.rwkv7.chunk_rwkv7`, which "chunked" computes."""

    def chunk_rwkv7(r, w, k, v, a, b, *, initial_state, output_final_state, lower_bound):
        assert {x.dtype for x in (r, k, v, a, b)} == {torch.bfloat16}
        assert output_final_state
        assert w.min() >= lower_bound
        given = [x.float() for x in (r, w, k, v, a, b)]
        y, end = wkv7(*given, initial_state.mT, backend="chunked")
        return y.to(torch.bfloat16) * (1 + error), end.mT

    return chunk_rwkv7


@pytest.fixture
def install_fla(monkeypatch):
    """Return a function that puts a stub of the package flash-linear-attention in place, for tensors on the CPU."""

    def install(chunk_rwkv7):
        module = types.ModuleType("fla.ops.rwkv7")
        module.chunk_rwkv7 = chunk_rwkv7
        for name in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", module)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(common.library, "DEVICES", ("cpu",))

    library._difference.cache_clear()
    yield install
    library._difference.cache_clear()


def test_fla_equals_the_loop_up_to_the_rounding_of_bfloat16(install_fla):
    install_fla(fla_by_chunks())
    torch.manual_seed(0)
    arguments = inputs(2, 37, 2, 8)
    options = {"lengths": torch.tensor([37, 20])}
    found = results([x.float() for x in arguments], "fla", **options)
    for name, value in results(arguments, "reference", **options).items():
        assert error(found[name], value) < 0.02, name
    assert "fla" not in choose_backend("auto", arguments[0].float())


def test_autocast_chooses_fla(install_fla, monkeypatch):
    install_fla(fla_by_chunks())
    monkeypatch.setattr(compiled.KERNELS, "library", lambda: (None, "no C compiler was found"))
    x, resets = torch.zeros(1, 100, 1, 8), torch.zeros(1, 100, dtype=torch.bool)
    assert choose_backend("auto", x)[0] == "chunked"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose_backend("auto", x)[0] == "fla"
        assert choose_backend("auto", x, resets)[0] == "chunked"
        assert choose_backend("auto", x[:, :1])[0] == "reference"
        assert wkv7(*[x] * 6)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="backend='fla' is not available: .* supports neither float64 nor resets"):
        wkv7(*[x] * 6, resets=resets, backend="fla")


def failing(*_, **__):
    raise RuntimeError("no kernel\nfor this device")


@pytest.mark.parametrize(
    ("chunk_rwkv7", "words"),
    [
        (fla_by_chunks(error=0.05), r"results of the package flash-linear-attention differ by 5\.\de-02 from"),
        (failing, "the package flash-linear-attention fails: no kernel;"),
    ],
)
def test_wrong_kernels_of_fla_are_not_used(install_fla, chunk_rwkv7, words):
    install_fla(chunk_rwkv7)
    x = torch.zeros(1, 100, 1, 8)
    with pytest.raises(ValueError, match=f"backend='fla' is not available: {words}"):
        choose_backend("fla", x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose_backend("auto", x)[0] == "c"


def test_fla_needs_cuda():
    with pytest.raises(ValueError, match="backend='fla' is not available: .* needs cuda, not cpu; choose auto"):
        choose_backend("fla", torch.zeros(1, 100, 1, 8))


def test_kernels_whose_gradients_are_not_a_number_are_not_used():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, r, state):
            return r.clone(), state.clone()

        @staticmethod
        def backward(ctx, y, end):
            return y * torch.nan, end

    def right(r, state, resets):
        return r.clone(), state.clone()

    given = [torch.rand(1, 4, 1, 2), torch.rand(1, 1, 2, 2)]
    weights = [torch.rand_like(x) for x in given]
    assert common.library.difference(right, right, given, weights) is None
    broken = common.library.difference(lambda r, state, resets: Broken.apply(r, state), right, given, weights)
    assert "differ by nan" in broken


@pytest.mark.parametrize("is_training", [True, False])
def test_states_are_stored_only_for_a_backward_pass(monkeypatch, is_training):
    arguments = dict(zip(NAMES, inputs(1, 40, 1, 4), strict=True))
    assert stores_states(monkeypatch, compiled.KERNELS, wkv7, arguments, is_training) == is_training
