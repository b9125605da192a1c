"""Filters and draws by a sort of the whole vocabulary and a cumulative sum over it."""

import numpy as np

from timemix.generation.sampler import TOP_P_ERROR


def probabilities(sampler, logits, seen, counts):
    """Return the probabilities (V,) of one row, from logits (V,), the mask `seen` (V,) and numbers `counts` (V,)."""
    x = logits.astype(np.float64)
    x = np.where(seen, np.where(x > 0, x / sampler.repetition_penalty, x * sampler.repetition_penalty), x)
    x = x - sampler.frequency_penalty * counts - sampler.presence_penalty * (counts > 0)
    largest = x.max()
    difference = np.subtract(x, largest, out=np.zeros_like(x), where=x != largest)
    with np.errstate(over="ignore"):
        weights = np.exp(difference / (sampler.temperature or 1))
    p = weights / weights.sum()
    p_max = p.max()
    order = (-x).argsort(kind="stable")
    ranked = p[order]
    sum_before = ranked.cumsum() - ranked
    first = np.arange(len(x)) == 0
    kept = np.empty(len(x), bool)
    kept[order] = (
        ((np.arange(len(x)) < sampler.top_k) | (sampler.top_k == 0))
        & ((sum_before < sampler.top_p - TOP_P_ERROR) | (sampler.top_p == 1) | first)
        & (first | (sampler.temperature > 0))
    )
    kept &= p >= sampler.min_p * p_max
    kept &= p >= min(sampler.top_a * p_max**sampler.top_a_power, p_max)
    weights = np.where(kept, weights, 0)
    return weights / weights.sum()


def token(p, u):
    """Return the token of a random number u from probabilities (V,)."""
    cumulative = p.cumsum()
    return int((cumulative <= u * cumulative[-1]).sum())
