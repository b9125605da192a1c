"""Set-up of all tests: one thread, since `make test` runs a process per core, and no shared state between tests."""

import os

import pytest
import torch
from hypothesis import settings

from tests.helpers.tiers import ALL, FAST_EXAMPLES

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Default settings of hypothesis.
settings.register_profile("timemix", max_examples=100 if ALL else 2 * FAST_EXAMPLES, deadline=None)
settings.load_profile("timemix")


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)
