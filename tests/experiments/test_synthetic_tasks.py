"""The answers of synthetic tasks, against brute force, and the batches of training and tests."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tiers import examples
from timemix.experiments import synthetic_tasks
from timemix.experiments.synthetic_tasks import (
    DEEPEST,
    IGNORED,
    KEYS,
    LETTERS,
    PREFIX,
    TASKS,
    VALUES,
    held_out_batch,
    permutations_of,
    training_batch,
)

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def rows_of(name, size, seed):
    inputs, targets = TASKS[name].make(np.random.default_rng(seed), 3, size)
    assert inputs.shape == targets.shape == (3, TASKS[name].length(size))
    assert inputs.min() >= 0
    assert max(inputs.max(), targets.max()) < TASKS[name].vocab_size
    return zip(inputs.tolist(), targets.tolist(), strict=True)


@given(sizes, seeds)
@examples(50)
def test_a_query_asks_for_the_value_of_its_key(size, seed):
    for inputs, targets in rows_of("recall", size, seed):
        values = dict(zip(inputs[0 : 2 * size : 2], inputs[1 : 2 * size : 2], strict=True))
        assert sorted(values) == sorted(inputs[2 * size :])
        assert len(values) == size
        assert max(values) < KEYS
        assert targets == [IGNORED] * 2 * size + [values[key] for key in inputs[2 * size :]]


@given(sizes, seeds)
@examples(50)
def test_running_sums(size, seed):
    for name, modulus in (("parity", 2), ("mod5", 5)):
        for inputs, targets in rows_of(name, size, seed):
            assert targets == [sum(inputs[: t + 1]) % modulus for t in range(size)]


@pytest.mark.parametrize(("name", "elements"), [("s3", 3), ("s5", 5)])
@given(sizes, seeds)
@examples(25)
def test_running_products_move_objects_like_their_factors_in_turn(name, elements, size, seed):
    table = permutations_of(elements).tolist()
    for inputs, targets in rows_of(name, size, seed):
        where = list(range(elements))
        for token, answer in zip(inputs, targets, strict=True):
            where = [table[token][place] for place in where]
            assert table[answer] == where


def test_permutations_of_three_do_not_commute():
    assert len(set(map(tuple, permutations_of(5).tolist()))) == 120
    inputs, targets = TASKS["s3"].make(np.random.default_rng(1), 2000, 2)
    products = {tuple(pair): answer for pair, answer in zip(inputs.tolist(), targets[:, 1].tolist(), strict=True)}
    assert len(products) == 36
    assert any(products[i, j] != products[j, i] for i, j in products)
    # Each row of a group's table has every element once.
    assert all(len({products[i, j] for j in range(6)}) == 6 for i in range(6))


@given(st.integers(1, 120), seeds)
@examples(50)
def test_bracket_depth_counts_open_brackets(size, seed):
    for inputs, targets in rows_of("brackets", size, seed):
        text = "".join("()"[token] for token in inputs)
        assert targets == [text[: t + 1].count("(") - text[: t + 1].count(")") for t in range(size)]
        assert min(targets) >= 0
        assert max(targets) <= DEEPEST


@given(sizes, seeds)
@examples(50)
def test_copies_follow_the_separator(size, seed):
    for name, step in (("copy", 1), ("reverse", -1)):
        for inputs, targets in rows_of(name, size, seed):
            assert inputs[size] == LETTERS
            assert targets == [IGNORED] * size + inputs[:size][::step]
            # The next input is the answer of this position, as in text.
            assert inputs[size + 1 :] == targets[size:-1]


@given(sizes, seeds)
@examples(50)
def test_the_needle_is_at_its_distance(size, seed):
    for inputs, targets in rows_of("needle", size, seed):
        first, second = (i for i, token in enumerate(inputs) if token == VALUES)
        assert 0 <= first <= PREFIX
        assert second - size == first + 1
        answers = {i: token for i, token in enumerate(targets) if token != IGNORED}
        assert answers == {second: inputs[first + 1]}


def test_neither_place_nor_kind_gives_the_needle_away():
    inputs, targets = TASKS["needle"].make(np.random.default_rng(0), 4000, 16)
    answers = targets.max(1)
    # The answer at any one position is the value there only by chance, or if the marker is before it in 1 of 9 rows.
    right = (inputs == answers[:, None]).mean(0)
    assert right.max() < 1 / 9 + 1 / VALUES + 0.03


def test_a_guess_knows_only_which_answers_are_frequent():
    for name, share in (("parity", 1 / 2), ("mod5", 1 / 5), ("s3", 1 / 6), ("s5", 1 / 120)):
        assert TASKS[name].guess(16) == pytest.approx(share, abs=0.01)
    # With one pair, the only value is the answer. With two, a guess is right in half of the cases, or more if equal.
    assert TASKS["recall"].guess(1) == 1
    assert TASKS["recall"].guess(2) == pytest.approx(1 / 2 + 1 / 2 / VALUES, abs=0.005)
    # The depth is 1 after 1 bracket, and 0 or 2 after 2 brackets. Of two answers, only the second counts.
    assert TASKS["brackets"].guess(1) == 1
    assert TASKS["brackets"].guess(2) == pytest.approx(1 / 2, abs=0.01)


def test_long_sequences_with_few_answers_are_guessed_in_several_batches(monkeypatch):
    known = TASKS["needle"].guess(64)
    monkeypatch.setattr(synthetic_tasks, "GUESSED_TOKENS", 2**12)
    # A batch has 54 answers, a standard deviation of 0.036; all batches together have 4096 answers, and 0.004.
    assert TASKS["needle"].guess(64) == pytest.approx(known, abs=0.016)


def test_batches_depend_on_seed_and_step_alone():
    task = TASKS["recall"]
    batches = [training_batch(task, 4, 8, seed, step, 100) for seed, step in ((1, 60), (1, 60), (1, 61), (2, 60))]
    first, same, *others = (inputs.tolist() for inputs, _ in batches)
    assert first == same
    assert first not in others
    assert held_out_batch(task, 4, 8, 1)[0].tolist() not in (first, *others)


def test_the_largest_size_grows_in_the_first_half_of_a_run():
    sizes = [training_batch(TASKS["recall"], 1, 4, 1, step, 400)[0].shape[1] // 3 for step in range(400)]
    parts = [sizes[:50], sizes[50:100], sizes[100:150], sizes[150:200], sizes[200:]]
    assert [set(part) for part in parts] == [{1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4}, {1, 2, 3, 4}]
    assert training_batch(TASKS["copy"], 1, 8, 1, 0, 1)[0].shape[1] in range(2, 17)


def test_of_running_answers_the_second_half_counts():
    _, targets = held_out_batch(TASKS["parity"], 5, 8, 1)
    assert (targets[:, :4] == IGNORED).all()
    assert (targets[:, 4:] != IGNORED).all()
    assert training_batch(TASKS["parity"], 5, 8, 1, 0, 10)[0].shape == (5, 8)
    assert (training_batch(TASKS["parity"], 5, 8, 1, 0, 10)[1] != IGNORED).all()
