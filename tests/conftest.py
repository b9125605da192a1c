"""Shared by all tests: two threads, no leftovers between tests."""

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)
