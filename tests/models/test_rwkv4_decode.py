"""The compiled step of RWKV-4: values of the original code, the model's logits and states, bits that do not change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.decode_steps import check_bits, check_step_equals_model
from tests.helpers.models import build
from tests.helpers.original_code import Golden
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples
from timemix.generation.decode import build_step
from timemix.models.quantize import WEIGHTS
from timemix.models.registry import model_config
from timemix.models.rwkv4.decode import Rwkv4Step

VARIANTS = {
    "rwkv4": {},
    "one layer": {"layers": 1},
    "odd sizes": {"channels": 21, "ffn_ratio": 1.7},
    "two blocks of channels": {"channels": 100},
    "narrow hidden": {"ffn_ratio": 0.1},
}


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    found, reason = Rwkv4Step.library()
    assert found is not None, f"these tests are of the compiled step: {reason}"


def model_of(variant):
    sizes = {"vocab_size": 19, "layers": 3, "channels": 32, "ctx_len": 16} | VARIANTS[variant]
    return build(model_config("rwkv4"), torch.float32, sizes["channels"] ** -0.5, **sizes)


@pytest.mark.parametrize(("variant", "rows", "weights"), pairwise(VARIANTS, [1, 2, 7], WEIGHTS))
def test_equals_the_model_in_logits_and_state(variant, rows, weights):
    check_step_equals_model(model_of(variant), rows, weights)


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


@pytest.mark.parametrize("case", ["", "extreme."])
def test_equals_the_original_code(case):
    golden = Golden("rwkv4", torch.float32)
    golden.check_step(build_step(golden.model(case), backend="compiled"), case, tolerance=2e-5)
