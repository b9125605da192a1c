"""Paired differences and their confidence intervals."""

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
"""Confidence level of all intervals."""
POWER = 0.8
"""Probability with which the number of seeds that `verdict_words` names decides a claim."""
MOST_SEEDS = 200
"""Largest number of seeds that `verdict_words` names."""
Difference = dict[str, float | None]
"""Mean of paired differences ("mean"), and the ends of its confidence interval ("low" and "high")."""


def paired_difference(first: dict[int, float], other: dict[int, float]) -> Difference | None:
    """Return the mean of `other` minus `first` over their common seeds, with its 95 % t-interval.

    Args:
        first: Values of the first variant by seed.
        other: Values of the other variant by seed.

    Returns:
        Mean and both ends of the interval; both ends are None with a single seed. The result is None without a common
        seed.
    """
    differences = [other[seed] - first[seed] for seed in first if seed in other]
    return mean_interval(differences) if differences else None


def mean_interval(values: Sequence[float]) -> Difference:
    """Return the mean of values with its 95 % t-interval.

    Args:
        values: At least one value. With one value, both ends of the interval are None.
    """
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None}
    half = _half_width(statistics.stdev(values), n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _half_width(deviation: float, n: int) -> float:
    """Return half of the width of the interval of the mean of n values with a standard deviation."""
    return t_quantile((1 + CONFIDENCE) / 2, n - 1) * deviation / math.sqrt(n)


def t_quantile(p: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution, by bisection of its distribution function.

    Args:
        p: Probability, above 0.5 and below 1.
        degrees: Degrees of freedom, at least 1.
    """
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < p else (low, middle)
    return low


def _t_cdf(t: float, degrees: int) -> float:
    """Return the distribution function of Student's t at t >= 0.

    Source:
        Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle) ** 2
    odd = degrees % 2
    term = total = 0.0
    for j in range(degrees // 2 if not odd else (degrees - 1) // 2):
        if j == 0:
            term = math.cos(angle) if odd else 1.0
        else:
            term *= cosine * (2 * j if odd else 2 * j - 1) / (2 * j + 1 if odd else 2 * j)
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + inside) / 2


def verdict_word(gain: Difference | None) -> str:
    """Return the verdict on a claim that a difference is positive.

    The verdict is "holds" if the whole interval is above 0, "does not hold" if the whole interval is below 0, and
    "undecided" if the interval contains 0 or does not exist. Without a difference, the verdict is
    "not compared".
    """
    if gain is None:
        return "not compared"
    if gain["low"] is None or gain["high"] is None or gain["low"] <= 0 <= gain["high"]:
        return "undecided"
    return "holds" if gain["low"] > 0 else "does not hold"


def verdict_words(gain: Difference | None, seeds: int) -> str:
    """Return the verdict on a claim as text, such as "undecided (about 12 seeds would decide)".

    With this number of seeds, the claim is decided with a probability of about 80 %, if the true mean and standard
    deviation of the differences are those of the known differences. n differences with a standard deviation s decide
    with this probability about a mean of (t(0.975) + t(0.8)) s / sqrt(n), with quantiles t of n - 1 degrees of freedom.

    Args:
        gain: Mean of the differences with its interval, as in `verdict_word`.
        seeds: Number of differences.
    """
    word = verdict_word(gain)
    if word != "undecided" or gain is None:
        return word
    mean, low = gain["mean"], gain["low"]
    if mean is None or low is None:
        return word
    if low == gain["high"]:
        return f"{word} (no difference with any seed)"
    deviation = (mean - low) / _half_width(1, seeds)
    for n in range(seeds + 1, MOST_SEEDS + 1):
        if _half_width(deviation, n) + t_quantile(POWER, n - 1) * deviation / math.sqrt(n) < abs(mean):
            return f"{word} (about {n} seeds would decide)"
    return f"{word} (more than {MOST_SEEDS} seeds would decide)"


def interval(difference: Difference | None) -> str:
    """Return a difference as text, such as "+0.0123 (+0.0045 to +0.0201)"; "-" without a difference."""
    if difference is None:
        return "-"
    if difference["low"] is None:
        return f"{difference['mean']:+.4f} (one seed)"
    return f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
