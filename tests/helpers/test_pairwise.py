"""The cover of a product of parameters: complete and small, with the rest of the product marked as slow."""

import itertools

import pytest

from tests.helpers.pairwise import covering, pairwise


@pytest.mark.parametrize("sizes", [(1,), (3,), (2, 3), (3, 2, 2), (6, 3, 2, 3), (4, 4, 4)])
@pytest.mark.parametrize("strength", [1, 2])
def test_every_combination_is_covered_by_few_rows(sizes, strength):
    rows = covering(sizes, strength)
    assert len(set(rows)) == len(rows)
    for places in itertools.combinations(range(len(sizes)), min(strength, len(sizes))):
        found = {tuple(row[i] for i in places) for row in rows}
        assert found == set(itertools.product(*(range(sizes[i]) for i in places)))
    largest = sorted(sizes)[-strength:]
    least = largest[0] * (largest[-1] if len(largest) > 1 else 1)
    assert least <= len(rows) <= 1.5 * least
    assert rows == covering(sizes, strength)


def test_rows_outside_the_cover_are_slow():
    rows = pairwise("ab", [1, 2, 3], [True, False])
    assert [row.values for row in rows] == list(itertools.product("ab", [1, 2, 3], [True, False]))
    fast = [row for row in rows if not row.marks]
    assert 6 <= len(fast) <= 8
    assert rows[0].id == "a-1-True"
    assert all(row.marks[0].name == "slow" for row in rows if row.marks)
