"""Custom operators: one form for the compiler and selective recomputation, and one without importing the compiler."""

import pytest
import torch
from torch import Tensor, nn

from timemix.models.layers.recompute import recomputed
from timemix.ops.common.operators import operator

CALLS = []


# Selective recomputation stores the outputs of operators with this prefix.
@operator("timemix::causal_convolution_of_tests")
def scaled(x: Tensor, factor: float) -> Tensor:
    CALLS.append(factor)
    return x * factor


scaled.register_fake(lambda x, factor: torch.empty_like(x))
scaled.register_autograd(
    lambda ctx, gradient: (gradient * ctx.factor, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
)


def test_gradients_do_not_come_from_the_custom_operator(monkeypatch):
    monkeypatch.setattr(scaled, "custom", lambda *arguments: pytest.fail("it imports the compiler"))
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(scaled(x, 3.0).square().sum(), x)
    assert torch.equal(gradient, torch.tensor([18.0, 36.0]))
    parameter = nn.Parameter(x.detach())
    scaled(parameter, 3.0).sum().backward()
    assert torch.equal(parameter.grad, torch.tensor([3.0, 3.0]))


@pytest.mark.slow
def test_in_a_compiled_function_it_is_the_custom_operator():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    graphs = []
    compiled = torch.compile(lambda x: scaled(x, 3.0).sum(), backend=lambda graph, _: graphs.append(graph) or graph)
    (gradient,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(gradient, torch.tensor([3.0, 3.0]))
    assert "causal_convolution_of_tests" in graphs[0].code


class Block(nn.Module):
    def forward(self, x, state, carry, position, lengths):
        return scaled(x.sin(), 3.0).sin(), None, carry


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("cheap", 1), ("all", 2)])
def test_selective_recomputation_keeps_its_result(recompute, times):
    CALLS.clear()
    x = torch.tensor([0.5], requires_grad=True)
    recomputed(Block(), x, None, recompute)[0].backward()
    torch.testing.assert_close(x.grad, (3 * x.sin()).cos() * 3 * x.cos())
    assert len(CALLS) == times
