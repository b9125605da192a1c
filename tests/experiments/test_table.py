"""Statistics and verdicts: agreement with published values and definitions; text of the table."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from timemix.experiments.spec import Verdict
from timemix.experiments.table import Row, Table, judge, point_words, tuning_rows, verdict_rows, warnings
from timemix.reporting.markdown import markdown_table, mean_and_deviation
from timemix.reporting.statistics import interval, paired_difference, t_quantile, verdict_word, verdict_words


# Student's t, two-sided 95 %, from Abramowitz and Stegun 26.10.
@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_t_quantile(degrees, t):
    assert t_quantile(0.975, degrees) == pytest.approx(t, abs=6e-4)
    assert t_quantile(0.95, 10) == pytest.approx(1.812, abs=6e-4)


def test_the_interval_of_a_hand_computed_example():
    # Differences 1, 2, 3: mean 2, deviation 1, half width 4.303 / sqrt(3).
    found = paired_difference({1: 0.0, 2: 0.0, 3: 0.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert found["mean"] == pytest.approx(2)
    assert found["high"] - 2 == pytest.approx(2 - found["low"]) == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)


def test_only_seeds_that_both_have_count():
    assert paired_difference({1: 1.0, 2: 9.0}, {1: 1.5, 3: 0.0}) == {"mean": 0.5, "low": None, "high": None}
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8), st.floats(-3, 3))
def test_what_all_variants_share_cancels(noise, gain):
    """A loss that a seed adds to both variants does not change the paired interval."""
    first = dict(enumerate(noise))
    other = {i: x + gain + 0.01 * (i % 2) for i, x in enumerate(noise)}
    found = paired_difference(first, other)
    alone = paired_difference(dict.fromkeys(first, 0.0), {i: gain + 0.01 * (i % 2) for i in first})
    assert found["mean"] == pytest.approx(alone["mean"], abs=1e-9)
    assert found["low"] == pytest.approx(alone["low"], abs=1e-6)
    assert found["low"] <= found["mean"] <= found["high"]


@pytest.mark.parametrize(
    ("gain", "word"),
    [
        ({"mean": 1, "low": 0.1, "high": 2}, "holds"),
        ({"mean": -1, "low": -2, "high": -0.1}, "does not hold"),
        ({"mean": 1, "low": -0.1, "high": 2}, "undecided"),
        ({"mean": 1, "low": None, "high": None}, "undecided"),
        (None, "not compared"),
    ],
)
def test_a_verdict_follows_from_its_interval(gain, word):
    assert verdict_word(gain) == word


def test_a_verdict_may_ask_for_a_step():
    better = Row(
        name="better", label="better", valid_losses={1: 5.0, 2: 5.0}, valid_at={1: {"100": 1.0}, 2: {"100": 1.1}}
    )
    worse = Row(name="worse", label="worse", valid_losses={1: 4.0, 2: 4.1}, valid_at={1: {"100": 2.0}, 2: {"100": 2.1}})
    at_end, early = Verdict("c", "a", "b"), Verdict("c", "a", "b", at_step=100)
    assert judge(at_end, better, worse).gain["mean"] == pytest.approx(-0.95)
    assert judge(early, better, worse).gain["mean"] == pytest.approx(1.0)
    assert judge(early, better, worse).verdict == "holds"
    assert judge(early, better, replace(worse, text="another")).verdict == "not compared"


def test_the_seeds_of_a_verdict_are_those_of_both_variants():
    """Runs that failed have no losses, so fewer differences give the interval."""
    better = Row(name="better", label="better", valid_losses={1: 1.0, 2: 1.0, 3: 1.0})
    worse = Row(name="worse", label="worse", valid_losses={1: 4.0, 2: 2.0, 3: 0.0, 4: 9.0, 5: 9.0})
    judged = judge(Verdict("c", "better", "worse"), better, worse)
    rows = verdict_rows(Table("t", 1, None, [1, 2, 3, 4, 5], [better, worse], [judged]))
    assert judged.pairs == 3
    assert rows[1][2] == "undecided (about 34 seeds would decide)"


def test_a_verdict_may_ask_for_the_first_positions():
    better = Row(name="better", label="better", by_position={1: [1.0, 2.0, 9.0], 2: [1.0, 2.0, 9.0]})
    worse = Row(name="worse", label="worse", by_position={1: [2.0, 3.0, 0.0], 2: [2.5, 3.5, 0.0]})
    gain = judge(Verdict("c", "a", "b", first_positions=2), better, worse).gain
    assert gain["mean"] == pytest.approx((1.0 + 1.5) / 2)


def test_how_numbers_read():
    assert mean_and_deviation([1.0, 2.0]) == "1.5000 ± 0.7071"
    assert mean_and_deviation([]) == "-"
    assert interval({"mean": 0.5, "low": 0.25, "high": 0.75}) == "+0.5000 (+0.2500 to +0.7500)"
    assert interval({"mean": 0.5, "low": None, "high": None}) == "+0.5000 (one seed)"
    assert point_words({"train.lr": 0.002, "model.initial": "zero"}) == "lr 0.002, zero"
    assert point_words({"model.token_shift": [0.5], "model.layers": 2}) == "token_shift [0.5], layers 2"
    assert markdown_table([["a", "b"], ["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_limits_of_the_comparison_are_reported():
    def row(label, parameters, lr, failed=()):
        tuning = [{"train.lr": x, "valid_loss": 1.0} for x in (1e-3, 2e-3, 4e-3)]
        return Row(
            name=label,
            label=label,
            parameters=parameters,
            failed=dict(failed),
            chosen={"train.lr": lr},
            tuning=tuning,
            text="another" if label == "c" else "",
            chosen_precision={"a": {1: "float32"}, "b": {1: "bfloat16", 2: "float32"}}.get(label, {}),
        )

    rows = [row("a", 1000, 2e-3), row("b", 1020, 4e-3), row("c", None, 2e-3, {3: "no"})]
    said = warnings(Table("t", 1, None, [1], rows, []))
    assert said == [
        "Variant 'c', seed 3, failed: no",
        "Variant 'c' has another held-out text or tokenizer, so its losses are not compared.",
        "Some runs use bfloat16 and others float32, because train.precision is auto and processors differ; set"
        " train.precision to compare the runs in one precision.",
        "Variant 'b' has 2.0% more parameters than the first variant.",
        "The best train.lr of variant 'b', 0.004, is at the edge of the grid; widen the grid.",
    ]


@pytest.mark.parametrize(
    ("values", "chosen", "at_edge"),
    [
        ((1e-3, 2e-3), 2e-3, True),
        ((1e-3, 2e-3), 1e-3, True),
        ((1e-3, 2e-3, 4e-3), 2e-3, False),
        ((True, False), True, False),
        (("original", "zero"), "zero", False),
        ((1e-3,), 1e-3, False),
    ],
)
def test_the_best_number_of_a_grid_lies_between_others(values, chosen, at_edge):
    tuning = [{"train.lr": value, "valid_loss": 1.0} for value in values]
    row = Row(name="a", label="a", parameters=1, chosen={"train.lr": chosen}, tuning=tuning)
    assert any("edge of the grid" in line for line in warnings(Table("t", 1, None, [1], [row], []))) == at_edge


def test_failed_tuning_runs_and_equal_losses_are_told():
    tuning = [{"lr": lr, "valid_loss": loss} for lr, loss in ((1e-3, None), (2e-3, 1.1), (4e-3, 1.1))]
    row = Row(name="a", label="a", tuning=tuning, chosen={"lr": 2e-3})
    table = Table("t", 1, None, [1], [row], [])
    assert "Variant 'a': 1 of 3 tuning runs failed, so its settings are the best of the others." in warnings(table)
    assert tuning_rows(table)[1] == ["a", "failed", "1.1000 *", "1.1000"]


def test_sizes_are_compared_to_the_first_variant_only():
    sizes = {"a": None, "b": 100, "c": 200}
    rows = [Row(name=name, label=name, parameters=n) for name, n in sizes.items()]
    assert warnings(Table("t", 1, None, [1], rows, [])) == []
    assert "'c' has 100.0% more" in " ".join(warnings(Table("t", 1, None, [1], rows[1:], [])))


def test_an_undecided_verdict_says_how_many_seeds_would_decide():
    """With mean 1 and standard deviation 2, an interval of 34 values is above 0 in four of five experiments."""
    values = {1: 3.0, 2: 1.0, 3: -1.0}
    gain = paired_difference(dict.fromkeys(values, 0.0), values)
    assert verdict_words(gain, 3) == "undecided (about 34 seeds would decide)"
    drawn = np.random.default_rng(0).normal(1, 2, (20_000, 34))
    half = t_quantile(0.975, 33) * drawn.std(axis=1, ddof=1) / 34**0.5
    assert (drawn.mean(axis=1) > half).mean() == pytest.approx(0.8, abs=0.02)
    small = paired_difference(dict.fromkeys(values, 0.0), {seed: x - 0.99 for seed, x in values.items()})
    assert verdict_words(small, 3) == "undecided (more than 200 seeds would decide)"
    assert verdict_words(paired_difference({1: 0.0}, {1: 1.0}), 1) == "undecided"
    assert verdict_words(paired_difference({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0}), 2) == (
        "undecided (no difference with any seed)"
    )
    assert verdict_words({"mean": 0.0, "low": -1.0, "high": 1.0}, 3) == "undecided (more than 200 seeds would decide)"
    assert verdict_words(None, 3) == "not compared"
    assert verdict_words({"mean": 1.0, "low": 0.5, "high": 1.5}, 3) == "holds"
