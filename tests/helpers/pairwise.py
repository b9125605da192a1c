"""Products of test parameters: the fast tier runs a small part that covers them, `make test-all` runs the rest."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

Row = tuple[int, ...]


def covering(sizes: Sequence[int], strength: int = 2) -> list[Row]:
    """Return index rows that contain every combination of values of each `strength` parameters at least once.

    Greedy and deterministic: each step takes the first row of the product with the most uncovered combinations.

    Args:
        sizes: Number of values of each parameter.
        strength: 1 covers each value, 2 each pair of values of two parameters.
    """
    places = list(itertools.combinations(range(len(sizes)), min(strength, len(sizes))))

    def parts(row: Row) -> set[tuple[Row, Row]]:
        return {(place, tuple(row[i] for i in place)) for place in places}

    rows = list(itertools.product(*map(range, sizes)))
    uncovered = set().union(*map(parts, rows))
    chosen = []
    while uncovered:
        best = max(rows, key=lambda row: (len(parts(row) & uncovered), _spread(row, chosen)))
        chosen.append(best)
        uncovered -= parts(best)
    return chosen


def _spread(row: Row, chosen: list[Row]) -> int:
    """Prefer values that were chosen least, so that a cover of strength 1 does not repeat its last values."""
    return -sum(row[i] == other[i] for other in chosen for i in range(len(row)))


def pairwise(*parameters: Iterable[Any], strength: int = 2) -> list[Any]:
    """Return the product of parameters for `pytest.mark.parametrize`; rows outside the cover are marked `slow`.

    Args:
        parameters: Values of each parameter. Their `str` names the test.
        strength: As for `covering`.
    """
    values = [list(each) for each in parameters]
    fast = set(covering([len(each) for each in values], strength))
    found = []
    for row in itertools.product(*(range(len(each)) for each in values)):
        chosen = [each[i] for each, i in zip(values, row, strict=True)]
        marks = () if row in fast else (pytest.mark.slow,)
        found.append(pytest.param(*chosen, marks=marks, id="-".join(map(str, chosen))))
    return found
