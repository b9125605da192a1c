"""The compiled step of RWKV-5 and RWKV-6: values of the original code, the model's logits and states, equal bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.decode_steps import check_bits, check_step_equals_model
from tests.helpers.models import assert_step_close, build
from tests.helpers.original_code import Golden
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples
from timemix.generation.decode import build_step
from timemix.models.quantize import WEIGHTS
from timemix.models.registry import model_config
from timemix.models.rwkv6.decode import Rwkv6Step

ARCHS = ("rwkv5", "rwkv6")
SIZES = {
    "plain": {},
    "one layer": {"layers": 1},
    "heads of 32": {"heads": 2, "channels": 64},
    "heads of 64": {"heads": 2, "channels": 128},
    "odd sizes": {"heads": 3, "channels": 21, "ffn_ratio": 1.7},
    "narrow hidden": {"ffn_ratio": 0.1},
}
VARIANTS = {f"{arch} {name}": (arch, fields) for arch in ARCHS for name, fields in SIZES.items()} | {
    "rwkv5 without a gate, as RWKV-5.0": ("rwkv5", {"without": ("gate",)}),
    "rwkv6 odd ranks": ("rwkv6", {"mixture_rank": 5, "decay_rank": 3}),
    "rwkv6 wide ranks": ("rwkv6", {"mixture_rank": 70, "decay_rank": 33}),
}


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    found, reason = Rwkv6Step.library()
    assert found is not None, f"these tests are of the compiled step: {reason}"


def model_of(variant):
    arch, fields = VARIANTS[variant]
    sizes = {"vocab_size": 19, "layers": 3, "heads": 4, "channels": 32, "ctx_len": 16} | fields
    return build(model_config(arch), torch.float32, 0.5 * sizes["channels"] ** -0.5, **sizes)


@pytest.mark.parametrize(("variant", "rows", "weights"), pairwise(VARIANTS, [1, 2, 7], WEIGHTS))
def test_equals_the_model_in_logits_and_state(variant, rows, weights):
    check_step_equals_model(model_of(variant), rows, weights)


@pytest.mark.parametrize("case", ["", "extreme."])
@pytest.mark.parametrize("arch", ARCHS)
def test_equals_the_original_code(arch, case):
    golden = Golden(arch, torch.float32)
    golden.check_step(build_step(golden.model(case), backend="compiled"), case, golden.tolerance["extreme"])


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


@pytest.mark.parametrize("decay", [-12.0, 0.0, 0.4, 12.0])
@pytest.mark.parametrize("arch", ARCHS)
def test_decays_from_one_to_zero(arch, decay):
    """The factor exp(-exp(decay)) is 1 up to rounding, below and above 1/2, and 0."""
    model = model_of(f"{arch} heads of 32")
    with torch.no_grad():
        for block in model.blocks:
            (block.mixer.decay.bias if arch == "rwkv6" else block.mixer.decay).fill_(decay)
    tokens, counts = torch.randint(19, (60,)), torch.tensor([60])
    with torch.no_grad():
        expected, after = model(tokens[None], model.init_state(1))
    step = build_step(model, backend="compiled")
    found, state = step(tokens, model.init_state(1), torch.tensor([0]), counts, torch.arange(60))
    assert_step_close(found, expected[0], "float32")
    assert_step_close(state.layers[-1]["wkv"], after.layers[-1]["wkv"], "float32")


def test_a_wide_head_uses_the_forward_of_the_model():
    step = build_step(build(model_config("rwkv6"), torch.float32, layers=1, heads=1, channels=320))
    assert not step.compiled
    assert "needs a head size of at most 256" in step.reason
