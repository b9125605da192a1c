"""The choice of a device: a device that the machine lacks gives one short sentence."""

import pytest
import torch

from timemix.errors import Unavailable
from timemix.runtime.device import choose_device


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        pytest.param(
            "mps",
            "this PyTorch was built without mps; use auto or cpu",
            marks=pytest.mark.skipif(torch.backends.mps.is_built(), reason="there may be one"),
        ),
        ("xla", "this PyTorch was built without xla; use auto or cpu"),
        ("hpu", "No module named 'torch.hpu'; use auto or cpu"),
        ("meta", "Tensor.item() cannot be called on meta tensors; use auto or cpu"),
        ("gpu9", "PyTorch does not know it; use auto, cpu, cuda or cuda:1"),
        ("cuda:-1", "PyTorch does not know it; use auto, cpu, cuda or cuda:1"),
        ("", "PyTorch does not know it; use auto, cpu, cuda or cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_one_short_sentence(device, reason):
    with pytest.raises(Unavailable) as error:
        choose_device(device)
    assert str(error.value) == f"device {device!r} cannot be used: {reason}"
