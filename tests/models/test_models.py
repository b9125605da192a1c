"""Properties of every architecture: sizes, causality, carried state, padding, initial loss."""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.helpers.models import CTX, VARIANTS, build, heads_of
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples
from timemix.config.presets import preset
from timemix.errors import InvalidValue
from timemix.models.language_model import LanguageModel
from timemix.models.layers.rotary import rotary
from timemix.models.layers.token_shift import TokenShift, shift_fractions
from timemix.models.registry import ARCHITECTURES, model_config


@pytest.fixture(params=VARIANTS)
def model(request):
    return build(VARIANTS[request.param])


def tokens(B, T=CTX):
    return torch.randint(0, 11, (B, T))


@pytest.mark.parametrize(
    ("arch", "parameters"), [("mha_rotary", 17_218_048), ("rwkv1", 18_563_328), ("mha_pro", 18_563_648)]
)
def test_parameter_counts_of_the_published_figure(arch, parameters):
    config = dataclasses.replace(preset("seed", arch).model, vocab_size=136)
    with torch.device("meta"):
        model = LanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_no_position_sees_the_future(model):
    x = tokens(2)
    before, _ = model(x)
    # wkv7 scales a chunk by the decay at its middle token, so later tokens change the rounding of earlier results.
    tolerance = 1e-12 if model.config.arch == "rwkv7" else 0
    for t in (1, 5, CTX - 1):
        changed = x.clone()
        changed[:, t:] = (x[:, t:] + 1 + torch.arange(CTX - t)) % 11
        after, _ = model(changed)
        torch.testing.assert_close(before[:, :t], after[:, :t], atol=tolerance, rtol=0)
        assert not torch.allclose(before[:, t:], after[:, t:])


@pytest.mark.parametrize("variant", VARIANTS)
@example([2, 4, 1, 3])
@examples(3)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_any_split_with_the_state_carried_equals_one_piece(variant, pieces):
    torch.manual_seed(1)
    model = build(VARIANTS[variant])
    x = tokens(2, min(sum(pieces), CTX))
    state, parts, start = model.init_state(2), [], 0
    with torch.no_grad():
        whole, _ = model(x)
        for piece in pieces:
            if start < x.shape[1]:
                logits, state = model(x[:, start : start + piece], state)
                parts.append(logits)
            start += piece
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert state.position.tolist() == [x.shape[1]] * 2


def test_step_by_step_equals_parallel(model):
    x = tokens(3)
    state = model.init_state(3)
    with torch.no_grad():
        whole, _ = model(x)
        steps = []
        for t in range(CTX):
            logits, state = model(x[:, t : t + 1], state)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_padding_is_ignored_and_rows_have_different_positions(model):
    x, lengths = tokens(3), torch.tensor([2, 7, 4])
    more = tokens(3, 5)
    with torch.no_grad():
        padded, state = model(x[:, :8], model.init_state(3), lengths=lengths)
        last, _ = model(x[:, :8], model.init_state(3), lengths=lengths, logits="last")
        after, state = model(more, state)
        assert state.position.tolist() == [7, 12, 9]
        for row, n in enumerate(lengths.tolist()):
            alone, _ = model(torch.cat([x[row, :n], more[row]])[None])
            torch.testing.assert_close(padded[row, :n], alone[0, :n])
            torch.testing.assert_close(last[row], alone[0, n - 1])
            torch.testing.assert_close(after[row], alone[0, n:])


def test_padding_may_lie_past_the_context(model):
    """Rows near the end of the context run beside rows with more tokens to read."""
    x = tokens(2)
    with torch.no_grad():
        whole, _ = model(x)
        _, state = model(x, model.init_state(2), lengths=torch.tensor([CTX - 1, 4]))
        rest = torch.stack([x[0, -1:].expand(CTX - 4), x[1, 4:]])
        after, state = model(rest, state, lengths=torch.tensor([1, CTX - 4]))
    assert state.position.tolist() == [CTX, CTX]
    torch.testing.assert_close(after[0, 0], whole[0, -1])
    torch.testing.assert_close(after[1], whole[1, 4:])


def test_gradients_flow_through_a_carried_state(model):
    """The loss of two pieces with carried state has the gradients of the loss of one piece."""
    x = tokens(2)
    whole, _ = model(x)
    expected = torch.autograd.grad(whole.square().sum(), list(model.parameters()))
    first, state = model(x[:, :5], model.init_state(2))
    second, _ = model(x[:, 5:], state)
    total = first.square().sum() + second.square().sum()
    for name, a, b in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(total, list(model.parameters())),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_state_branches_and_selects_rows(model):
    x = tokens(3)
    with torch.no_grad():
        whole, _ = model(x)
        _, state = model(x[:, :5], model.init_state(3))
        branch, swapped = state.clone(), state.select(torch.tensor([2, 0]))
        for part, rows in ((state, [0, 1, 2]), (branch, [0, 1, 2]), (swapped, [2, 0])):
            logits, _ = model(x[rows, 5:], part)
            torch.testing.assert_close(logits, whole[rows, 5:])
    assert all(len(t) == 3 for layer in branch.layers for t in layer.values())


def test_hidden_rows_give_the_logits(model):
    x = tokens(2)
    hidden, _ = model(x, logits=None)
    logits, _ = model(x)
    torch.testing.assert_close(model.head(hidden), logits)


def test_past_the_context_is_an_error_where_there_is_an_end(model):
    if model.max_position is None:
        assert model(tokens(1, CTX + 1))[0].isfinite().all()
        return
    with pytest.raises(ValueError, match="13 tokens are more than this model's context of 12"):
        model(tokens(1, CTX + 1))
    with torch.no_grad():
        _, state = model(tokens(1), model.init_state(1))
    with pytest.raises(ValueError, match="13 tokens"):
        model(tokens(1, 1), state)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name].arch == "rwkv1_exp"])
def test_exponentials_have_no_end(variant):
    """Many contexts give equal results in one piece, in pieces with carried state, row by row, and token by token."""
    model, x = build(VARIANTS[variant]), tokens(2, 5 * CTX)
    with torch.no_grad():
        whole, _ = model(x)
        for sizes in ([7, CTX + 5, 1, 4 * CTX - 13], [1] * 5 * CTX):
            state, parts = model.init_state(2), []
            for piece in x.split(sizes, 1):
                logits, state = model(piece, state)
                parts.append(logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole)
            assert state.position.tolist() == [5 * CTX] * 2
        lengths = torch.tensor([CTX + 3, 5])
        _, state = model(x[:, : 2 * CTX], model.init_state(2), lengths=lengths)
        rest = torch.stack([row[n : n + 2 * CTX] for row, n in zip(x, lengths.tolist(), strict=True)])
        after, _ = model(rest, state)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(after[row], whole[row, n : n + 2 * CTX])


def test_exponentials_start_as_rwkv1():
    for initial in ("zero", "original"):
        f, exp = (
            LanguageModel(model_config(arch, ctx_len=64, initial=initial)).blocks[0].mixer
            for arch in ("rwkv1", "rwkv1_exp")
        )
        # The last head is constant in rwkv1; here it decays as slowly as possible.
        torch.testing.assert_close(exp.curve(), f.f, atol=0.0065, rtol=0)
        assert (exp.rate >= 1e-4).all()


HAVE_INITIAL = [name for name, each in ARCHITECTURES.items() if "initial" in each.config.__dataclass_fields__]
INITIAL = [(name, {"initial": initial}) for name in HAVE_INITIAL for initial in ("zero", "original")]
INITIAL += [(name, {}) for name in ARCHITECTURES if name not in HAVE_INITIAL]


@pytest.mark.parametrize(("vocab_size", "case"), pairwise([65, 1000], INITIAL, strength=1))
def test_initial_loss_is_near_uniform(case, vocab_size):
    arch, fields = case
    config = model_config(arch, vocab_size=vocab_size, layers=3, channels=128, ctx_len=32, **fields)
    model = LanguageModel(config)
    x = torch.randint(0, vocab_size, (16, 33))
    logits, _ = model(x[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    assert abs(loss.item() - math.log(vocab_size)) < 0.15


@pytest.mark.parametrize("arch", HAVE_INITIAL)
def test_zero_makes_every_block_the_identity(arch):
    model = LanguageModel(model_config(arch, initial="zero", channels=16, ctx_len=CTX))
    x = torch.randn(2, CTX, 16)
    for block in model.blocks:
        assert torch.equal(block(x)[0], x)


def test_original_values_of_rwkv1():
    """Initial scales are those of RWKV-LM 0.01."""
    model = LanguageModel(model_config("rwkv1", initial="original", vocab_size=65, channels=32, ffn_ratio=2.0))

    def is_orthogonal(w, scale):
        w = w.detach() / scale
        gram = w @ w.t() if w.shape[0] <= w.shape[1] else w.t() @ w
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)

    is_orthogonal(model.embedding.weight, 0.4 * math.sqrt(65))
    is_orthogonal(model.head.weight, 0.4 * math.sqrt(65 / 32))
    for layer, block in enumerate(model.blocks):
        is_orthogonal(block.mixer.value.weight, 1)
        is_orthogonal(block.ffn.key.weight, math.sqrt(2))
        is_orthogonal(block.mixer.output.weight, (1 + layer) ** -0.5)
        is_orthogonal(block.ffn.output.weight, (1 + layer) ** -0.5)
        for zero in (block.mixer.key, block.mixer.receptance, block.ffn.receptance):
            assert not zero.weight.any()
        for one in (block.mixer.f, block.mixer.alpha, block.mixer.beta, block.mixer.gamma):
            assert (one == 1).all()


def test_zero_curves_decay_faster_in_lower_heads():
    f = LanguageModel(model_config("rwkv1", ctx_len=64, heads=4)).blocks[0].mixer.f
    torch.testing.assert_close(f[0, 1], torch.tensor(math.exp(-(64 ** (-1 / 3)))))
    torch.testing.assert_close(f[1, 5], torch.tensor(math.exp(-5 * 64 ** (-2 / 3))))
    assert (f[3] == 1).all()
    assert (LanguageModel(model_config("rwkv1", heads=1)).blocks[0].mixer.f == 1).all()


def test_weighted_starts_with_the_same_averages():
    """W = exp(tables) has the same initial W as the decomposed form."""
    for initial in ("zero", "original"):
        plain = LanguageModel(model_config("rwkv1", initial=initial)).blocks[0].mixer
        weighted = LanguageModel(model_config("rwkv1", initial=initial, denominator="weighted")).blocks[0].mixer
        torch.testing.assert_close(weighted.f.exp(), plain.f)
        assert not weighted.alpha.any()
        assert weighted.beta is None


def test_token_shift_takes_each_group_from_its_distance():
    config = model_config("rwkv1", channels=8, heads=1, token_shift=(0.25, 0.0, 0.5), layers=1)
    x = torch.arange(1.0, 6)[None, :, None].expand(1, 5, 8)
    y, _ = TokenShift(config, 0)(x)
    assert y[0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert y[0, :, 2].tolist() == [0, 0, 0, 1, 2]
    assert y[0, :, 5].tolist() == [0, 0, 0, 1, 2]
    assert y[0, :, 6].tolist() == [1, 2, 3, 4, 5]


def test_token_shift_is_interpolated_over_the_layers():
    config = model_config("rwkv1", layers=3, token_shift=(0.5, 0.25), token_shift_top=(0.1,))
    assert [shift_fractions(config, layer) for layer in range(3)] == [
        (0.5, 0.25),
        pytest.approx((0.3, 0.125)),
        pytest.approx((0.1, 0.0)),
    ]


def test_rotary_turns_pairs_of_the_first_dims():
    x = torch.zeros(1, 1, 3, 8, dtype=torch.float64)
    x[..., 0] = x[..., 1] = x[..., 4] = 1
    y = rotary(x, torch.arange(3), 10000.0, 4)
    t, angle = 2, 2 * 10000 ** (-2 / 4)
    expected = [math.cos(t), math.cos(angle), math.sin(t), math.sin(angle), 1, 0, 0, 0]
    torch.testing.assert_close(y[0, 0, t], torch.tensor(expected, dtype=torch.float64))


def test_attention_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def score(a, b):
        return rotary(q, torch.tensor([a]), 10000.0, 8) @ rotary(k, torch.tensor([b]), 10000.0, 8).mT

    torch.testing.assert_close(score(9, 4), score(105, 100))


def test_dropout_works_in_training_only():
    model = build(model_config("rwkv1", dropout=0.5))
    x = tokens(1)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


def test_the_key_bias_has_no_gradient():
    """A constant added to a channel's k changes no output, so the bias of k has no gradient."""
    model = build(model_config("rwkv1"), noise=0.2)
    logits, _ = model(tokens(2))
    logits.square().sum().backward()
    for block in model.blocks:
        largest = block.mixer.key.weight.grad.abs().max()
        assert block.mixer.key.bias.grad.abs().max() < 1e-12 * largest


def test_every_parameter_learns():
    model = build(model_config("mha_pro"))
    logits, _ = model(tokens(2))
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        if not name.endswith("key.bias"):
            assert p.grad is not None, name
            assert p.grad.any(), name


def test_a_batch_of_no_rows(model):
    none = tokens(0)
    logits, _ = model(none)
    logits.sum().backward()
    assert logits.shape == (0, CTX, 11)
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert model(none, logits="last")[0].shape == (0, 11)
        assert model(none, resets=torch.zeros(0, CTX, dtype=torch.bool))[0].shape == (0, CTX, 11)
        logits, state = model(none, model.init_state(0))
    assert logits.shape == (0, CTX, 11)
    assert state.position.shape == (0,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"state": 3}, r"state.position has shape \(3,\); with tokens of shape \(2, 12\) it must be \(2,\)"),
        ({"state": 1}, r"state.position has shape \(1,\)"),
        ({"lengths": torch.tensor([3])}, r"lengths has shape \(1,\); .* it must be \(2,\)"),
        ({"resets": torch.zeros(CTX, dtype=torch.bool)}, r"resets has shape \(12,\); .* it must be \(2, 12\)"),
        ({"resets": torch.zeros(2, CTX, dtype=torch.int64)}, "resets is torch.int64; it must be torch.bool"),
    ],
)
def test_arguments_that_do_not_fit_the_tokens_are_refused(model, given, message):
    given = {name: model.init_state(x) if name == "state" else x for name, x in given.items()}
    with pytest.raises(ValueError, match=message):
        model(tokens(2), **given)


def test_a_mixer_of_another_architecture_is_refused():
    with pytest.raises(InvalidValue, match="rwkv1 has no field 'rotary_base'"):
        model_config("rwkv1", rotary_base=1.0)


@pytest.mark.parametrize("recompute", ["cheap", "all"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_computed_again_has_the_same_gradients(name, recompute):
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "ctx_len": 150, "layers": 2, "channels": 8, "dropout": 0.3} | heads_of(name, 2)
    model = LanguageModel(model_config(name, **sizes))
    tokens = torch.randint(7, (2, 150))
    results = []
    for how in ("none", recompute):
        model.recompute = how
        kept = 0

        def pack(x):
            nonlocal kept
            kept += x.numel()
            return x

        torch.manual_seed(1)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits, _ = model(tokens)
        logits.square().sum().backward()
        results.append((kept, [p.grad.clone() for p in model.parameters()]))
    (all_kept, plain), (fewer_kept, again) = results
    assert fewer_kept < all_kept / 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_state_has_at_least_float32(model, dtype):
    """The compiled steps write float32 numbers, also into the state of a model with weights in bfloat16."""
    expected = torch.promote_types(dtype, torch.float32)
    state = model.to(dtype).init_state(2)
    assert {x.dtype for layer in state.layers for x in layer.values()} <= {expected}


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_a_state_keeps_no_activations_in_memory(arch):
    model = build(VARIANTS[arch])
    _, state = model(tokens(2), model.init_state(2))
    for layer in state.layers:
        for name, x in layer.items():
            assert x.untyped_storage().nbytes() == x.nbytes, name
