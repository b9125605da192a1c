"""wkv1: reference against formula, all other forms against the reference, and the numeric guarantee."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.operators import assert_same, gradients_of
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples, slow
from timemix.ops.common import causal, fused, spectral
from timemix.ops.common.fused import serves
from timemix.ops.common.spread import broadcast_parameter, embedding
from timemix.ops.rwkv1.api import choose_backend, gated_wkv1, wkv1
from timemix.ops.rwkv1.state import Wkv1State, wkv1_state

CTX = 9


BACKENDS = ["dense", *(f"{name}{size}" for name in ("blocked", "spectral") for size in ("", " 1", " 2", " 4"))]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Return each parallel form, also with blocks of a few positions, so that a short text has many blocks."""
    name, _, block = request.param.partition(" ")
    if block:
        set_blocks(monkeypatch, int(block))
    return name


def set_blocks(monkeypatch, positions):
    monkeypatch.setattr(causal, "BLOCK", positions)
    monkeypatch.setattr(spectral, "block_length", lambda T: positions)


def inputs(B=2, T=CTX, H=3, N=2, ctx_len=CTX, dtype=torch.float64, tables=True):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    named = {"k": random(B, T, H, N), "v": random(B, T, H, N)}
    named["f"] = random(H, ctx_len, ctx_len) if tables == "free" else random(H, ctx_len)
    if tables is True:
        named |= {"alpha": random(H, ctx_len), "beta": random(H, ctx_len)}
    return named


def from_state(B, start, H, N, denominator, dtype=torch.float64):
    """Return the state after `start` random tokens, with its tensors as leaves of the graph."""
    state = wkv1_state(B, H, N, CTX, denominator=denominator, dtype=dtype)
    if start:
        past = inputs(B, start, H, N, dtype=dtype)
        with torch.no_grad():
            _, state = wkv1(**past, state=state, denominator=denominator)
    return Wkv1State(state.numerators.requires_grad_(), state.denominators.requires_grad_(), state.position)


def outputs_and_gradients(named, backend, state=None, denominator="plain", lengths=None):
    leaves = dict(named)
    if state is not None:
        leaves |= {"numerators": state.numerators, "denominators": state.denominators}
    y, after = wkv1(**named, state=state, backend=backend, denominator=denominator, lengths=lengths)
    if lengths is not None:
        y = torch.where(torch.arange(y.shape[1])[:, None, None] < lengths[:, None, None, None], y, 0)
    values = {"y": y}
    if after is not None:
        values |= {"after.numerators": after.numerators, "after.denominators": after.denominators}
    values |= gradients_of(values, leaves)
    if after is not None:
        values["position"] = after.position
    return values


def test_reference_is_the_formula():
    x = inputs(B=1)
    k, v, f, alpha, beta = (x[n].detach() for n in ("k", "v", "f", "alpha", "beta"))
    y, _ = wkv1(k, v, f, alpha, beta, backend="reference")
    t = 5
    for h, n in itertools.product(range(3), range(2)):
        e = [k[0, u, h, n].exp() for u in range(t + 1)]
        W = [f[h, t - u] * alpha[h, u] * beta[h, t] for u in range(t + 1)]
        expected = sum(w * a * b for w, a, b in zip(W, e, v[0, :, h, n], strict=False)) / sum(e)
        torch.testing.assert_close(y[0, t, h, n], expected)


@pytest.mark.parametrize("denominator", ["plain", "weighted"])
@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_a_free_w_of_the_tables_products_equals_the_tables(backend, denominator):
    x = inputs()
    lag = (torch.arange(CTX)[:, None] - torch.arange(CTX)).clamp(min=0)
    f, alpha, beta = (x[n].detach() for n in ("f", "alpha", "beta"))
    if denominator == "plain":
        W = f[:, lag] * alpha[:, None, :] * beta[:, :, None]
    else:
        W = f[:, lag] + alpha[:, None, :] + beta[:, :, None]
    expected, _ = wkv1(**x, denominator=denominator)
    y, _ = wkv1(x["k"], x["v"], W, denominator=denominator, backend=backend)
    torch.testing.assert_close(y, expected)


def test_weighted_denominator_is_an_average():
    """With W in the denominator, y is a weighted mean of v: constants are preserved and bounds of v hold for y."""
    x = inputs()
    x["v"] = torch.full_like(x["v"], 7.0)
    y, _ = wkv1(**x, denominator="weighted", backend="reference")
    torch.testing.assert_close(y, torch.full_like(y, 7.0))
    k, v, f, alpha, beta = (x[n] for n in ("k", "v", "f", "alpha", "beta"))
    v = torch.randn_like(v)
    y, _ = wkv1(k, v, f, alpha, beta, denominator="weighted")
    W = torch.exp(f[1, torch.arange(5).flip(0)] + alpha[1, :5] + beta[1, 4]) * k[0, :5, 1, 0].exp()
    torch.testing.assert_close(y[0, 4, 1, 0], (W * v[0, :5, 1, 0]).sum() / W.sum())


@pytest.mark.parametrize("denominator", ["plain", "weighted"])
def test_reference_gradcheck(denominator):
    x = inputs(B=2, T=3, H=2, N=1)
    state = from_state(2, 2, 2, 1, denominator)

    def call(k, v, f, alpha, beta, numerators, denominators):
        past = Wkv1State(numerators, denominators, state.position)
        y, after = wkv1(k, v, f, alpha, beta, past, denominator=denominator, backend="reference")
        return y, after.numerators, after.denominators

    assert torch.autograd.gradcheck(call, (*x.values(), state.numerators, state.denominators))


@pytest.mark.parametrize(
    ("T", "tables", "denominator", "backend"),
    pairwise([1, 5, CTX], [True, False], ["plain", "weighted"], BACKENDS),
    indirect=["backend"],
)
def test_every_form_equals_the_reference(T, tables, denominator, backend):
    x = inputs(T=T, tables=tables)
    expected = outputs_and_gradients(x, "reference", denominator=denominator)
    assert_same(outputs_and_gradients(x, backend, denominator=denominator), expected)


@pytest.mark.parametrize("denominator", ["plain", "weighted"])
@pytest.mark.parametrize("T", [1, 5, CTX])
def test_a_free_w_equals_the_reference(T, denominator):
    x = inputs(T=T, tables="free")
    expected = outputs_and_gradients(x, "reference", denominator=denominator)
    assert_same(outputs_and_gradients(x, "auto", denominator=denominator), expected)
    for backend in ("blocked", "spectral"):
        with pytest.raises(ValueError, match="needs f by lag"):
            wkv1(**x, denominator=denominator, backend=backend)


@pytest.mark.parametrize(
    ("positions", "denominator", "backend"),
    pairwise([(0, CTX), (0, 1), (4, 1), (3, 5), (2, 6), (CTX - 1, 1)], ["plain", "weighted"], BACKENDS),
    indirect=["backend"],
)
def test_every_form_equals_the_reference_from_a_state(positions, denominator, backend):
    start, T = positions
    x = inputs(T=T)
    state = from_state(2, start, 3, 2, denominator)
    expected = outputs_and_gradients(x, "reference", state, denominator)
    assert_same(outputs_and_gradients(x, backend, state, denominator), expected)


@pytest.mark.parametrize("denominator", ["plain", "weighted"])
def test_a_free_w_equals_the_reference_from_a_state(denominator):
    x = inputs(T=5, tables="free")
    state = from_state(2, 3, 3, 2, denominator)
    expected = outputs_and_gradients(x, "reference", state, denominator)
    assert_same(outputs_and_gradients(x, "auto", state, denominator), expected)


@pytest.mark.parametrize(
    ("tables", "denominator", "backend"),
    pairwise([True, "free"], ["plain", "weighted"], BACKENDS),
    indirect=["backend"],
)
def test_rows_at_different_positions_with_padding(tables, denominator, backend):
    if tables == "free":
        backend = "dense"
    with torch.no_grad():
        _, state = wkv1(
            **inputs(B=3, T=4, tables=tables),
            state=wkv1_state(3, 3, 2, CTX, denominator=denominator, dtype=torch.float64),
            lengths=torch.tensor([4, 1, 2]),
            denominator=denominator,
        )
    x = inputs(B=3, T=5, tables=tables)
    state = Wkv1State(state.numerators.requires_grad_(), state.denominators.requires_grad_(), state.position)
    lengths = torch.tensor([5, 2, 3])
    expected = outputs_and_gradients(x, "reference", state, denominator, lengths)
    assert_same(outputs_and_gradients(x, backend, state, denominator, lengths), expected)
    for row, (start, length) in enumerate([(4, 5), (1, 2), (2, 3)]):
        alone = {n: a[row : row + 1, :length] if n in "kv" else a for n, a in x.items()}
        past = Wkv1State(*(a[row : row + 1] for a in state))
        assert int(past.position) == start
        y, after = wkv1(**alone, state=past, denominator=denominator)
        torch.testing.assert_close(y[0], expected["y"][row, :length])
        torch.testing.assert_close(after.numerators[0], expected["after.numerators"][row])


@examples(60)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(0, 3), st.integers(1, 3), st.sampled_from(["float32", "float64"])
)
def test_blocks_of_any_size_equal_the_whole_matrix(T, block, spare, B, dtype):
    dtype = getattr(torch, dtype)
    x = inputs(B=B, T=T, ctx_len=T + spare, dtype=dtype)
    whole = outputs_and_gradients(x, "dense")
    with pytest.MonkeyPatch.context() as patch:
        set_blocks(patch, block)
        tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {}
        for form in ("blocked", "spectral"):
            assert_same(outputs_and_gradients(x, form), whole, **tolerance)


@examples(30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(["plain", "weighted"]))
def test_pieces_equal_the_whole(pieces, denominator):
    T = min(sum(pieces), CTX)
    x = inputs(T=T)
    whole, _ = wkv1(**x, denominator=denominator)
    state = wkv1_state(2, 3, 2, CTX, denominator=denominator, dtype=torch.float64)
    start, parts = 0, []
    with torch.no_grad():
        for piece in pieces:
            part = {n: a[:, start : min(start + piece, T)] if n in "kv" else a for n, a in x.items()}
            if part["k"].shape[1]:
                y, state = wkv1(**part, state=state, denominator=denominator)
                parts.append(y)
            start += piece
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def twice_half_open(k, v, f, alpha, beta, backend):
    """Return wkv1 computed by its gated form: receptances of 0 give a gate of 1/2."""
    if not serves(k):
        pytest.skip("no C compiler on this machine")
    kvr = torch.cat([each.flatten(2) for each in (k, v, torch.zeros_like(k))], 2)
    y = gated_wkv1(kvr, torch.zeros(kvr.shape[2]), f, alpha, beta, k.shape[2], backend=backend)
    return 2 * y.view(k.shape)


def hard_keys(case, T, shape):
    generator = torch.Generator().manual_seed(3)
    B, H, N = shape
    if case == "normal of deviation 8":
        return torch.randn(B, T, H, N, generator=generator, dtype=torch.float64) * 8
    if case == "-60, last 30":
        k = torch.full((B, T, H, N), -60.0, dtype=torch.float64)
        k[:, -1] = 30
        return k
    return torch.where(torch.rand(B, T, H, N, generator=generator) < 0.5, -60.0, 30.0).double()


CASES, FORMS = ["normal of deviation 8", "-60, last 30", "-60 or 30"], ["dense", "blocked", "spectral"]
SHAPES = {64: (2, 2, 8), 513: (2, 2, 8), 2048: (1, 2, 4), 8192: (1, 1, 2)}
LONG = [slow(*row) for row in itertools.product(CASES, [8192], FORMS, [False, True])]


@pytest.mark.parametrize(
    ("case", "T", "form", "fused"), [*pairwise(CASES, [64, 513, 2048], FORMS, [False, True]), *LONG]
)
def test_guarantee_on_hard_keys(case, T, form, fused, monkeypatch):
    """float32 agrees with float64 in output and every gradient, for three extreme cases of k."""
    if form != "dense":
        monkeypatch.setattr(causal, "_SUM_SMALL", 0)
    shape = B, H, N = SHAPES[T]
    x = {"k": hard_keys(case, T, shape), "v": torch.randn(B, T, H, N, dtype=torch.float64)}
    x |= {"f": torch.randn(H, T, dtype=torch.float64)}
    x |= {n: 1 + 0.3 * torch.randn(H, T, dtype=torch.float64) for n in ("alpha", "beta")}
    upstream = torch.randn(B, T, H, N, dtype=torch.float64)

    def run(dtype):
        named = {n: a.to(dtype, copy=True).requires_grad_() for n, a in x.items()}
        y = (
            twice_half_open(**named, backend=form)
            if fused and dtype == torch.float32
            else wkv1(**named, backend=form)[0]
        )
        y.backward(upstream.to(dtype))
        return y.detach().double(), {n: a.grad.double() for n, a in named.items()}

    exact, exact_gradients = run(torch.float64)
    y, gradients = run(torch.float32)
    alpha_v = x["alpha"].t()[:, :, None] * x["v"]
    bound = 1e-5 * x["f"].norm(dim=1).max() * x["beta"].abs().max() * alpha_v.abs().max()
    assert (y - exact).abs().max() <= bound
    for name, gradient in gradients.items():
        largest = exact_gradients[name].abs().max()
        assert (gradient - exact_gradients[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("denominator", ["plain", "weighted"])
def test_a_constant_added_to_k_changes_nothing(denominator):
    x = inputs()
    y, _ = wkv1(**x, denominator=denominator)
    shifted, _ = wkv1(**(x | {"k": x["k"] + 5}), denominator=denominator)
    torch.testing.assert_close(y, shifted)


def test_bfloat16_values_stay_close_and_keep_their_type():
    x = {n: a.detach().float() for n, a in inputs(T=8).items()}
    y, _ = wkv1(**x)
    low, _ = wkv1(**(x | {"v": x["v"].bfloat16(), "k": x["k"].bfloat16()}))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, atol=0.1, rtol=0.05)


def test_autocast_does_not_reach_inside():
    x = {n: a.detach().float() for n, a in inputs().items()}
    plain, _ = wkv1(**x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = wkv1(**x)
    assert torch.equal(plain, cast)


def test_the_state_is_written_into_only_without_gradients():
    x = {n: a.detach() for n, a in inputs(T=2).items()}
    state = wkv1_state(2, 3, 2, CTX, dtype=torch.float64)
    _, after = wkv1(**x, state=state)
    assert not state.numerators.any()
    with torch.no_grad():
        _, after = wkv1(**x, state=state)
    assert after.numerators is state.numerators
    assert state.numerators[:, :, :2].any()
    assert not state.numerators[:, :, 2:].any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"v": torch.zeros(2, 9, 3, 2, dtype=torch.float16)}, TypeError, "k or v is float16"),
        ({"v": torch.zeros(2, 8, 3, 2)}, ValueError, "both must be"),
        ({"f": torch.zeros(3, 5), "alpha": None, "beta": None}, ValueError, "9 tokens are more than ctx_len 5"),
        ({"alpha": torch.zeros(2, 9)}, ValueError, "alpha"),
        ({"f": torch.zeros(3, 9, 8), "alpha": None, "beta": None}, ValueError, "or \\(heads, ctx_len, ctx_len\\)"),
        ({"backend": "fft"}, ValueError, "backend='fft' is not supported; choose auto, reference, dense"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        wkv1(**({n: a.detach() for n, a in inputs().items()} | change))


@pytest.mark.parametrize(
    "form", [lambda x, f: causal.causal_convolution(x, f, x.shape[1]), spectral.spectral_convolution]
)
@pytest.mark.parametrize("growth", [0.0, 0.02, -0.02])
def test_a_convolution_in_bfloat16_rounds_relative_to_its_own_terms(form, growth):
    """Rounding errors of x and of its gradient are bounded, with the large values at either end."""
    T = 700
    size = torch.exp(growth * torch.arange(T))[:, None, None]
    x = (torch.randn(2, T, 3, 4) * size).bfloat16().requires_grad_()
    f, upstream = torch.rand(3, T), (torch.randn(2, T, 3, 4) * size).bfloat16()
    y = form(x, f)
    dx = torch.autograd.grad(y, x, upstream)[0]
    W = causal.toeplitz(f.double(), T, T)
    for ours, of, equation in ((y, x, "htu,buhn->bthn"), (dx, upstream, "hut,buhn->bthn")):
        exact = torch.einsum(equation, W, of.detach().double())
        terms = torch.einsum(equation, W, of.detach().double().abs())
        assert ((ours.double() - exact).abs() <= 2**-7 * terms).all()


def test_auto_gives_its_reason():
    assert choose_backend("auto", 256) == ("dense", "fastest up to 256 positions")
    assert choose_backend("auto", 257)[0] == "blocked"
    assert choose_backend("auto", 1025) == ("spectral", "fastest past 1024 positions")
    assert choose_backend("auto", 1025, torch.bfloat16) == ("blocked", "fastest from 256 to 2048 positions")
    assert choose_backend("auto", 1025, weighted=True)[0] == "blocked"
    assert choose_backend("auto", 10**6, free=True) == ("dense", "each pair of positions has its own weight")


@pytest.mark.parametrize(("form", "least"), [("blocked", 257), ("spectral", 1025)])
def test_no_tensor_is_a_matrix_of_all_positions(form, least):
    """Past the range of the dense form, memory is linear in T, forward and backward."""
    assert choose_backend("auto", least)[0] == form
    T, largest = 2048, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **kwargs or {})
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return result

    x = {n: a.detach().requires_grad_() for n, a in inputs(B=1, T=T, H=2, N=4, ctx_len=T).items()}
    with Watch():
        y, _ = wkv1(**x, backend=form)
        y.sum().backward()
    assert largest < T * T


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (4, 4), (3, 9), (9, 9)])
@pytest.mark.parametrize("ctx_len", [5, 9, 12])
def test_toeplitz_and_its_gradient(rows, columns, ctx_len):
    f = torch.randn(2, ctx_len, dtype=torch.float64, requires_grad=True)
    lag = columns - rows + torch.arange(rows)[:, None] - torch.arange(columns)
    expected = torch.where((lag >= 0) & (lag < ctx_len), f[:, lag.clamp(0, ctx_len - 1)], 0)
    W = causal.toeplitz(f, rows, columns)
    torch.testing.assert_close(W, expected)
    upstream = torch.randn_like(W)
    # Entries for future positions have no effect, whatever their value.
    spoilt = torch.where(lag < 0, torch.inf, upstream)
    ours = torch.autograd.grad(W, f, spoilt)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, f, upstream)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (65, 200), (70, 71)])
@pytest.mark.parametrize("ctx_len", [5, 68, 300])
def test_toeplitz_in_c(rows, columns, ctx_len, dtype):
    f = torch.randn(3, ctx_len).to(dtype).requires_grad_()
    upstream = torch.randn(3, rows, columns).to(dtype)
    lag = columns - rows + torch.arange(rows)[:, None] - torch.arange(columns)
    upstream = torch.where(lag < 0, torch.inf, upstream)

    def both():
        W = causal.toeplitz(f, rows, columns)
        return W, torch.autograd.grad(W, f, upstream)[0]

    assert fused.serves_lags(f, rows) == fused.available()
    W, gradient = both()
    with fused.left_out():
        W_of_torch, gradient_of_torch = both()
    assert torch.equal(W, W_of_torch)
    torch.testing.assert_close(gradient, gradient_of_torch)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 33, 256, 513])
@pytest.mark.parametrize("reverse", [False, True])
def test_running_sum(T, reverse, monkeypatch):
    monkeypatch.setattr(causal, "_SUM_SMALL", 0)
    x = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    y = causal.running_sum(x, reverse)
    expected = x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(a, x, upstream)[0] for a in (y, expected))
    torch.testing.assert_close(ours, theirs)


def test_the_operators_are_registered_as_the_compiler_needs_them():
    x, f = torch.randn(2, 5, 3, 2, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    torch.library.opcheck(causal.causal_convolution.custom, (x, f, 4))
    torch.library.opcheck(spectral.spectral_convolution.custom, (x, f))
    torch.library.opcheck(causal.running_sum.custom, (torch.randn(2, 20, 3, requires_grad=True), True))
    torch.library.opcheck(causal.toeplitz.custom, (f, 4, 6))
    torch.library.opcheck(embedding, (torch.randn(7, 3, requires_grad=True), torch.randint(7, (2, 5))))


def test_a_table_spread_for_the_compiler_has_the_same_gradient():
    table, x = torch.randn(5, 1, requires_grad=True), torch.randn(2, 5, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        compiled = torch.autograd.grad((x * broadcast_parameter(table, x)).sin().sum(), table)
    plain = torch.autograd.grad((x * table).sin().sum(), table)
    torch.testing.assert_close(compiled, plain)
