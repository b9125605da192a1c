"""int4: the rounding of a weight, and the formats of the layers of a rounded model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.helpers.models import VARIANTS, build
from tests.helpers.tiers import examples
from timemix.models.quantize import GROUP, LEVELS, dequantized, quantized, quantized_in_groups, rounded


def relative_error(rounded_weight, weight):
    return float((rounded_weight.double() - weight).square().sum() / weight.double().square().sum())


def in_sixteen_equal_steps(weight):
    """Round as Q4_0 of ggml: the number of largest magnitude is -8 steps, and the codes are whole numbers from -8."""
    groups = weight.view(len(weight), -1, GROUP)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    step = largest / -8
    codes = (groups / step + 8.5).floor().clamp(0, 15) - 8
    return (codes * step.half().float()).view_as(weight)


@given(st.integers(1, 9), st.integers(1, 100), st.floats(1e-3, 1e3), st.integers(0, 1000))
@examples(50)
def test_every_code_is_the_nearest_level(outputs, inputs, spread, seed):
    weight = spread * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    codes, scale = quantized_in_groups(weight)
    assert (codes.shape, codes.dtype) == ((outputs, inputs), torch.uint8)
    assert (scale.shape, scale.dtype) == ((outputs, -(-inputs // GROUP)), torch.bfloat16)
    found = dequantized(codes, scale)
    own = scale.float().repeat_interleave(GROUP, 1)[:, :inputs, None]
    best = (own * torch.tensor(LEVELS) - weight[..., None]).abs().amin(-1)
    # A weight within half a unit of the middle between two levels can get either level.
    assert ((found - weight).abs() <= best + own.abs()[..., 0] * 1.01).all()


def test_the_error_is_less_than_with_equal_steps():
    weight = torch.randn(256, 256)
    found = dequantized(*quantized_in_groups(weight))
    assert relative_error(found, weight) < 0.8 * relative_error(in_sixteen_equal_steps(weight), weight)


def test_no_other_scale_has_a_much_smaller_error():
    weight = torch.randn(200, GROUP)
    error = (dequantized(*quantized_in_groups(weight)) - weight).square().sum(1)
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    least = torch.full((200,), torch.inf)
    for share in torch.linspace(0.5, 1.5, 200):
        for sign in (1, -1):
            scale = sign * share * weight.abs().amax(1, keepdim=True) / 127
            nearest = levels[(weight[..., None] / scale[..., None] - levels).abs().argmin(-1)]
            least = torch.minimum(least, (nearest * scale - weight).square().sum(1))
    assert error.sum() < 1.02 * least.sum()


def test_weights_of_value_zero_stay_zero():
    weight = torch.randn(5, 70)
    weight[:, ::3] = 0
    weight[2] = 0
    found = dequantized(*quantized_in_groups(weight))
    assert (found[weight == 0] == 0).all()
    assert (found[weight.abs() > 0.5] != 0).all()


def test_multiples_of_the_levels_are_exact():
    weight = torch.tensor([LEVELS, LEVELS[::-1]], dtype=torch.float32).repeat(1, 2) * torch.tensor([[0.25], [-3.0]])
    assert dequantized(*quantized_in_groups(weight)).equal(weight)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e35])
def test_an_outlier_costs_only_its_own_group(size):
    weight = size * torch.randn(4, 3 * GROUP)
    weight[:, 40] = 100 * size
    found = dequantized(*quantized_in_groups(weight))
    assert found.isfinite().all()
    assert found[:, 40].sub(weight[:, 40]).abs().max() < size
    assert relative_error(found[:, :GROUP], weight[:, :GROUP]) < 0.02
    assert relative_error(found[:, 2 * GROUP :], weight[:, 2 * GROUP :]) < 0.02


def test_int4_keeps_the_head_in_int8():
    model = build(VARIANTS["rwkv1"], torch.float32)
    found = rounded(model, "int4")
    integers, scale = quantized(model.head.weight)
    assert found.head.weight.equal(integers * scale[:, None])
    own, exact = found.blocks[0].mixer.key.weight, model.blocks[0].mixer.key.weight
    assert own.equal(dequantized(*quantized_in_groups(exact)))
    assert not own.equal(exact)
    assert found.embedding.weight.equal(model.embedding.weight)
    tokens = torch.tensor([[1, 2, 3]])
    assert F.mse_loss(found(tokens)[0], model(tokens)[0]) > 0
