"""wkv1: reference against the formula, dense against the reference, and the numeric guarantee."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timemix.ops import Wkv1State, choose_backend, wkv1, wkv1_state

CTX = 9


def inputs(B=2, T=CTX, H=3, N=2, ctx_len=CTX, dtype=torch.float64, tables=True):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    named = {"k": random(B, T, H, N), "v": random(B, T, H, N)}
    named["f"] = random(H, ctx_len, ctx_len) if tables == "free" else random(H, ctx_len)
    if tables is True:
        named |= {"alpha": random(H, ctx_len), "beta": random(H, ctx_len)}
    return named


def from_state(B, start, H, N, denominator, dtype=torch.float64):
    """A state as `start` random tokens leave it, its tensors leaves of the graph."""
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
    # A different weight for every entry, so that no two mistakes cancel.
    total = sum((x * torch.sin(torch.arange(x.numel()).double()).view(x.shape).to(x)).sum() for x in values.values())
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    values |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    if after is not None:
        values["position"] = after.position
    return values


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


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
    """With W in the denominator too, y is a weighted mean of v: constants pass, bounds hold."""
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


@pytest.mark.parametrize("denominator", ["plain", "weighted"])
@pytest.mark.parametrize("tables", [True, False, "free"])
@pytest.mark.parametrize("T", [1, 5, CTX])
def test_dense_equals_reference(T, tables, denominator):
    x = inputs(T=T, tables=tables)
    expected = outputs_and_gradients(x, "reference", denominator=denominator)
    assert_same(outputs_and_gradients(x, "dense", denominator=denominator), expected)


@pytest.mark.parametrize("denominator", ["plain", "weighted"])
@pytest.mark.parametrize("tables", [True, "free"])
@pytest.mark.parametrize(("start", "T"), [(0, CTX), (0, 1), (4, 1), (3, 5), (CTX - 1, 1)])
def test_dense_equals_reference_from_a_state(start, T, tables, denominator):
    x = inputs(T=T, tables=tables)
    state = from_state(2, start, 3, 2, denominator)
    expected = outputs_and_gradients(x, "reference", state, denominator)
    assert_same(outputs_and_gradients(x, "dense", state, denominator), expected)


@pytest.mark.parametrize("denominator", ["plain", "weighted"])
@pytest.mark.parametrize("tables", [True, "free"])
def test_rows_at_different_positions_with_padding(tables, denominator):
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
    assert_same(outputs_and_gradients(x, "dense", state, denominator, lengths), expected)
    for row, (start, length) in enumerate([(4, 5), (1, 2), (2, 3)]):
        alone = {n: a[row : row + 1, :length] if n in "kv" else a for n, a in x.items()}
        past = Wkv1State(*(a[row : row + 1] for a in state))
        assert int(past.position) == start
        y, after = wkv1(**alone, state=past, denominator=denominator)
        torch.testing.assert_close(y[0], expected["y"][row, :length])
        torch.testing.assert_close(after.numerators[0], expected["after.numerators"][row])


@settings(max_examples=30, deadline=None)
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


@pytest.mark.parametrize(("T", "shape"), [(64, (2, 2, 8)), (513, (2, 2, 8)), (2048, (1, 2, 4)), (8192, (1, 1, 2))])
@pytest.mark.parametrize("case", ["normal of deviation 8", "-60, last 30", "-60 or 30"])
def test_guarantee_on_hard_keys(case, T, shape):
    """DESIGN section 2: float32 against float64, output and every gradient, on three hard cases of k."""
    B, H, N = shape
    x = {"k": hard_keys(case, T, shape), "v": torch.randn(B, T, H, N, dtype=torch.float64)}
    x |= {"f": torch.randn(H, T, dtype=torch.float64)}
    x |= {n: 1 + 0.3 * torch.randn(H, T, dtype=torch.float64) for n in ("alpha", "beta")}
    upstream = torch.randn(B, T, H, N, dtype=torch.float64)

    def run(dtype):
        named = {n: a.to(dtype, copy=True).requires_grad_() for n, a in x.items()}
        y, _ = wkv1(**named, backend="dense")
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
        ({"v": torch.zeros(2, 9, 3, 2, dtype=torch.float16)}, TypeError, "refuses float16"),
        ({"v": torch.zeros(2, 8, 3, 2)}, ValueError, "must both be"),
        ({"f": torch.zeros(3, 5), "alpha": None, "beta": None}, ValueError, "past ctx_len 5"),
        ({"alpha": torch.zeros(2, 9)}, ValueError, "alpha"),
        ({"f": torch.zeros(3, 9, 8), "alpha": None, "beta": None}, ValueError, "or \\(heads, ctx_len, ctx_len\\)"),
        ({"backend": "fft"}, ValueError, "known: auto, reference, dense"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        wkv1(**({n: a.detach() for n, a in inputs().items()} | change))


def test_auto_gives_its_reason():
    assert choose_backend("auto") == ("dense", "the only parallel form")
