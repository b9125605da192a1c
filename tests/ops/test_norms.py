"""LayerNorm with mixtures of neighbouring tokens in C: values and gradients agree with PyTorch's."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.helpers.tiers import examples
from timemix.models.layers.token_shift import previous_token
from timemix.ops.common import fused
from timemix.ops.common.norms import norm_mixtures

pytestmark = pytest.mark.skipif(not fused.available(), reason="no C compiler on this machine")

EPS = 1e-5


def drawn(B, T, C, count, *, with_last, scale=1.0):
    """Return x, weight, bias, the shares of the previous token, and the token before x or None."""
    # Nearly equal channels would leave few digits of their differences, here as in PyTorch.
    x = (torch.randn(B, T, C) + 8 * (-1.0) ** torch.arange(C)) * scale
    last = torch.randn(B, 1, C) if with_last else None
    return [x, torch.randn(C), torch.randn(C), [torch.rand(C) for _ in range(count)], last]


def in_torch(x, weight, bias, mixes, last, resets=None):
    y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    previous, _ = previous_token(y, last, None, resets)
    return tuple(y + (previous - y) * mix for mix in mixes)


def in_c(x, weight, bias, mixes, last, dtype=torch.float32, resets=None):
    return norm_mixtures(x, weight, bias, EPS, tuple(mixes), last, dtype, resets)


def results(function, x, weight, bias, mixes, last, dtype=torch.float32):
    """Return the mixtures, then the gradients of all arguments, for a random gradient of the mixtures."""
    x, weight, bias, *mixes = (each.clone().to(dtype).requires_grad_() for each in (x, weight, bias, *mixes))
    last = None if last is None else last.clone().to(dtype).requires_grad_()
    y = function(x, weight, bias, mixes, last)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(each.shape, generator=generator).bfloat16().to(each.dtype) for each in y]
    leaves = [x, weight, bias, *mixes, *([] if last is None else [last])]
    return [*(each.detach() for each in y), *torch.autograd.grad(y, leaves, gradients)]


@examples(80)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    C=st.integers(1, 40),
    count=st.integers(1, 6),
    with_last=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    share=st.sampled_from([None, 0.1, 0.9]),
    seed=st.integers(0, 99),
)
def test_mixtures_of_any_size(B, T, C, count, with_last, scale, share, seed):
    torch.manual_seed(seed)
    arguments = drawn(B, T, C, count, with_last=with_last, scale=scale)
    resets = None if share is None else torch.rand(B, T) < share
    found = results(partial(in_c, resets=resets), *arguments)
    expected = results(partial(in_torch, resets=resets), *arguments, torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=3e-5 * max(1, other.abs().max()), rtol=1e-4)


def test_arguments_of_another_shape_are_refused():
    x, share = torch.randn(2, 5, 8), torch.rand(8)
    numbers = (torch.ones(8), torch.zeros(8), 1e-5, (share,))
    for last, resets, message in (
        (torch.zeros(1, 1, 8), None, r"last has shape \(1, 1, 8\); .* it must be \(2, 1, 8\)"),
        (None, torch.zeros(2, 4, dtype=torch.bool), r"resets has shape \(2, 4\); .* it must be \(2, 5\)"),
        (None, torch.zeros(2, 5), "resets is torch.float32; it must be torch.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            norm_mixtures(x, *numbers, last, torch.float32, resets)


def test_rows_of_equal_channels():
    """The variance is 0, so only eps is left in the denominator."""
    arguments = drawn(2, 5, 12, 3, with_last=False)
    arguments[0] = torch.arange(10.0).view(2, 5, 1).expand(2, 5, 12)
    for one, other in zip(results(in_c, *arguments), results(in_torch, *arguments, torch.float64), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)


def test_bfloat16_mixtures_are_those_of_float32_rounded():
    arguments = drawn(2, 33, 24, 6, with_last=True)
    wide = results(in_c, *arguments)
    narrow = results(lambda *given: in_c(*given, torch.bfloat16), *arguments)
    for one, other in zip(narrow, wide, strict=True):
        assert torch.equal(one, other.to(one.dtype))


def test_bits_do_not_depend_on_the_threads():
    arguments, before, found = drawn(3, 37, 20, 4, with_last=True), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 20):
            torch.set_num_threads(threads)
            found.append(results(in_c, *arguments))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_what_is_not_a_number_stays_so():
    x, *others = drawn(1, 3, 4, 2, with_last=False)
    x[0, 1, 2] = torch.nan
    for y in in_c(x, *others):
        assert y[0, 1:].isnan().all()
        assert not y[0, 0].isnan().any()
