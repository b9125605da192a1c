"""Filters of next-token probabilities, and sampling from them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open

from tests.helpers import sorted_sampling
from tests.helpers.draws import draw
from tests.helpers.tiers import examples
from timemix.errors import InvalidValue
from timemix.generation.random_draws import BLOCK, Uniforms
from timemix.generation.ranking import LARGE, most_probable
from timemix.generation.sampler import Sampler

GOLDEN = Path(__file__).parents[1] / "golden" / "top_a.safetensors"

V = 12
FILTERS = {
    "top_k": st.integers(0, V + 3),
    "top_p": st.floats(1e-3, 1),
    "min_p": st.floats(0, 1),
    "top_a": st.floats(0, 1),
    "top_a_power": st.floats(0, 4),
}
# Multiples of 1/8, so that no two values differ by rounding alone.
LOGITS = st.lists(st.integers(-80, 80).map(lambda n: n / 8), min_size=V, max_size=V)
DISTINCT_LOGITS = st.lists(st.integers(-80, 80).map(lambda n: n / 8), min_size=V, max_size=V, unique=True)
TEMPERATURE = st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1.7, 1e6])
PENALTY = st.sampled_from([0.5, 1.0, 1.3, 4.0])


@st.composite
def samplers(draw_, penalty=None):
    on = {name: draw_(value) for name, value in FILTERS.items() if draw_(st.booleans())}
    if penalty is not None:
        on["repetition_penalty"] = draw_(penalty)
    return Sampler(temperature=draw_(TEMPERATURE), **on)


def probabilities(sampler, *rows, seen=None):
    return sampler.probabilities(torch.tensor(rows, dtype=torch.float64), seen)


def test_reproduces_the_original_top_a():
    with safe_open(GOLDEN, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        assert len(cases) == 36
        for i, case in enumerate(cases):
            sampler = Sampler(case["temperature"], top_a=case["ratio"], top_a_power=case["power"])
            ours = sampler.probabilities(file.get_tensor(f"{i}.logits")[None])[0]
            golden = file.get_tensor(f"{i}.probabilities")
            assert torch.equal(ours > 0, golden > 0)
            torch.testing.assert_close(ours, golden, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(), [0.5, 0.25, 0.125, 0.125]),
        (Sampler(temperature=0), [1, 0, 0, 0]),
        (Sampler(temperature=0.5), [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        (Sampler(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampler(top_k=3), [4 / 7, 2 / 7, 1 / 7, 0]),
        (Sampler(top_p=0.5), [1, 0, 0, 0]),
        (Sampler(top_p=0.51), [2 / 3, 1 / 3, 0, 0]),
        (Sampler(top_p=0.8), [4 / 7, 2 / 7, 1 / 7, 0]),
        (Sampler(min_p=0.5), [2 / 3, 1 / 3, 0, 0]),
        (Sampler(min_p=0.51), [1, 0, 0, 0]),
        (Sampler(top_a=0.8, top_a_power=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampler(top_a=0.8, top_a_power=1), [1, 0, 0, 0]),
        (Sampler(top_a=1, top_a_power=0), [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_each_setting_by_hand(sampler, expected):
    logits = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
    torch.testing.assert_close(
        probabilities(sampler, logits)[0], torch.tensor(expected).double(), rtol=1e-7, atol=1e-12
    )


def test_filters_judge_the_same_probabilities():
    # After top_k the first token has probability 2/3 and satisfies top_p alone; in the whole row it has 1/2.
    logits = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
    assert probabilities(Sampler(top_k=2, top_p=0.6), logits)[0].count_nonzero() == 2


def test_filters_judge_after_temperature():
    logits = [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
    assert probabilities(Sampler(temperature=0.5, min_p=0.3), logits)[0].count_nonzero() == 1
    assert probabilities(Sampler(temperature=2, min_p=0.5), logits)[0].count_nonzero() == 4


def test_repetition_penalty_weakens_seen_tokens_of_either_sign():
    seen = torch.tensor([[True, False, True, False]])
    p = probabilities(Sampler(repetition_penalty=2), [3.0, 3.0, -1.0, -1.0], seen=seen)
    torch.testing.assert_close(p, torch.tensor([[1.5, 3, -2, -1]]).double().softmax(-1))


def test_repetition_penalty_is_charged_before_greedy_choice():
    seen = torch.tensor([[True, False]])
    p = probabilities(Sampler(temperature=0, repetition_penalty=2), [3.0, 2.0], seen=seen)
    assert p.tolist() == [[0, 1]]


COUNTS = torch.tensor([[0, 1, 2, 5]])


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(presence_penalty=0.5), [1, 0.5, 0.5, 0.5]),
        (Sampler(frequency_penalty=0.25), [1, 0.75, 0.5, -0.25]),
        (Sampler(presence_penalty=-1, frequency_penalty=0.5), [1, 1.5, 1, -0.5]),
        # All penalties precede the temperature.
        (Sampler(temperature=0.5, presence_penalty=0.5), [2, 1, 1, 1]),
    ],
    ids=str,
)
def test_penalties_on_generated_tokens_by_the_formula_of_openai(sampler, expected):
    p = sampler.probabilities(torch.ones(1, 4), counts=COUNTS)[0]
    torch.testing.assert_close(p, torch.tensor(expected).double().softmax(-1))


def test_the_repetition_penalty_precedes_the_other_penalties():
    sampler = Sampler(repetition_penalty=2, presence_penalty=1)
    p = sampler.probabilities(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), COUNTS)[0]
    torch.testing.assert_close(p, torch.tensor([0.5, -0.5, -0.5, -0.5]).double().softmax(-1))


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [1e308, -1e308])
def test_a_huge_penalty_does_not_exclude_every_token(penalty, value):
    sampler = Sampler(**{penalty: abs(value) if penalty == "repetition_penalty" else value})
    seen = torch.ones(1, 4, dtype=torch.bool)
    p = sampler.probabilities(torch.tensor([[-3.0, -20.0, -1.0, -math.inf]]), seen, torch.full((1, 4), 7))[0]
    assert p.sum().item() == pytest.approx(1)
    assert p[3] == 0


@given(LOGITS, samplers(PENALTY), st.lists(st.booleans(), min_size=V, max_size=V))
def test_sums_to_one_and_keeps_the_most_probable(logits, sampler, seen):
    seen = torch.tensor([seen])
    p = probabilities(sampler, logits, seen=seen)[0]
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert (p >= 0).all()
    plain = Sampler(temperature=1, repetition_penalty=sampler.repetition_penalty)
    assert p[probabilities(plain, logits, seen=seen)[0].argmax()] == p.max()


@given(LOGITS, TEMPERATURE.filter(bool))
def test_without_filters_it_is_softmax(logits, temperature):
    expected = (torch.tensor(logits).double() / temperature).softmax(-1)
    torch.testing.assert_close(probabilities(Sampler(temperature), logits)[0], expected, rtol=1e-9, atol=1e-15)


@given(LOGITS, samplers())
def test_survivors_keep_their_proportions(logits, sampler):
    plain = probabilities(Sampler(sampler.temperature), logits)[0]
    p = probabilities(sampler, logits)[0]
    torch.testing.assert_close(p, torch.where(p > 0, plain, 0) / plain[p > 0].sum(), rtol=1e-9, atol=0)


@given(LOGITS, samplers())
def test_filters_compose_to_the_tokens_that_each_alone_keeps(logits, sampler):
    alone = [
        Sampler(sampler.temperature, top_k=sampler.top_k),
        Sampler(sampler.temperature, top_p=sampler.top_p),
        Sampler(sampler.temperature, min_p=sampler.min_p),
        Sampler(sampler.temperature, top_a=sampler.top_a, top_a_power=sampler.top_a_power),
    ]
    kept_by_all = torch.stack([probabilities(s, logits)[0] > 0 for s in alone]).all(0)
    assert torch.equal(probabilities(sampler, logits)[0] > 0, kept_by_all)


@given(LOGITS, st.sampled_from([0.3, 1.0, 1.7]), st.sampled_from(["top_k", "top_p", "min_p", "top_a"]), st.data())
def test_support_shrinks_as_a_filter_gets_stricter(logits, temperature, name, data):
    values = st.integers(1, V) if name == "top_k" else FILTERS[name]
    low, high = sorted([data.draw(values), data.draw(values)])
    loose, strict = (low, high) if name in ("min_p", "top_a") else (high, low)
    loose_p, strict_p = (probabilities(Sampler(temperature, **{name: value}), logits)[0] for value in (loose, strict))
    assert ((strict_p > 0) <= (loose_p > 0)).all()


@given(LOGITS, samplers(), st.integers(-1000, 1000))
def test_adding_a_constant_changes_nothing(logits, sampler, constant):
    shifted = [x + constant for x in logits]
    torch.testing.assert_close(probabilities(sampler, shifted), probabilities(sampler, logits), rtol=1e-12, atol=0)


@given(DISTINCT_LOGITS, samplers(), st.permutations(range(V)))
def test_renaming_tokens_renames_the_result(logits, sampler, order):
    p = probabilities(sampler, logits)[0]
    permuted = probabilities(sampler, [logits[i] for i in order])[0]
    torch.testing.assert_close(permuted, p[list(order)], rtol=1e-12, atol=0)


@given(st.lists(st.tuples(LOGITS, samplers(PENALTY)), min_size=1, max_size=5))
@examples(50)
def test_each_row_has_its_own_settings_and_no_neighbours(cases):
    logits = torch.tensor([row for row, _ in cases])
    seen = logits > 1
    fields = {name: [getattr(s, name) for _, s in cases] for name in vars(cases[0][1])}
    batch = Sampler(**fields).probabilities(logits, seen)
    for i, (_, sampler) in enumerate(cases):
        assert torch.equal(batch[i], sampler.probabilities(logits[i : i + 1], seen[i : i + 1])[0])


@pytest.mark.parametrize("vocabulary", [1, 7, 257, 50_257])
def test_a_row_is_bit_for_bit_the_same_in_any_batch(vocabulary):
    logits = 4 * torch.randn(5, vocabulary)
    sampler = Sampler(0.9, top_k=100, top_p=0.9, min_p=0.001, top_a=0.02)
    batch = sampler.probabilities(logits)
    for i in range(5):
        assert torch.equal(batch[i], sampler.probabilities(logits[i : i + 1])[0])


def test_settings_may_be_tensors():
    sampler = Sampler(temperature=torch.tensor([0.0, 1.0]), top_k=torch.tensor([0, 2]))
    assert sampler == Sampler(temperature=[0.0, 1.0], top_k=[0, 2])
    p = probabilities(sampler, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (p > 0).tolist() == [[False, False, True], [False, True, True]]


@pytest.mark.parametrize("sampler", [Sampler(temperature=0), Sampler(top_k=1), Sampler(top_p=1e-9)], ids=str)
def test_equal_logits_rank_by_id(sampler):
    tied = [0.0, 5.0, 1.0, 5.0, 5.0] * 20
    assert probabilities(sampler, tied)[0].nonzero().tolist() == [[1]]
    assert probabilities(Sampler(top_k=3), tied)[0].nonzero().flatten().tolist() == [1, 3, 4]


def test_logits_rank_where_their_probabilities_round_to_the_same():
    assert probabilities(Sampler(top_k=1), [0.0, 1e-17]).tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-6, 1.0, 1e300])
def test_extreme_logits_give_no_nan(temperature, dtype):
    rows = [
        [3e38, -3e38, 0.0],
        [math.inf, 1.0, math.inf],
        [-math.inf, 0.0, -1e-30],
        [math.inf, -math.inf, 3e38],
        [-math.inf, -math.inf, -3e38],
    ]
    seen = torch.ones(5, 3, dtype=torch.bool)
    for sampler in (
        Sampler(temperature),
        Sampler(temperature, 1, 1e-9, 1, 1, 0, 1.5),
        Sampler(temperature, top_p=0.9, top_a=1, top_a_power=0),
    ):
        p = sampler.probabilities(torch.tensor(rows, dtype=dtype), seen)
        torch.testing.assert_close(p.sum(-1), torch.ones(5).double())
        assert (p[[0, 3], [0, 0]] > 0.999).all() or temperature == 1e300
        assert p[2, 0] == p[3, 1] == p[4, 0] == 0


def test_tokens_at_infinity_share_all_probability():
    assert probabilities(Sampler(), [math.inf, 1.0, math.inf]).tolist() == [[0.5, 0, 0.5]]


@pytest.mark.parametrize(
    ("row", "message"), [([0.0, math.nan], "row 1 hold NaN"), ([-math.inf] * 2, "row 1 are all -inf")]
)
def test_rows_without_a_distribution_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        probabilities(Sampler(), [0.0, 1.0], row)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "-0.1; it must be at least 0"),
        ("temperature", math.nan, "nan; it must be at least 0"),
        ("temperature", math.inf, "inf; it must be at least 0 and finite"),
        ("top_k", -1, "-1; it must be a whole number, at least 0"),
        ("top_k", 1.5, "1.5; it must be a whole number, at least 0"),
        ("top_p", 0, "0; it must be above 0 and at most 1"),
        ("top_p", 1.0000001, "1.0000001; it must be above 0 and at most 1"),
        ("min_p", -0.1, "-0.1; it must be from 0 to 1"),
        ("min_p", 1.1, "1.1; it must be from 0 to 1"),
        ("top_a", -0.1, "-0.1; it must be from 0 to 1"),
        ("top_a_power", -1, "-1; it must be at least 0"),
        ("repetition_penalty", math.inf, "inf; it must be above 0 and finite"),
        ("presence_penalty", math.inf, "inf; it must be a finite number"),
        ("frequency_penalty", "a", "'a'; it must be a finite number"),
        ("top_p", [0.5, 2.0], "2.0; it must be above 0 and at most 1"),
        ("temperature", "a", "'a'; it must be at least 0"),
        ("temperature", None, "None; it must be at least 0"),
        ("temperature", True, "True; it must be at least 0"),
        ("temperature", 10**400, "1000"),
        ("min_p", [0.1, "b"], "'b'; it must be from 0 to 1"),
    ],
)
def test_values_out_of_range_are_named(field, value, words):
    with pytest.raises(InvalidValue, match=f"^{field} is {words}"):
        Sampler(**{field: value})


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="top_k has 3 values for 2 rows"):
        probabilities(Sampler(top_k=[1, 2, 3]), [0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="repetition_penalty is on, but seen is None"):
        probabilities(Sampler(repetition_penalty=1.1), [0.0, 1.0])
    for penalty in ({"presence_penalty": 1}, {"frequency_penalty": [0, -1]}):
        with pytest.raises(ValueError, match="a penalty on generated tokens is on, but counts is None"):
            probabilities(Sampler(**penalty), [0.0, 1.0], [0.0, 1.0])


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.4, 0.3, 0.0, 0.15, 0.1, 0.05, 0.0])
    N = 20_000
    tokens = draw(p.expand(N, -1), seed=1, sample=[0] * N, position=range(N))
    assert tokens.dtype == torch.int64
    counts = tokens.bincount(minlength=7)
    assert counts[2] == counts[6] == 0
    expected = N * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    # 0.999 quantile at 4 degrees of freedom.
    assert chi_square < 18.5


@pytest.mark.parametrize("varied", ["seed", "sample", "position"])
def test_each_counter_gives_independent_draws(varied):
    N = 4000
    fixed = {"seed": [3] * (N + 1), "sample": [3] * (N + 1), "position": [3] * (N + 1)}
    p = torch.full((N + 1, 4), 0.25)
    tokens = draw(p, **fixed | {varied: range(N + 1)})
    pairs = (4 * tokens[:-1] + tokens[1:]).bincount(minlength=16)
    # 0.999 quantile at 15 degrees of freedom.
    assert ((pairs - N / 16) ** 2 / (N / 16)).sum() < 37.7


def test_a_draw_depends_on_its_counters_alone():
    p = torch.rand(6, 50)
    p /= p.sum(-1, keepdim=True)
    seed, sample, position = [5, 5, 6, 5, 2**64 - 1, 5], [0, 1, 0, 7, 0, 0], [0, 0, 0, 9, 0, 2**40]
    together = draw(p, seed=seed, sample=sample, position=torch.tensor(position))
    order = [4, 2, 0, 5, 1, 3]
    shuffled = draw(
        p[order],
        seed=[seed[i] for i in order],
        sample=[sample[i] for i in order],
        position=[position[i] for i in order],
    )
    assert torch.equal(shuffled, together[order])
    for i in range(6):
        alone = draw(p[i : i + 1], seed=seed[i], sample=[sample[i]], position=[position[i]])
        assert alone.item() == together[i]


def test_draws_are_the_same_on_every_machine():
    p = torch.full((8, 1000), 0.001)
    tokens = draw(p, seed=42, sample=[0, 0, 0, 0, 1, 1, 1, 1], position=[0, 1, 2, 3] * 2)
    assert tokens.tolist() == [820, 368, 876, 66, 443, 24, 975, 281]


@given(seed=st.integers(0, 2**64 - 1), sample=st.integers(0, 2**64 - 1), position=st.integers(0, 2**64 - 1))
def test_a_draw_is_that_of_a_new_generator(seed, sample, position):
    bits = np.random.Philox(key=seed | sample << 64, counter=position).random_raw()
    # Other rows go before it.
    fine = torch.full((3, 4096), 2.0**-12)
    tokens = draw(fine, seed=[5, seed, seed], sample=[1, sample, sample], position=[9, position, position])
    assert tokens[1:].tolist() == [int(bits) >> 52] * 2


def draw_at(bits, p):
    """Return the token of a row for a generator that returns these 64 bits."""

    class Fixed(np.random.Philox):
        def random_raw(self, size):
            return np.full(size, bits, np.uint64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "Philox", Fixed)
        return draw(p[None], seed=0, sample=[0], position=[0]).item()


@given(st.lists(st.just(0.0) | st.floats(1e-300, 1), min_size=1, max_size=40).filter(any))
@example([0.0, 1.0, 0.0])
def test_tokens_of_probability_zero_are_never_drawn(weights):
    p = torch.tensor(weights, dtype=torch.float64)
    p /= p.sum()
    possible = p.nonzero().flatten()
    assert draw_at(0, p) == possible[0]
    assert draw_at(2**64 - 1, p) in possible


def test_draw_resolves_what_float32_would_round_away():
    assert draw_at(2**63, torch.tensor([0.5, 2.0**-26, 0.5])) == 1


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_named(seed):
    with pytest.raises(InvalidValue, match=f"seed is {seed}; it must be"):
        draw(torch.ones(1, 2), seed=seed, sample=[0], position=[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(shares=st.lists(st.integers(1, 20), min_size=2, max_size=12))
def test_top_p_keeps_the_fewest_that_reach_it(shares, dtype):
    total = sum(shares)
    logits = (torch.tensor(shares, dtype=torch.float64) / total).log().to(dtype)
    ranked = sorted(shares, reverse=True)
    for kept in range(1, len(shares) + 1):
        # Exact sums, so no rounding affects which tokens reach the threshold.
        top_p = sum(ranked[:kept]) / total
        found = Sampler(top_p=top_p).probabilities(logits[None])[0]
        assert int((found > 0).sum()) == kept or top_p == 1


def test_a_tiny_top_p_keeps_the_most_probable():
    assert probabilities(Sampler(top_p=1e-9), [0.1, 0.2, 0.0]).tolist() == [[0, 1, 0]]


SIZES = st.sampled_from([1, 2, 100, 1000, LARGE, LARGE + 1, 3 * LARGE])
SETTINGS = {
    "temperature": TEMPERATURE,
    "top_k": st.sampled_from([0, 1, 50, 700, LARGE + 2]),
    "top_p": st.sampled_from([1e-9, 0.5, 0.9, 0.999, 1 - 1e-8, 1.0]),
    "min_p": st.sampled_from([0.0, 1e-7, 0.05, 1.0]),
    "top_a": st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    "top_a_power": st.sampled_from([0.0, 0.5, 2.0]),
    "repetition_penalty": PENALTY,
    "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.25, -1.0]),
}


@st.composite
def rows_of_logits(draw_):
    """Logits (2, V) with and without ties and infinities, near zero, far apart, or of the shape of a trained model."""
    V, generator = draw_(SIZES), np.random.default_rng(draw_(st.integers(0, 2**32)))
    logits = generator.standard_normal((2, V)) * draw_(st.sampled_from([0.0, 0.1, 1.0, 5.0]))
    if draw_(st.booleans()):
        logits -= 1.2 * np.log(generator.permutation(V) + 1)
    if draw_(st.booleans()):
        logits = np.round(8 * logits) / 8
    infinity = draw_(st.sampled_from([0, -np.inf, np.inf]))
    if infinity:
        logits[:, generator.permutation(V)[: V // 2]] = infinity
    return logits.astype(draw_(st.sampled_from([np.float32, np.float64])))


@given(rows_of_logits(), st.fixed_dictionaries(SETTINGS), st.integers(0, 2**64 - 1))
@examples(100)
def test_equals_a_sort_of_the_whole_vocabulary(logits, settings, seed):
    seen = logits > np.median(logits)
    counts = np.arange(logits.size).reshape(logits.shape) % 5 * seen
    sampler = Sampler(**settings)
    p = sampler.probabilities(*map(torch.from_numpy, (logits, seen, counts)))
    listed = [row.nonzero()[0].tolist() for row in seen]
    counted = [{t: int(row[t]) for t in row.nonzero()[0]} for row in counts]
    u = [Uniforms(seed, sample).at(3) for sample in (1, 2)]
    drawn = sampler.draw(logits, listed, counted, u=np.array(u))
    assert draw(p, seed=seed, sample=[1, 2], position=[3, 3]).tolist() == drawn.tolist()
    for i in range(2):
        expected = sorted_sampling.probabilities(sampler, logits[i], seen[i], counts[i])
        assert np.array_equal(p[i].numpy() > 0, expected > 0)
        np.testing.assert_allclose(p[i].numpy(), expected, rtol=1e-12)
        bits = np.random.Philox(key=seed | (i + 1) << 64, counter=3).random_raw()
        assert sorted_sampling.token(expected, (int(bits) >> 11) * 2.0**-53) == drawn[i]


@given(rows_of_logits(), st.integers(0, 2 * LARGE))
@examples(50)
def test_the_most_probable_tokens_are_the_first_of_a_sort(logits, count):
    found = most_probable(logits[0], count)
    assert found.tolist() == (-logits[0]).argsort(kind="stable")[:count].tolist()


@given(st.lists(st.sampled_from([0.0, 0.0, 1e-300, 1.0]), min_size=1, max_size=5), st.integers(0, 2**53 - 1))
@example([0.0, 1.0, 0.0], 2**53 - 1)
def test_no_row_of_any_size_draws_a_token_of_probability_zero(pattern, number):
    weights = np.resize(pattern, 3 * LARGE + 5)
    weights[7] = 1.0
    p = torch.from_numpy(weights / weights.sum())
    assert weights[draw_at(number << 11, p)] > 0


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 3 * BLOCK), min_size=1), st.data())
@examples(50)
def test_a_random_number_depends_on_seed_sample_and_position_alone(seed, sample, positions, data):
    begin = data.draw(st.sampled_from([0, 1000, 2**63 - 1 - 3 * BLOCK]))
    uniforms = Uniforms(seed, sample)
    for position in positions:
        bits = np.random.Philox(key=seed | sample << 64, counter=begin + position).random_raw()
        assert uniforms.at(begin + position) == (int(bits) >> 11) * 2.0**-53
