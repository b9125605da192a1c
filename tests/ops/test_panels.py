"""Linear maps in panels (panels.h): products in each format, for any size, with equal bits for any number of rows."""

import ctypes
import platform

import pytest
import torch

from timemix.models.quantize import WEIGHTS, dequantized, quantized, quantized_in_groups
from timemix.models.step_memory import Parameters
from timemix.runtime.native import library, passed

SOURCE = """
#include "ops/common/panels.h"
int64_t timemix_panel(void) { return PANEL; }
int rounds(void) { return ROUNDS(BFLOAT16); }
void multiply_all(const linear *l, const float *x, float *y, int64_t rows) {
#pragma omp parallel
    multiply(l, x, y, rows);
}
"""
# -mno-avx512f selects the code for AVX2, and -mno-avx selects the code for all other processors.
PROCESSORS = [(), ("-mno-avx512f",), ("-mno-avx",)] if platform.machine() == "x86_64" else [()]


@pytest.fixture(scope="module", params=PROCESSORS, ids=lambda flags: " ".join(flags) or "native")
def code(request, tmp_path_factory):
    source = tmp_path_factory.mktemp("panels") / "panels.c"
    source.write_text(SOURCE)
    found, reason = library(source, *request.param)
    assert found is not None, reason
    return found


def product(code, weight, bias, x, weights):
    parameters = Parameters(weights, code.timemix_panel())
    y = torch.full((len(x), len(weight)), torch.nan)
    given = (parameters.panels(weight, bias, weights), x, y)
    code.multiply_all(*map(passed, given), ctypes.c_int64(len(x)))
    return y


def exact(weight, weights):
    if weights == "int4":
        return dequantized(*quantized_in_groups(weight)).double()
    if weights == "int8":
        integers, scale = quantized(weight)
        return integers.double() * scale[:, None].double()
    return (weight.bfloat16() if weights == "bfloat16" else weight).double()


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (64, 32), (70, 33), (31, 7), (130, 100)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_products_equal_those_in_float64(code, outputs, inputs, weights):
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(13, inputs)
    weight[0] = 0
    weight[-1, 0] = 1e4
    found = product(code, weight, bias, x, weights)
    if weights == "bfloat16" and code.rounds():
        x = x.bfloat16().float()
    expected = x.double() @ exact(weight, weights).T + bias.double()
    size = x.double().abs() @ exact(weight, weights).abs().T + bias.double().abs()
    assert ((found - expected).abs() <= 1e-6 * size).all()
    without = product(code, weight, None, x, weights)
    torch.testing.assert_close(without.double(), expected - bias.double(), atol=float(1e-6 * size.max()), rtol=0)


def test_bfloat16_products_are_chains_of_multiply_adds(code):
    """The instruction for two products rounds after each of them, in the order of the inputs."""
    weight, x = torch.randn(70, 101).bfloat16().float(), torch.randn(7, 101).bfloat16().float()
    expected = torch.zeros(7, 70)
    for i in range(101):
        # The product of two bfloat16 numbers is exact in float32.
        expected = expected + x[:, i, None] * weight[:, i]
    assert product(code, weight, None, x, "bfloat16").equal(expected)


def test_bfloat16_products_are_those_in_float32_of_inputs_that_the_instruction_rounds(code):
    weight, x = torch.randn(70, 101).bfloat16().float(), torch.randn(7, 101)
    same = x.bfloat16().float() if code.rounds() else x
    assert product(code, weight, None, x, "bfloat16").equal(product(code, weight, None, same, "float32"))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_bits_of_a_row_do_not_depend_on_other_rows(code, weights):
    weight, x = torch.randn(70, 100), torch.randn(13, 100)
    together = product(code, weight, None, x, weights)
    for rows in range(1, 13):
        assert product(code, weight, None, x[:rows].contiguous(), weights).equal(together[:rows])
        assert product(code, weight, None, x[rows:].contiguous(), weights).equal(together[rows:])


def test_panels_follow_one_another_in_memory():
    parameters = Parameters("float32", 64)
    # The last weight is larger than the memory that is reserved at a time.
    weights = torch.randn(70, 33), torch.randn(31, 7), torch.randn(64, 2**17)
    first, second, third = (parameters.panels(weight, None, "float32") for weight in weights)
    assert first.weight % 64 == 0
    assert second.weight == first.weight + 4 * 128 * 33
    size = weights[2].numel()
    # (64, inputs) -> (inputs, PANEL)
    assert torch.frombuffer((ctypes.c_float * size).from_address(third.weight), dtype=torch.float32).equal(
        weights[2].t().flatten()
    )
