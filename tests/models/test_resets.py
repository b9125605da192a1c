"""Resets: a row of several documents gives what each document alone gives."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers.models import VARIANTS, build
from tests.helpers.tiers import examples, slow
from timemix.errors import InvalidValue
from timemix.models.language_model import block_class, build_model
from timemix.models.learned_state import LearnedState
from timemix.models.registry import model_config

T = 37
FAST = ("rwkv1", "rwkv1_exp", "shift interpolated", "llama", "grouped heads", "rwkv4", "rwkv7")
RECURRENT = ["rwkv4", "rwkv5", "rwkv6", "rwkv7"]
# A reset at position 0, two in a row, at the last token, at and beside the borders of chunks of 16 tokens, and none
PLACES = [[0], [5, 6], [T - 1], [15, 16, 17], [0, 1, 31, 32, T - 2, T - 1], []]


@pytest.mark.parametrize("variant", ["rwkv1", "rwkv1_exp", "mha_pro", "rwkv7"])
def test_recomputing_with_documents_in_bfloat16(variant):
    """Documents of several lengths use the weights several times, of which autocast casts only the first."""
    model = build(VARIANTS[variant], torch.float32)
    tokens, resets = torch.randint(0, 11, (2, 12)), torch.zeros(2, 12, dtype=torch.bool)
    resets[0, 5] = resets[1, 1] = True
    found = {}
    for how in ("none", "cheap", "all"):
        model.recompute = how
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = model(tokens, resets=resets)
        logits.float().square().sum().backward()
        found[how] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for how in ("cheap", "all"):
        error = (found[how] - found["none"]).norm() / found["none"].norm()
        assert error < 0.01, (how, error)


def resets_at(*rows):
    resets = torch.zeros(len(rows), T, dtype=torch.bool)
    for row, places in zip(resets, rows, strict=True):
        row[places] = True
    return resets


def built(variant, dtype):
    torch.manual_seed(1)
    return build(VARIANTS[variant], dtype, ctx_len=T)


def documents(row, resets):
    """Cut a row (T, ...) before each reset; leave out an empty first part."""
    parts = row.tensor_split(resets.nonzero().flatten().tolist())
    return [part for part in parts if len(part)]


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def assert_equal_gradients(found, expected, dtype):
    tolerance = {"atol": 1e-9, "rtol": 1e-7} if dtype == torch.float64 else {"atol": 2e-3, "rtol": 2e-3}
    # Some gradients are 0 in exact arithmetic, as those of biases of keys.
    least = 1e-3 * max(float(b.abs().max()) for b in expected if b is not None and b.numel())
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        # With one exponential, the parameter `angle` is empty.
        if a is not None and b.numel():
            scale = max(float(b.abs().max()), least)
            torch.testing.assert_close(a / scale, b / scale, **tolerance)


def test_architectures_whose_weights_do_not_depend_on_the_position_reset_their_state():
    able = {config.arch for config in VARIANTS.values() if block_class(config).takes_resets}
    assert able == {*RECURRENT, "mha_rotary", "mha_shift", "llama"}


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        (variant, dtype) if variant in FAST and (dtype == torch.float64 or variant == "rwkv7") else slow(variant, dtype)
        for variant in VARIANTS
        for dtype in (torch.float64, torch.float32)
    ],
)
def test_a_row_of_documents_gives_the_logits_and_gradients_of_each_document_alone(variant, dtype):
    model, rows = built(variant, dtype), torch.randint(11, (len(PLACES), T))
    resets, weight = resets_at(*PLACES), torch.randn(len(PLACES), T, 11, dtype=dtype)
    packed, state = model(rows, resets=resets)
    assert state is None
    alone = [[model(part[None])[0][0] for part in documents(*each)] for each in zip(rows, resets, strict=True)]
    expected = torch.stack([torch.cat(parts) for parts in alone])
    torch.testing.assert_close(packed, expected, atol=1e-10 if dtype == torch.float64 else 2e-4, rtol=1e-4)
    found = gradients(model, (packed * weight).sum())
    assert_equal_gradients(found, gradients(model, (expected * weight).sum()), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", [each if each in FAST else slow(each) for each in RECURRENT])
def test_only_the_first_document_continues_a_state(variant, dtype):
    model, rows, resets = built(variant, dtype), torch.randint(11, (len(PLACES), T)), resets_at(*PLACES)
    _, state = model(torch.randint(11, (len(rows), 5)), model.init_state(len(rows)))
    parts = [{name: x.detach().requires_grad_() for name, x in layer.items()} for layer in state.layers]
    leaves = [x for layer in parts for x in layer.values()]
    before = type(state)(state.position, parts)
    packed, end = model(rows, before, resets=resets)
    outputs, ends = [], []
    for i, row in enumerate(rows):
        first, *others = row.tensor_split(resets[i].nonzero().flatten().tolist())
        own, found = before.select(torch.tensor([i])), []
        for part in ([first] if len(first) else []) + others:
            if part is not first:
                own = model.init_state(1)
            logits, own = model(part[None], own)
            found.append(logits[0])
        outputs.append(torch.cat(found))
        ends.append(own)
    expected, last = torch.stack(outputs), type(state).cat(ends)
    close = {"atol": 1e-9 if dtype == torch.float64 else 5e-4, "rtol": 1e-3}
    torch.testing.assert_close(packed, expected, **close)
    assert end.position.eq(state.position + T).all()
    for own, theirs in zip(end.layers, last.layers, strict=True):
        for name in own:
            torch.testing.assert_close(own[name], theirs[name], **close)

    def into_the_state(logits, layers):
        loss = logits.square().sum() + sum(x.square().sum() for layer in layers for x in layer.values())
        return torch.autograd.grad(loss, leaves)

    assert_equal_gradients(into_the_state(packed, end.layers), into_the_state(expected, last.layers), dtype)


@pytest.mark.parametrize("variant", ["shift interpolated", "llama", "rwkv6", "rwkv7"])
@examples(4)
@example([True] * T)
@given(st.lists(st.booleans(), min_size=T, max_size=T))
def test_no_token_sees_an_earlier_document(variant, resets):
    model, x = built(variant, torch.float32), torch.randint(11, (1, T))
    resets = torch.tensor([resets])
    with torch.no_grad():
        before, _ = model(x, resets=resets)
        changed = x.clone()
        # The first token of the row, and so the first document, changes.
        changed[0, 0] = (x[0, 0] + 1) % 11
        after, _ = model(changed, resets=resets)
    same = resets[0].long().cumsum(0) != resets[0, 0].long()
    assert after[0, same].equal(before[0, same])


@pytest.mark.parametrize("recompute", ["cheap", "all"])
@pytest.mark.parametrize("variant", ["rwkv7", "llama"])
def test_recomputation_keeps_the_gradients(variant, recompute):
    model, x, resets = built(variant, torch.float32), torch.randint(11, (2, T)), resets_at([3, 20], [0])
    expected = gradients(model, model(x, resets=resets)[0].square().sum())
    model.recompute = recompute
    found = gradients(model, model(x, resets=resets)[0].square().sum())
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("variant", [slow("rwkv1_exp"), "rwkv4", "rwkv7"])
def test_each_document_begins_with_a_learned_state(variant):
    model, rows, resets = built(variant, torch.float32), torch.randint(11, (len(PLACES), T)), resets_at(*PLACES)
    model.learned_state = LearnedState(model.blocks)
    with torch.no_grad():
        for p in model.learned_state.parameters():
            p.add_(0.3 * torch.randn_like(p))
    packed, _ = model(rows, resets=resets)
    alone = [[model(part[None])[0][0] for part in documents(*each)] for each in zip(rows, resets, strict=True)]
    expected = torch.stack([torch.cat(parts) for parts in alone])
    torch.testing.assert_close(packed, expected, atol=2e-4, rtol=1e-4)
    weight = torch.randn_like(packed)
    found, wanted = (gradients(model, (logits * weight).sum()) for logits in (packed, expected))
    assert_equal_gradients(found, wanted, torch.float32)


@pytest.mark.parametrize("variant", ["rwkv1", "rwkv7"])
def test_hidden_rows_and_last_logits_of_documents(variant):
    model, x, resets = built(variant, torch.float64), torch.randint(11, (2, T)), resets_at([3, 20], [9])
    whole, _ = model(x, resets=resets)
    hidden, _ = model(x, resets=resets, logits=None)
    torch.testing.assert_close(model.head(hidden), whole)
    last, _ = model(x, resets=resets, logits="last", lengths=torch.tensor([T, 12]))
    torch.testing.assert_close(last, whole[[0, 1], [T - 1, 11]])


@pytest.mark.parametrize("arch", ["llama", "rwkv1", "rwkv1_exp"])
def test_resets_with_a_state_are_refused_where_they_are_not_supported(arch):
    x, resets = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.bool)
    model = build_model(arch, layers=1, channels=16, ctx_len=8, vocab_size=11)
    with pytest.raises(InvalidValue, match=f"this {arch} does not support resets with a state; leave out state"):
        model(x, model.init_state(1), resets=resets)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("arch", "op"), [("rwkv5", "wkv6"), ("rwkv6", "wkv6"), ("rwkv7", "wkv7")])
def test_the_named_backend_is_that_of_resets(monkeypatch, arch, op, resets):
    """On a GPU, the kernels of flash-linear-attention support no resets."""
    config = model_config(arch, channels=16, heads=2, ctx_len=12)
    block = block_class(config)

    def chosen(backend, x, firsts=None):
        assert (backend, x.shape) == ("auto", (1, 12, 2, 8))
        assert firsts is None or (firsts.shape, firsts.dtype) == ((1, 12), torch.bool)
        return ("fla", "fast") if firsts is None else ("chunked", "resets")

    monkeypatch.setattr(f"timemix.models.{op.replace('wkv', 'rwkv')}.model.choose_backend", chosen)
    found = block.forms(config, "float32", torch.device("cpu"), resets)
    assert found == {op: "chunked (resets)" if resets else "fla (fast)"}
