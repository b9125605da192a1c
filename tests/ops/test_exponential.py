"""wkv1_exp: recurrence against formula, chunked form against recurrence, and agreement with wkv1 within the context."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.operators import assert_same, gradients_of
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples
from timemix.ops.common.history import extended
from timemix.ops.rwkv1 import exponential
from timemix.ops.rwkv1.api import wkv1
from timemix.ops.rwkv1.curves import Curves, curve
from timemix.ops.rwkv1.exponential import ExpState, exp_state, wkv1_exp

CTX, H, N = 6, 3, 2


CHUNKS = [128, 4, 1]


@pytest.fixture(params=CHUNKS)
def chunk(request, monkeypatch):
    monkeypatch.setattr(exponential, "CHUNK", request.param)
    return request.param


def curves_of(K=5, M=0, dtype=torch.float64, ctx_len=CTX):
    """Return curves with real slots and pairs, of different kinds in each head, as leaves of the graph."""
    angle = torch.rand(H, K // 2, dtype=dtype) * 3
    angle[::2, : K // 4 + 1] = 0
    return Curves(
        rate=(torch.rand(H, K, dtype=dtype) * 0.8 + 0.01).requires_grad_(),
        angle=angle.requires_grad_(),
        coefficients=torch.randn(H, K, dtype=dtype).requires_grad_(),
        forget=(torch.rand(H, dtype=dtype) * 0.25 + 0.02).requires_grad_(),
        taps=torch.randn(H, M, dtype=dtype).requires_grad_() if M else None,
    )


def inputs(B=2, T=9, tables=True, ctx_len=CTX):
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    named = {"k": random(B, T, H, N), "v": random(B, T, H, N)}
    for name in ("alpha", "beta"):
        named[name] = random(H, ctx_len) if tables else None
    return named


def state_after(positions, curves):
    """Return the state after so many random tokens of each row, with its tensors as leaves of the graph."""
    M = 0 if curves.taps is None else curves.taps.shape[1]
    B = len(positions)
    state = exp_state(B, H, N, curves.rate.shape[1], M, dtype=torch.float64)
    if max(positions):
        x = inputs(B, max(positions))
        with torch.no_grad():
            _, state = wkv1_exp(
                **x, curves=curves, ctx_len=CTX, state=state, lengths=torch.tensor(positions), backend="reference"
            )
    return ExpState(*(x if x is None or x.dtype == torch.int64 else x.requires_grad_() for x in state))


def outputs_and_gradients(x, curves, backend, state=None, lengths=None):
    leaves = {n: a for n, a in (x | curves._asdict()).items() if a is not None}
    tensors = {} if state is None else {n: a for n, a in state._asdict().items() if a is not None and n != "position"}
    leaves |= {f"state's {n}": a for n, a in tensors.items()}
    y, after = wkv1_exp(**x, curves=curves, ctx_len=CTX, state=state, lengths=lengths, backend=backend)
    if lengths is not None:
        y = torch.where(torch.arange(y.shape[1])[:, None, None] < lengths[:, None, None, None], y, 0)
    values = {"y": y}
    if after is not None:
        values |= {f"after.{n}": a for n, a in after._asdict().items() if a is not None and n != "position"}
    values |= gradients_of(values, leaves)
    if after is not None:
        values["position"] = after.position
    return values


@pytest.mark.parametrize("M", [0, 2])
def test_reference_is_the_formula(M):
    """Return W of every pair of positions, also past ctx_len: weights decay by one factor rho per step of t - u."""
    T, curves = 14, curves_of(M=M)
    x = {n: a.detach() for n, a in inputs(1, T).items()}
    y, _ = wkv1_exp(**x, curves=curves, ctx_len=CTX, backend="reference")
    f, alpha, beta = curve(curves, T), extended(x["alpha"], T), extended(x["beta"], T)
    time = torch.arange(T)
    past_end = (time - CTX + 1).clamp(min=0)
    faded = (-curves.forget[:, None, None] * (past_end[:, None] - past_end)).exp().tril()
    W = f[:, (time[:, None] - time).clamp(min=0)] * faded
    e = x["k"][0].exp()
    above = torch.einsum("htu,hu,uhn,uhn->thn", W, alpha, e, x["v"][0])
    below = torch.einsum("htu,uhn->thn", faded, e)
    torch.testing.assert_close(y[0], beta.t()[:, :, None] * above / below)


def test_a_curve_is_its_exponentials_and_taps():
    K = 5
    curves = Curves(*(torch.tensor([a]).double() for a in ([0.1] * K, [0.0, 0.7], [1.0, 2, 3, 4, 5], 0.1, [9.0, 8])))
    lag = torch.arange(7).double()
    expected = (-0.1 * lag).exp() * (1 + 2 + 3 * (0.7 * lag).cos() + 4 * (0.7 * lag).sin() + 5)
    expected[:2] += torch.tensor([9, 8])
    torch.testing.assert_close(curve(curves, 7)[0], expected)
    torch.testing.assert_close(curve(curves, 1)[0], expected[:1])


@pytest.mark.parametrize(
    ("T", "sizes", "tables", "chunk"),
    pairwise([1, CTX, 9, 15], [(1, 0), (2, 1), (5, 0), (4, 6)], [True, False], CHUNKS),
    indirect=["chunk"],
)
def test_chunks_equal_the_reference(T, sizes, tables, chunk):
    K, M = sizes
    x = inputs(T=T, tables=tables)
    curves = curves_of(K, M)
    assert_same(outputs_and_gradients(x, curves, "auto"), outputs_and_gradients(x, curves, "reference"))


@pytest.mark.parametrize(
    ("positions", "sizes", "chunk"),
    pairwise([(0, 1), (0, 9), (3, 1), (3, 5), (CTX - 1, 1), (CTX, 1), (9, 7)], [(1, 0), (4, 1), (5, 3)], CHUNKS),
    indirect=["chunk"],
)
def test_chunks_equal_the_reference_from_a_state(positions, sizes, chunk):
    (start, T), (K, M) = positions, sizes
    x, curves = inputs(T=T), curves_of(K, M)
    state = state_after([start, start], curves)
    expected = outputs_and_gradients(x, curves, "reference", state)
    assert_same(outputs_and_gradients(x, curves, "auto", state), expected)


@pytest.mark.parametrize("M", [0, 3])
def test_rows_at_different_positions_with_padding(M, chunk):
    curves, lengths, starts = curves_of(5, M), torch.tensor([9, 1, 5, 2]), [3, 2, 8, 5]
    x, state = inputs(4, 9), state_after(starts, curves)
    expected = outputs_and_gradients(x, curves, "reference", state, lengths)
    assert_same(outputs_and_gradients(x, curves, "auto", state, lengths), expected)
    for row, length in enumerate(lengths.tolist()):
        alone = {n: a[row : row + 1, :length] if n in "kv" else a for n, a in x.items()}
        past = ExpState(*(None if a is None else a[row : row + 1] for a in state))
        y, after = wkv1_exp(**alone, curves=curves, ctx_len=CTX, state=past)
        torch.testing.assert_close(y[0], expected["y"][row, :length])
        torch.testing.assert_close(after.numerators[0], expected["after.numerators"][row])
        torch.testing.assert_close(after.denominators[0], expected["after.denominators"][row])


@examples(40)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 4), st.integers(1, 5))
def test_pieces_equal_the_whole(pieces, K, M, size):
    x, curves = inputs(T=sum(pieces)), curves_of(K, M)
    whole, _ = wkv1_exp(**x, curves=curves, ctx_len=CTX)
    state, parts = exp_state(2, H, N, K, M, dtype=torch.float64), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exponential, "CHUNK", size)
        for k, v in zip(x["k"].split(pieces, 1), x["v"].split(pieces, 1), strict=True):
            y, state = wkv1_exp(**(x | {"k": k, "v": v}), curves=curves, ctx_len=CTX, state=state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("M", [0, 2])
def test_within_the_context_it_is_wkv1_with_the_curve(M, state, chunk):
    x, curves = inputs(T=CTX), curves_of(5, M)
    y, _ = wkv1_exp(**x, curves=curves, ctx_len=CTX, state=state_after([0, 0], curves) if state else None)
    expected, _ = wkv1(**x, f=curve(curves, CTX))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("M", [0, 2])
def test_gradcheck(M):
    x, curves = inputs(1, 3), curves_of(3, M)
    state = state_after([5], curves)
    tensors = {n: a for n, a in state._asdict().items() if a is not None and n != "position"}
    named = {n: a for n, a in curves._asdict().items() if a is not None}

    def call(*values):
        values = iter(values)
        x2, c2, s2 = ({n: next(values) for n in group} for group in (x, named, tensors))
        y, after = wkv1_exp(
            **x2, curves=Curves(**c2), ctx_len=CTX, state=ExpState(**s2, position=state.position), backend="auto"
        )
        return y, after.numerators, after.denominators

    # A change of an angle of 0 would turn two real slots into a pair.
    curves.angle.requires_grad_(False)
    assert torch.autograd.gradcheck(call, (*x.values(), *named.values(), *tensors.values()))


def test_an_angle_of_zero_has_no_gradient():
    curves = curves_of(4)
    y, _ = wkv1_exp(**inputs(T=9), curves=curves, ctx_len=CTX)
    (gradient,) = torch.autograd.grad(y.square().sum(), [curves.angle])
    assert torch.equal(gradient != 0, curves.angle != 0)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("T", [64, 700])
@pytest.mark.parametrize("case", ["normal of deviation 8", "-60, last 30", "-60 or 30"])
def test_guarantee_on_hard_keys(case, T, whole):
    """float32 agrees with float64, as for wkv1, relative to the sum of |coefficients|, which may far exceed f."""
    B, ctx_len = 2, 100
    k = {
        "normal of deviation 8": torch.randn(B, T, H, N).double() * 8,
        "-60, last 30": torch.cat([torch.full((B, T - 1, H, N), -60.0), torch.full((B, 1, H, N), 30.0)], 1).double(),
        "-60 or 30": torch.where(torch.rand(B, T, H, N) < 0.5, -60.0, 30.0).double(),
    }[case]
    curves = Curves(*(None if x is None else x.detach() for x in curves_of(6, 2)))._replace(
        rate=torch.tensor([1e-4, 3e-3, 0.02, 0.1, 0.5, 2]).double().expand(H, 6),
        forget=torch.tensor([0.01, 0.05, 0.29]).double(),
    )
    x = {"k": k, "v": torch.randn(B, T, H, N).double()}
    x |= {n: 1 + 0.3 * torch.randn(H, ctx_len).double() for n in ("alpha", "beta")}
    upstream = torch.randn(B, T, H, N).double()
    # Both get the same rounded numbers: after hundreds of lags, a rounded angle gives another curve.
    curves = Curves(*(a if a is None else a.float().double() for a in curves))

    def run(dtype):
        named = {n: a.to(dtype, copy=True).requires_grad_() for n, a in x.items()}
        own = {n: a.to(dtype, copy=True).requires_grad_() for n, a in curves._asdict().items()}
        state = exp_state(B, H, N, 6, 2, dtype=dtype)
        parts = []
        for t in range(0, T, T if whole else 37):
            piece = {n: a[:, t : t + (T if whole else 37)] if n in "kv" else a for n, a in named.items()}
            y, state = wkv1_exp(**piece, curves=Curves(**own), ctx_len=ctx_len, state=state)
            parts.append(y)
        y = torch.cat(parts, 1)
        y.backward(upstream.to(dtype))
        return y.detach().double(), {n: a.grad.double() for n, a in (named | own).items()}

    exact, exact_gradients = run(torch.float64)
    y, gradients = run(torch.float32)
    sizes = curves.coefficients.abs().sum(1).max() + curves.taps.abs().max()
    alpha_v = extended(x["alpha"], max(T, ctx_len))[:, :T].t()[:, :, None] * x["v"]
    assert (y - exact).abs().max() <= 1e-5 * sizes * x["beta"].abs().max() * alpha_v.abs().max()
    for name, gradient in gradients.items():
        largest = exact_gradients[name].abs().max()
        assert (gradient - exact_gradients[name]).abs().max() <= 1e-5 * largest, name


def test_it_stays_finite_for_ever():
    """Thousands of steps with the largest keys, then with the smallest, at the slowest decay, stay exact."""
    curves = curves_of(2, dtype=torch.float32)._replace(rate=torch.zeros(H, 2), forget=torch.full((H,), 1e-3))
    state = exp_state(1, H, N, 2)
    with torch.no_grad():
        for key in (30.0, -60.0, 30.0):
            k = torch.full((1, 5000, H, N), key)
            y, state = wkv1_exp(k, torch.randn_like(k), curves, None, None, CTX, state)
            assert y.isfinite().all()
            assert state.numerators.isfinite().all()
    assert state.position.tolist() == [15000]


def test_bfloat16_values_stay_close_and_keep_their_type():
    x = {n: a.detach().float() for n, a in inputs(T=9).items()}
    curves = curves_of(4, dtype=torch.float32)
    y, _ = wkv1_exp(**x, curves=curves, ctx_len=CTX)
    low, _ = wkv1_exp(**(x | {n: x[n].bfloat16() for n in "kv"}), curves=curves, ctx_len=CTX)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"v": torch.zeros(2, 9, H, N, dtype=torch.float16)}, TypeError, "k or v is float16"),
        ({"v": torch.zeros(2, 8, H, N)}, ValueError, "both must be"),
        ({"alpha": torch.zeros(2, CTX)}, ValueError, "alpha"),
        ({"curves": curves_of(3)._replace(angle=torch.zeros(H, 2))}, ValueError, "angle"),
        ({"backend": "fft"}, ValueError, "backend='fft' is not supported; choose auto or reference"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        wkv1_exp(**({n: a.detach() for n, a in inputs().items()} | {"curves": curves_of(3), "ctx_len": CTX} | change))
