"""Second derivatives: refused where the backward pass is C code, and correct in PyTorch."""

import pytest
import torch

from timemix.errors import Unavailable
from timemix.models.language_model import LanguageModel
from timemix.models.registry import model_config
from timemix.ops.rwkv4 import wkv4
from timemix.ops.rwkv6 import wkv6
from timemix.ops.rwkv7 import wkv7

B, T, H, N = 1, 3, 1, 2
TOKENS, STATE = (B, T, H, N), (B, H, N, N)
OPS = {
    "wkv4": (wkv4, ((N,), (N,), (B, T, N), (B, T, N), (B, 3, N))),
    "wkv6": (wkv6, (*[TOKENS] * 4, (H, N), STATE)),
    "wkv7": (wkv7, (*[TOKENS] * 6, STATE)),
}
"""Each op, and the shapes of its arguments."""


def inputs(name, dtype):
    """Draw arguments from -0.9 to -0.1, in the range of a log-decay. The weights of a state of wkv4 are positive."""
    found = [-0.1 - 0.8 * torch.rand(shape, dtype=dtype) for shape in OPS[name][1]]
    if name == "wkv4":
        found[-1][:, 1].neg_()
    return [x.requires_grad_() for x in found]


@pytest.mark.parametrize(("name", "backend"), [("wkv4", "c"), ("wkv6", "c"), ("wkv7", "c"), ("wkv7", "chunked")])
def test_ops_without_second_derivatives_refuse_them(name, backend):
    """The incoming gradient of a sum requires no gradient, so PyTorch itself would return zeros."""
    op, arguments = OPS[name][0], inputs(name, torch.float32)
    y, _ = op(*arguments, backend=backend)
    words = "no second derivatives; leave out create_graph=True .recurrences have .* with backend='reference'"
    with pytest.raises(Unavailable, match=words):
        torch.autograd.grad(y.sum(), arguments, create_graph=True)


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "reference") for name in OPS] + [(name, "chunked") for name in ("wkv4", "wkv6")],
)
def test_ops_in_pytorch_have_second_derivatives(name, backend):
    op, arguments = OPS[name][0], inputs(name, torch.float64)

    def y(*x):
        return op(*x, backend=backend)[0]

    assert torch.autograd.gradgradcheck(y, arguments)


@pytest.mark.parametrize("arch", ["rwkv1", "rwkv4", "rwkv6", "rwkv7"])
def test_models_with_c_code_refuse_second_derivatives(arch):
    sizes = {"vocab_size": 11, "ctx_len": 12, "layers": 1, "channels": 16}
    heads = {} if arch == "rwkv4" else {"heads": 2}
    model = LanguageModel(model_config(arch, **sizes, **heads))
    logits, _ = model(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(Unavailable, match="no second derivatives"):
        torch.autograd.grad(logits.sum(), tuple(model.parameters()), create_graph=True, allow_unused=True)
