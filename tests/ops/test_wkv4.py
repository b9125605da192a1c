"""wkv4: the loop against the formula, all backends against the loop in outputs, states and gradients, hard values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.operators import check_a_reset_forgets_a_nan, check_an_empty_batch_is_empty, stores_states
from tests.helpers.tiers import examples, slow
from timemix.ops.rwkv4 import BACKENDS, choose_backend, compiled, wkv4
from timemix.ops.rwkv4.api import empty_state

NAMES = ("w", "u", "k", "v", "state")


def inputs(B, T, C, dtype=torch.float64, *, decay=None, bonus=1.0, key=1.0, shift=0.0, state=True):
    """Draw the arguments of a layer of RWKV-4. A state has positive weights, as after any text."""
    w = -torch.exp(2 * torch.randn(C, dtype=torch.float64))
    w = w if decay is None else torch.full_like(w, decay)
    u = bonus * torch.randn(C, dtype=torch.float64)
    k = (shift + key * torch.randn(B, T, C, dtype=torch.float64)).clamp(-60, 60)
    v = torch.randn(B, T, C, dtype=torch.float64)
    a, b, p = torch.randn(B, C), 1 + torch.rand(B, C), shift + key * torch.randn(B, C)
    start = torch.stack((a, b, p), 1).double() if state else empty_state(B, C, torch.float64, torch.device("cpu"))
    return [x.to(dtype).requires_grad_() for x in (w, u, k, v, start)]


def dtype_of(backend):
    return torch.float32 if backend == "c" else torch.float64


def results(arguments, backend, **options):
    """Return y, the last state and the gradients of all arguments, in the dtype of the arguments."""
    arguments = [x.detach().clone().requires_grad_() for x in arguments]
    y, end = wkv4(*arguments, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, end)]
    # The exponent of the last state is a constant for autograd. The gradients of a / b and log b do not depend on it.
    a, b, _ = end.unbind(1)
    ((y * weights[0]).sum() + (a / b * weights[1][:, 0]).sum() + (b.log() * weights[1][:, 1]).sum()).backward()
    return dict(zip(("y", "end", *NAMES), [y.detach(), end.detach(), *(x.grad for x in arguments)], strict=True))


def error(got, expected):
    """Return the largest difference relative to the largest expected value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def assert_accurate(got, expected, scale=1):
    for name, value in expected.items():
        if name == "end":
            # The sums a exp(p) and b exp(p), divided by exp(p) of the expected state.
            power = (got[name][:, 2].double() - value[:, 2]).where(value[:, 2] > -1e37, 0).exp()
            for i in range(2):
                assert error(got[name][:, i] * power, value[:, i]) < 2e-6 * scale, "ab"[i]
            continue
        # The gradients of w and u are sums over all tokens.
        limit = 2e-6 if name == "y" else 1e-4 if name == "w" else 1e-5
        assert error(got[name], value) < limit * scale, name


def test_the_loop_is_the_formula():
    w, u, k, v, _ = (x.detach() for x in inputs(2, 7, 3))
    y, _ = wkv4(w, u, k, v, backend="reference")
    for t in range(7):
        weights = torch.stack([(t - 1 - s) * w + k[:, s] for s in range(t)] + [u + k[:, t]], 1).exp()
        np.testing.assert_allclose(y[:, t], (weights * v[:, : t + 1]).sum(1) / weights.sum(1), atol=1e-13)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, slow(513)])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("backend", ["chunked", "c"])
def test_backends_equal_the_loop(backend, T, resets, lengths, state):
    torch.manual_seed(T)
    arguments = inputs(2, T, 70, state=state)
    options = {
        "resets": (torch.rand(2, T) < 0.1) | (torch.arange(T) % 16 < 2) if resets else None,
        "lengths": torch.tensor([T, max(1, T // 2)]) if lengths else None,
    }
    expected = results(arguments, "reference", **options)
    assert_accurate(results([x.to(dtype_of(backend)) for x in arguments], backend, **options), expected)


HARD = {
    "decays to nothing": {"decay": -400.0},
    "decays near 1": {"decay": -1e-6},
    "large bonuses": {"bonus": 60.0},
    "extreme keys": {"key": 60.0},
    "keys near 60": {"key": 0.1, "shift": 59.0},
    "keys near -60": {"key": 0.1, "shift": -59.0},
    "keys all alike": {"key": 0.0, "decay": -1e-3},
}


@pytest.mark.parametrize("T", [65, slow(513)])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("backend", ["chunked", "c"])
def test_hard_values_in_float32(backend, kind, T):
    torch.manual_seed(3)
    arguments = [x.detach().float().double() for x in inputs(1, T, 33, **HARD[kind])]
    expected = results(arguments, "reference")
    # float32 holds an exponent of 120 with an error of 4e-6. The C code repairs the error if all keys are alike.
    is_hard = "extreme" in kind or (backend == "chunked" and kind.startswith("keys near"))
    assert_accurate(results([x.float() for x in arguments], backend), expected, 10 if is_hard else 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_of_minus_infinity_forgets_all_but_the_newest_token(backend):
    """In float32, -exp(decay) is minus infinity for a decay above 88. y is an average of two values."""
    arguments = inputs(2, 40, 3, dtype_of(backend), decay=-torch.inf)
    found = results(arguments, backend)
    _, u, k, v, _ = (x.detach() for x in arguments)
    bonus = (u + k[:, 1:] - k[:, :-1]).sigmoid()
    torch.testing.assert_close(found["y"][:, 1:], bonus * v[:, 1:] + (1 - bonus) * v[:, :-1])
    assert all(value.isfinite().all() for value in found.values())
    assert found["w"].abs().max() < 1e-30


@pytest.mark.parametrize("shift", [59.0, -59.0])
def test_exponents_near_60_keep_their_digits_in_c(shift):
    """A rounded exponent of 60 has an error of up to 4e-6, which would be the relative error of a weight."""
    torch.manual_seed(3)
    arguments = [x.detach().float().double() for x in inputs(1, 200, 33, key=0.1, shift=shift)]
    expected = results(arguments, "reference")
    assert error(results([x.float() for x in arguments], "c")["y"], expected["y"]) < 3e-7


def long_sums(kind):
    """Return arguments with large sums a and b before a key far above them, in float32 numbers."""
    torch.manual_seed(3)
    if kind == "a thousand keys":
        arguments = inputs(1, 1003, 33, key=0.1, decay=-1e-3, state=False)
        rises, rise = 1000, 15
    else:
        arguments = inputs(1, 3, 33, key=0.1, decay=-1e-5)
        rises, rise = 0, 12
    arguments = [x.detach() for x in arguments]
    arguments[2][:, rises] += rise
    if kind == "a state":
        arguments[4][:, 0] = 1e5 * torch.randn(33)
        arguments[4][:, 1:] = torch.tensor([1e5, 0.0])[:, None]
    return [x.float().double() for x in arguments]


@pytest.mark.parametrize("kind", ["a thousand keys", "a state"])
def test_a_key_far_above_large_sums_keeps_their_digits_in_c(kind):
    """The factor of the sums is then near 0. As 1 + (d - 1), it would lose the digits of the sums."""
    arguments = long_sums(kind)
    expected = results(arguments, "reference")
    found = results([x.float() for x in arguments], "c")
    for name in NAMES:
        assert error(found[name], expected[name]) < (2e-6 if name == "w" else 1e-6), name
    assert error(found["y"], expected["y"]) < 3e-7


@pytest.mark.parametrize("changed", [False, True])
def test_the_c_code_is_bit_identical_for_any_threads_and_strides(changed):
    arguments = inputs(3, 40, 130, torch.float32)
    before, found = torch.get_num_threads(), []
    given_to = [x.mT.contiguous().mT if changed and x.ndim == 3 else x for x in arguments]
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(results(given_to, "c"))
    finally:
        torch.set_num_threads(before)
    for name, value in results(arguments, "c").items():
        assert torch.equal(found[0][name], value), name
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
@given(cut=st.integers(1, 19), data=st.data())
@examples(40)
def test_a_text_in_two_parts_is_the_whole(backend, cut, data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    w, u, k, v, state = inputs(2, 20, 3, dtype_of(backend))
    resets = torch.rand(2, 20) < 0.1
    y, end = wkv4(w, u, k, v, state, resets=resets, backend=backend)
    parts = []
    for part in (slice(0, cut), slice(cut, 20)):
        piece, state = wkv4(w, u, k[:, part], v[:, part], state, resets=resets[:, part], backend=backend)
        parts.append(piece)
    # The C code computes token by token, so parts are bit-identical.
    atol = 0 if backend == "c" else 1e-12
    torch.testing.assert_close(torch.cat(parts, 1), y, atol=atol, rtol=0)
    torch.testing.assert_close(state, end, atol=atol, rtol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing_and_gets_no_gradient(backend):
    arguments = inputs(2, 9, 4, dtype_of(backend))
    broken = [x.detach().clone() for x in arguments]
    for x in broken[2:4]:
        x[1, 5:] = torch.nan
    lengths = torch.tensor([9, 5])
    clean = results(arguments, backend, lengths=lengths)
    for name, value in results(broken, backend, lengths=lengths).items():
        assert torch.equal(value.nan_to_num(7), clean[name]), name
    assert not clean["y"][1, 5:].any()


@pytest.mark.parametrize("backend", ["reference", "c"])
def test_a_reset_forgets_a_nan(backend):
    """In chunks, it does not: 0 * NaN is NaN."""
    check_a_reset_forgets_a_nan(wkv4, inputs(1, 80, 2, dtype_of(backend)), (2, 3), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_is_empty(backend):
    arguments = inputs(0, 70, 5, dtype_of(backend))
    check_an_empty_batch_is_empty(results(arguments, backend), NAMES, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_outside_the_text_are_clamped(backend):
    """A row without tokens has its state as the last state. The C code must not read or write outside the rows."""
    arguments = inputs(4, 19, 5, dtype_of(backend))
    clean = results(arguments, "reference", lengths=torch.tensor([0, 19, 0, 19]))
    found = results(arguments, backend, lengths=torch.tensor([0, 19, -1000, 1000]))
    assert_accurate(found, clean)
    assert torch.equal(found["end"][[0, 2]], arguments[-1].detach()[[0, 2]])
    assert not found["y"][[0, 2]].any()
    assert not found["k"][[0, 2]].any()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_gradient_is_the_numerical_one(backend):
    arguments = inputs(1, 6, 2)

    # The exponent of the last state is a constant for autograd: only the sums have a derivative.
    exponent = wkv4(*arguments, backend=backend)[1][:, 2:].detach()

    def sums(*x):
        y, end = wkv4(*x, backend=backend)
        return y, end[:, :2] * (end[:, 2:].detach() - exponent).exp()

    assert torch.autograd.gradcheck(sums, arguments)


def test_a_state_is_returned_on_request_and_never_changed():
    for backend in BACKENDS:
        *arguments, state = inputs(1, 5, 2, dtype_of(backend))
        assert wkv4(*arguments, backend=backend)[1] is None
        before = state.detach().clone()
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                wkv4(*arguments, state, backend=backend)
            assert torch.equal(state, before)


def test_bfloat16_inputs_are_computed_in_float32():
    arguments = [x.detach().bfloat16() for x in inputs(1, 70, 8)]
    y, end = wkv4(*arguments)
    expected, _ = wkv4(*(x.double() for x in arguments))
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert error(y, expected) < 2**-8


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("v", (1, 5, 3), r"v has shape \(1, 5, 3\); .* it must be \(1, 5, 2\)"),
        ("w", (1, 2), r"w has shape .* it must be \(2,\)"),
        ("state", (1, 2, 3), r"state has shape .* it must be \(1, 3, 2\)"),
        ("lengths", (2,), r"lengths has shape .* it must be \(1,\)"),
        ("resets", (1, 4), r"resets has shape .* it must be \(1, 5\)"),
        ("k", (1, 0, 2), r"k has shape .* it must be \(batch, time >= 1, channels\)"),
    ],
)
def test_wrong_shapes_are_refused(name, shape, words):
    arguments = dict(zip(NAMES, inputs(1, 5, 2), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=words):
        wkv4(**arguments)


def test_resets_of_another_type_are_refused():
    with pytest.raises(ValueError, match="resets is torch.int64; it must be torch.bool"):
        wkv4(**dict(zip(NAMES, inputs(1, 5, 2), strict=True)), resets=torch.zeros(1, 5, dtype=torch.int64))


def test_the_choice_of_the_backend(monkeypatch):
    short, long = torch.zeros(1, 1, 8, dtype=torch.float64), torch.zeros(1, 100, 8, dtype=torch.float64)
    assert choose_backend("auto", short)[0] == "reference"
    assert choose_backend("auto", long)[0] == "chunked"
    assert choose_backend("auto", long.float())[0] == choose_backend("auto", short.float())[0] == "c"
    with pytest.raises(ValueError, match="backend='fast' is not supported; choose auto, reference, chunked, c"):
        choose_backend("fast", short)
    with pytest.raises(ValueError, match=r"backend='c' is not available: .* needs float32 on the cpu, not float64"):
        choose_backend("c", long)
    monkeypatch.setattr(compiled.KERNELS, "library", lambda: (None, "no C compiler was found"))
    assert choose_backend("auto", long.float())[0] == "chunked"
    with pytest.raises(ValueError, match="backend='c' is not available: no C compiler was found; choose auto"):
        choose_backend("c", long.float())


@pytest.mark.parametrize("is_training", [True, False])
def test_states_are_stored_only_for_a_backward_pass(monkeypatch, is_training):
    arguments = dict(zip(NAMES, inputs(1, 40, 4), strict=True))
    assert stores_states(monkeypatch, compiled.KERNELS, wkv4, arguments, is_training) == is_training
