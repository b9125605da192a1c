"""wkv6: the loop against the formula, chunks and C against the loop in outputs, states and gradients, hard values."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.operators import (
    check_a_reset_forgets_a_nan,
    check_an_empty_batch_is_empty,
    check_lengths_are_clamped,
    stores_states,
)
from tests.helpers.tiers import examples, slow
from timemix.ops import common
from timemix.ops.rwkv6 import BACKENDS, choose_backend, compiled, library, wkv6

ON_THE_CPU = [name for name in BACKENDS if name != "fla"]
NAMES = ("r", "w", "k", "v", "u", "state")


def inputs(B, T, H, N, dtype=torch.float64, *, fixed=False, decay=None, bonus=1.0, key=1.0):
    """Draw arguments whose log-decays range from -400 to almost 0; `fixed` draws w of shape (H, N), as in RWKV-5."""
    r, k, v = (torch.randn(B, T, H, N, dtype=torch.float64) for _ in range(3))
    w = -torch.exp(2.5 * torch.randn(*((H, N) if fixed else (B, T, H, N)), dtype=torch.float64) - 1).clamp(max=400)
    w = w if decay is None else torch.full_like(w, decay)
    u = bonus * torch.randn(H, N, dtype=torch.float64)
    state = torch.randn(B, H, N, N, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (r, w, k * key, v, u, state)]


def dtype_of(backend):
    return torch.float32 if backend == "c" else torch.float64


def results(arguments, backend, **options):
    """Return y, the last state and the gradients of all arguments."""
    arguments = [x.detach().clone().requires_grad_() for x in arguments]
    y, end = wkv6(*arguments, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, end)]
    ((y * weights[0]).sum() + (end * weights[1]).sum()).backward()
    return dict(zip(("y", "end", *NAMES), [y.detach(), end.detach(), *(x.grad for x in arguments)], strict=True))


def error(got, expected):
    """Return the largest difference relative to the largest expected value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def formula(r, w, k, v, u, state):
    """Return y and the state by the matrix form (S + diag(u) k v^T)^T r of one row and head, in numpy."""
    S, y = state, []
    for t in range(len(r)):
        y.append((S + np.diag(u) @ np.outer(k[t], v[t])).T @ r[t])
        S = np.diag(np.exp(w[t])) @ S + np.outer(k[t], v[t])
    return np.stack(y), S


@pytest.mark.parametrize("fixed", [False, True])
def test_the_loop_is_the_formula(fixed):
    arguments = inputs(2, 7, 3, 4, fixed=fixed)
    y, end = wkv6(*arguments, backend="reference")
    r, w, k, v, u, state = (x.detach().numpy() for x in arguments)
    w = np.broadcast_to(w, r.shape)
    for row in range(2):
        for head in range(3):
            parts = [x[row, :, head] for x in (r, w, k, v)]
            expected_y, expected_end = formula(*parts, u[head], state[row, head])
            np.testing.assert_allclose(y[row, :, head].detach(), expected_y, atol=1e-13)
            np.testing.assert_allclose(end[row, head].detach(), expected_end, atol=1e-13)


def options_of(T, resets, lengths):
    return {
        # A reset at the start of a chunk and at its second token.
        "resets": (torch.rand(2, T) < 0.1) | (torch.arange(T) % 16 < 2) if resets else None,
        "lengths": torch.tensor([T, max(1, T // 2)]) if lengths else None,
    }


@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 65, slow(513)])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_chunks_equal_the_loop(T, fixed, resets, lengths):
    torch.manual_seed(T)
    arguments = inputs(2, T, 2, 8, fixed=fixed)
    options = options_of(T, resets, lengths)
    chunked, loop = (results(arguments, backend, **options) for backend in ("chunked", "reference"))
    for name, value in loop.items():
        assert error(chunked[name], value) < 1e-12, name


def assert_accurate(got, expected):
    for name, value in expected.items():
        # The gradient of w is a product of two sums over many tokens.
        limit = 2e-6 if name in ("y", "end") else 1e-4 if name == "w" else 1e-5
        assert error(got[name], value) < limit, name


@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, slow(513)])
@pytest.mark.parametrize("N", [5, 8, 16, 24, 64])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_c_code_equals_the_loop(T, N, fixed, masked):
    torch.manual_seed(T)
    arguments = inputs(2, T, 2, N, fixed=fixed)
    options = options_of(T, masked, masked)
    assert_accurate(results([x.float() for x in arguments], "c", **options), results(arguments, "reference", **options))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_c_code_is_bit_identical_for_any_threads_and_strides(fixed, transposed):
    arguments = [x.float() for x in inputs(3, 40, 5, 64, fixed=fixed)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            given = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments] if transposed else arguments
            found.append(results(given, "c"))
    finally:
        torch.set_num_threads(before)
    for name, value in results(arguments, "c").items():
        assert torch.equal(found[0][name], value), name
        assert torch.equal(found[1][name], value), name


HARD = {
    "decays that underflow": {"decay": -400.0},
    "decays near 1": {"decay": -1e-6},
    "decays of 1": {"decay": 0.0},
    "small decays": {"decay": -12.0},
    "decays around the change of the form": {"decay": -0.6931},
    "a large bonus": {"bonus": 1e4},
    "large keys": {"key": 1e4},
    "small keys": {"key": 1e-6},
    "keys of zero": {"key": 0.0},
}


@pytest.mark.parametrize("T", [65, slow(513)])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "c"])
def test_hard_values_in_float32(backend, fixed, kind, T):
    torch.manual_seed(3)
    arguments = inputs(1, T, 2, 64, fixed=fixed, **HARD[kind])
    assert_accurate(results([x.float() for x in arguments], backend), results(arguments, "reference"))


@pytest.mark.parametrize("backend", ["chunked", "c"])
def test_a_small_decay_keeps_its_digits(backend):
    arguments = inputs(1, 1, 1, 8, torch.float32, decay=-15.0, key=0.0)
    r, w, k, v, u, state = (x.detach() for x in arguments)
    _, end = wkv6(r, w, k, v, u, state, backend=backend)
    assert error(end, state.double() * np.exp(-15.0)) < 1e-6


@pytest.mark.parametrize("backend", ON_THE_CPU)
@given(cut=st.integers(1, 19), data=st.data())
@examples(40)
def test_a_text_in_two_parts_is_the_whole(backend, cut, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    r, w, k, v, u, start = inputs(2, 20, 1, 3, dtype_of(backend))
    resets = torch.rand(2, 20) < 0.1
    y, end = wkv6(r, w, k, v, u, start, resets=resets, backend=backend)
    parts, state = [], start
    for part in (slice(0, cut), slice(cut, 20)):
        tokens = [x[:, part] for x in (r, w, k, v)]
        piece, state = wkv6(*tokens, u, state, resets=resets[:, part], backend=backend)
        parts.append(piece)
    # The C code computes token by token, so parts are bit-identical.
    atol = 0 if backend == "c" else 1e-12
    torch.testing.assert_close(torch.cat(parts, 1), y, atol=atol, rtol=0)
    torch.testing.assert_close(state, end, atol=atol, rtol=0)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_padding_changes_nothing_and_gets_no_gradient(backend):
    arguments = inputs(2, 9, 1, 4, dtype_of(backend))
    broken = [x.detach().clone() for x in arguments]
    for x in broken[:4]:
        x[1, 5:] = torch.nan
    lengths = torch.tensor([9, 5])
    clean = results(arguments, backend, lengths=lengths)
    for name, value in results(broken, backend, lengths=lengths).items():
        assert torch.equal(value.nan_to_num(7), clean[name]), name
    assert not clean["y"][1, 5:].any()


@pytest.mark.parametrize("backend", ["reference", "c"])
def test_a_reset_forgets_a_nan(backend):
    """In chunks, it does not: 0 * NaN is NaN."""
    check_a_reset_forgets_a_nan(wkv6, inputs(1, 80, 1, 4, dtype_of(backend)), (0, 1, 2, 3), backend)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_an_empty_batch_is_empty(backend):
    arguments = inputs(0, 70, 2, 4, dtype_of(backend))
    check_an_empty_batch_is_empty(results(arguments, backend), NAMES, arguments)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_lengths_outside_the_text_are_clamped(backend):
    check_lengths_are_clamped(results, inputs(3, 9, 1, 4, dtype_of(backend)), backend)


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_a_diverged_input_stays_visible(backend):
    arguments = [x.detach() for x in inputs(1, 20, 1, 4, dtype_of(backend))]
    arguments[1][0, 3, 0, 0] = torch.nan
    y, end = wkv6(*arguments, backend=backend)
    assert y[0, 5:].isnan().all()
    assert end.isnan().any()


def test_the_gradient_is_the_numerical_one():
    for backend in ("reference", "chunked"):
        for fixed in (False, True):
            arguments = inputs(1, 6, 1, 2, fixed=fixed, decay=-0.5)
            assert torch.autograd.gradcheck(lambda *x, backend=backend: wkv6(*x, backend=backend), arguments)


def test_a_state_is_returned_on_request_and_never_changed():
    for backend in ON_THE_CPU:
        *arguments, state = inputs(1, 5, 1, 2, dtype_of(backend))
        assert wkv6(*arguments, backend=backend)[1] is None
        before = state.detach().clone()
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                wkv6(*arguments, state, backend=backend)
            assert torch.equal(state, before)


def test_bfloat16_inputs_are_computed_in_float32():
    arguments = [x.detach().bfloat16() for x in inputs(1, 70, 1, 8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, end = wkv6(*arguments)
    expected, _ = wkv6(*(x.double() for x in arguments))
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert error(y, expected) < 2**-8


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("k", (1, 5, 1, 3), r"k has shape \(1, 5, 1, 3\); .* it must be \(1, 5, 1, 2\)"),
        ("w", (1, 3), r"w has shape \(1, 3\); .* it must be \(1, 2\)"),
        ("w", (1, 1, 1, 2), r"w has shape \(1, 1, 1, 2\); .* it must be \(1, 5, 1, 2\)"),
        ("u", (2,), r"u has shape \(2,\); .* it must be \(1, 2\)"),
        ("state", (1, 1, 2, 3), r"state has shape .* it must be \(1, 1, 2, 2\)"),
        ("lengths", (2,), r"lengths has shape .* it must be \(1,\)"),
        ("resets", (1, 4), r"resets has shape .* it must be \(1, 5\)"),
        ("r", (1, 0, 1, 2), r"r has shape .* it must be \(batch, time >= 1, heads, head size\)"),
    ],
)
def test_wrong_shapes_are_refused(name, shape, words):
    arguments = dict(zip(NAMES, inputs(1, 5, 1, 2), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=words):
        wkv6(**arguments)


def test_resets_of_another_type_are_refused():
    with pytest.raises(ValueError, match="resets is torch.int64; it must be torch.bool"):
        wkv6(**dict(zip(NAMES, inputs(1, 5, 1, 2), strict=True)), resets=torch.zeros(1, 5, dtype=torch.int64))


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


@pytest.fixture
def install_fla(monkeypatch):
    """Return a function that puts a stub of the package flash-linear-attention in place, for tensors on the CPU."""

    find = importlib.util.find_spec

    def install(error):
        def chunk_rwkv6(r, k, v, w, u, *, scale, initial_state, output_final_state):
            assert {x.dtype for x in (r, k, v)} == {torch.bfloat16}
            assert (scale, output_final_state) == (1, True)
            y, end = wkv6(*(x.float() for x in (r, w, k, v, u)), initial_state, backend="chunked")
            return y.to(torch.bfloat16) * (1 + error), end

        module = types.ModuleType("fla.ops.rwkv6")
        module.chunk_rwkv6 = chunk_rwkv6
        for name in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "fla.ops.rwkv6", module)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "fla" or find(name, *more))
        monkeypatch.setattr(common.library, "DEVICES", ("cpu",))

    library._difference.cache_clear()
    yield install
    library._difference.cache_clear()


@pytest.mark.parametrize("fixed", [False, True])
def test_fla_equals_the_loop_up_to_the_rounding_of_bfloat16(install_fla, fixed):
    install_fla(0)
    torch.manual_seed(0)
    arguments = inputs(2, 37, 2, 8, fixed=fixed)
    found = results([x.float() for x in arguments], "fla")
    for name, value in results(arguments, "reference").items():
        assert error(found[name], value) < 0.02, name


def test_wrong_kernels_of_fla_are_not_used(install_fla):
    install_fla(0.05)
    with pytest.raises(ValueError, match=r"backend='fla' is not available: results of the package .* differ by 5"):
        choose_backend("fla", torch.zeros(1, 100, 1, 8))


def test_fla_needs_cuda():
    with pytest.raises(ValueError, match="backend='fla' is not available: .* needs cuda, not cpu; choose auto"):
        choose_backend("fla", torch.zeros(1, 100, 1, 8))


@pytest.mark.parametrize("is_training", [True, False])
def test_states_are_stored_only_for_a_backward_pass(monkeypatch, is_training):
    arguments = dict(zip(NAMES, inputs(1, 40, 1, 4), strict=True))
    assert stores_states(monkeypatch, compiled.KERNELS, wkv6, arguments, is_training) == is_training
