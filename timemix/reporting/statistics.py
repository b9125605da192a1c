"""Paired differences and their confidence intervals."""

import math
import statistics

CONFIDENCE = 0.95
Difference = dict[str, float | None]


def paired_difference(first: dict[int, float], other: dict[int, float]) -> Difference | None:
    """Mean of `other` minus `first` over the seeds that both have, and its 95 % t-interval; None without a seed.

    A single seed has no interval: low and high are None.
    """
    differences = [other[seed] - first[seed] for seed in first if seed in other]
    if not differences:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return {"mean": mean, "low": None, "high": None}
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def t_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t for p in (0.5, 1), by bisection of its distribution function."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < p else (low, middle)
    return low


def _t_cdf(t: float, degrees: int) -> float:
    """Distribution function of Student's t at t >= 0: Abramowitz and Stegun 26.7.3 and 26.7.4."""
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
    """holds where the whole interval is above 0, does not hold where it is below, undecided between, else not run."""
    if gain is None:
        return "not run"
    if gain["low"] is None or gain["high"] is None or gain["low"] <= 0 <= gain["high"]:
        return "undecided"
    return "holds" if gain["low"] > 0 else "does not hold"


def interval(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if difference["low"] is None:
        return f"{difference['mean']:+.4f} (one seed)"
    return f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"
