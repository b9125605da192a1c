"""The memory that recurrences keep for the backward pass is linear in the number of tokens."""

import pytest
import torch

from tests.helpers.operators import bytes_kept
from timemix.ops.rwkv4 import wkv4
from timemix.ops.rwkv6 import wkv6
from timemix.ops.rwkv7 import wkv7
from timemix.ops.rwkv7.time_mix import Products, Vectors, time_mix

B, H, N = 1, 2, 8
STATE = (B, H, N, N)


def arguments(*shapes):
    """Draw arguments from -0.9 to -0.1, in the range of a log-decay."""
    return [(-0.1 - 0.8 * torch.rand(shape)).requires_grad_() for shape in shapes]


def whole_time_mix(T):
    products, vectors = arguments(*[(B, T, H * N)] * 7), arguments(*[(H * N,)] * 8)
    first, state = arguments((B, T, H * N), STATE)
    return time_mix(Products(*products), Vectors(*vectors), first, state, 64e-5)[0]


def recurrence(op, shapes):
    """Return a function of the number of tokens and the backend that computes y."""
    return lambda T, backend: op(*arguments(*shapes(T)), backend=backend)[0]


OPS = {
    "wkv4": recurrence(wkv4, lambda T: ((N,), (N,), (B, T, N), (B, T, N))),
    "wkv6": recurrence(wkv6, lambda T: (*[(B, T, H, N)] * 4, (H, N), STATE)),
    "wkv6, one decay": recurrence(wkv6, lambda T: ((B, T, H, N), (H, N), *[(B, T, H, N)] * 2, (H, N), STATE)),
    "wkv7": recurrence(wkv7, lambda T: (*[(B, T, H, N)] * 6, STATE)),
}


def assert_linear(kept):
    """Check that the bytes kept for T tokens grow at most like T, and include the keys and values."""
    short, long = (bytes_kept(lambda T=T: kept(T)) for T in (256, 2048))
    assert short >= 2 * B * 256 * N * 4
    assert long <= 8.1 * short


@pytest.mark.parametrize("backend", ["c", "chunked"])
@pytest.mark.parametrize("name", OPS)
def test_the_memory_of_a_recurrence_is_linear(name, backend):
    assert_linear(lambda T: OPS[name](T, backend))


def test_the_memory_of_the_time_mix_of_rwkv7_is_linear():
    assert_linear(whole_time_mix)


def test_a_matrix_of_all_positions_is_found():
    """A softmax over all pairs of positions keeps T * T numbers."""

    def pairs(T):
        q, k, v = arguments(*[(T, N)] * 3)
        return torch.softmax(q @ k.T, -1) @ v

    with pytest.raises(AssertionError, match="8.1"):
        assert_linear(pairs)
