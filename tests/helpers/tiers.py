"""Two tiers: `make test` runs few examples of each property, `make test-all` (TIMEMIX_TESTS=all) runs all of them."""

import os
from typing import Any

import pytest
from hypothesis import settings

ALL = os.environ.get("TIMEMIX_TESTS") == "all"
FAST_EXAMPLES = 25


def examples(full: int, *, fast: int = FAST_EXAMPLES, **others: Any) -> settings:
    """Return settings of hypothesis: `full` examples in `make test-all`, at most `fast` in `make test`."""
    return settings(max_examples=full if ALL else min(full, fast), deadline=None, **others)


def slow(*values: Any, **options: Any) -> Any:
    """Return a row of parameters that runs in `make test-all` only."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
