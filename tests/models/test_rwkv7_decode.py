"""The compiled step of RWKV-7: values of the original code, the model's logits and states, bits that do not change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.decode_steps import check_bits, check_step_equals_model
from tests.helpers.models import VARIANTS as MODELS
from tests.helpers.models import assert_step_close, build
from tests.helpers.original_code import Golden
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples
from timemix.errors import InvalidValue
from timemix.generation.decode import build_step
from timemix.models.quantize import WEIGHTS
from timemix.models.registry import model_config
from timemix.models.rwkv7.decode import Rwkv7Step

VOCABULARY = 19
VARIANTS = {
    "rwkv7": {},
    "one layer": {"layers": 1},
    "heads of 32": {"heads": 2, "channels": 64},
    "heads of 64": {"heads": 2, "channels": 128},
    "odd sizes": {"heads": 3, "channels": 21, "ffn_ratio": 1.7},
    "odd ranks": {"decay_rank": 5, "rate_rank": 3, "residual_rank": 1, "gate_rank": 70},
    "narrow hidden": {"ffn_ratio": 0.1},
    "few active hidden channels": {"layers": 2, "channels": 64},
}


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    found, reason = Rwkv7Step.library()
    assert found is not None, f"these tests are of the compiled step: {reason}"


def model_of(variant):
    sizes = {"vocab_size": VOCABULARY, "layers": 3, "heads": 4, "channels": 32, "ctx_len": 16}
    fields = sizes | VARIANTS[variant]
    model = build(model_config("rwkv7"), torch.float32, fields["channels"] ** -0.5, **fields)
    if variant == "few active hidden channels":
        with torch.no_grad():
            for block in model.blocks:
                # The first channel of the input is constant, and lowers every hidden channel.
                block.ffn.mix.zero_()
                block.ffn_norm.weight[0], block.ffn_norm.bias[0] = 0, 1
                block.ffn.key.weight[:, 0] = -1.5
    return model


@pytest.mark.parametrize(("variant", "rows", "weights"), pairwise(VARIANTS, [1, 2, 7], WEIGHTS))
def test_equals_the_model_in_logits_and_state(variant, rows, weights):
    check_step_equals_model(model_of(variant), rows, weights)


def test_equals_the_original_code():
    golden = Golden("rwkv7", torch.float32)
    golden.check_step(build_step(golden.model(), backend="compiled"))


@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    weights=st.sampled_from(WEIGHTS),
    cuts=st.lists(st.tuples(st.integers(1, 23), st.integers(0, 9)), min_size=1, max_size=6),
    slot=st.integers(0, 3),
    threads=st.integers(1, 3),
)
@examples(25)
def test_bits_do_not_depend_on_pieces_company_slot_or_threads(variant, weights, cuts, slot, threads):
    torch.manual_seed(0)
    check_bits(model_of(variant), weights, cuts, slot, threads)


@pytest.mark.parametrize("position", [100, 1_000_000])
def test_a_late_position_changes_neither_bits_nor_bytes(position):
    step = build_step(model := model_of("rwkv7"), backend="compiled")
    early, late, slots = model.init_state(1), model.init_state(1), torch.tensor([0])
    late.position += position
    for token in torch.randint(VOCABULARY, (5, 1)):
        expected, early = step(token, early, slots)
        found, late = step(token, late, slots)
        assert found.equal(expected)
    assert late.position.item() == position + 5
    assert late.nbytes == early.nbytes
    assert step.looks_back(position) == 0


def test_the_variant_with_few_active_hidden_channels_has_few():
    """The step then leaves out weights, with one row and with blocks of several rows."""
    model, shares = model_of("few active hidden channels"), []
    for block in model.blocks:
        block.ffn.key.register_forward_hook(lambda module, given, found: shares.append((found[0] > 0).float()))
    with torch.no_grad():
        model(torch.randint(VOCABULARY, (1, 60)))
    for active in shares:
        assert 0 < active.mean() < 0.2
        assert active.view(-1, 6, active.shape[1]).amax(1).mean() < 0.6


def test_keys_without_direction_give_no_nan():
    """A key of zeros has no direction: q is zero, as in the model."""
    model = model_of("heads of 32")
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.removal.zero_()
    tokens, state = torch.randint(VOCABULARY, (6,)), model.init_state(1)
    with torch.no_grad():
        expected, _ = model(tokens[None], model.init_state(1))
    slots, counts = torch.tensor([0]), torch.tensor([6])
    found, _ = build_step(model, backend="compiled")(tokens, state, slots, counts, torch.arange(6))
    assert_step_close(found, expected[0], "float32")


def test_a_wrong_call_changes_nothing():
    step = build_step(model := model_of("rwkv7"), backend="compiled")
    state = model.init_state(2)
    with pytest.raises(InvalidValue, match="token 19 is outside the vocabulary of 19"):
        step(torch.tensor([1, 19]), state, torch.tensor([0, 1]))
    with pytest.raises(InvalidValue, match="rows holds an index outside 0 to 1"):
        step(torch.tensor([1, 2]), state, torch.tensor([0, 2]))
    assert state.position.tolist() == [0, 0]
    assert all(not x.any() for layer in state.layers for x in layer.values())


@pytest.mark.parametrize(
    ("dtype", "fields", "words"),
    [
        (torch.float64, {}, "not torch.float64"),
        (torch.float32, {"heads": 1, "channels": 320}, "needs a head size of at most 256"),
    ],
)
def test_unsupported_models_use_their_forward_with_a_reason(dtype, fields, words):
    step = build_step(build(MODELS["rwkv7"], dtype, layers=1, **fields))
    assert not step.compiled
    assert words in step.reason
