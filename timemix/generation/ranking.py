"""The largest of many numbers, found without a sort of all numbers.

Shapes: B is the number of rows of a batch, V is the size of the vocabulary, and M is the number of candidate tokens.
The token with the largest logit ranks first. Among tokens with equal logits, the lowest id ranks first.
"""

import math

import numpy as np

LARGE = 4096
"""Number of tokens above which a row is processed alone, so that its numbers stay in the processor's cache."""

COLUMN = 64
"""Largest number of values that `reached` replaces by their maximum."""


def reached(values: np.ndarray, count: float) -> np.ndarray:
    """Return for each row of values (B, V) a number (B, 1) that at least `count` values reach; -inf if V < count."""
    B, V = values.shape
    if not 0 < count <= V:
        return np.full((B, 1), -np.inf)
    number = int(count)
    column = max(1, min(COLUMN, V // (4 * number)))
    columns = V // column
    # The largest values of `count` columns reach the result.
    largest = values[:, : column * columns].reshape(B, column, columns).max(1)
    return np.partition(largest, columns - number)[:, columns - number, None]


def most_probable(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the ids of the `count` largest logits (V,), the largest first, and the lowest id first among equals."""
    tokens = np.flatnonzero(logits >= reached(logits[None], count)[0]) if count else np.arange(0)
    return tokens[(-logits[tokens]).argsort(kind="stable")[:count]]


def leading(logits: np.ndarray, p: np.ndarray, count: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Return the mask (B, M) of the tokens before which fewer than `count` tokens with a sum of p below `mass` rank."""
    if p.shape[1] > LARGE:
        return _leading_of_many(logits[0], p[0], count.item(), mass.item())[None]
    # Rank the tokens by logit: different logits can have probabilities that round to the same number.
    order = (-logits).argsort(-1, kind="stable")
    ranked = np.take_along_axis(p, order, -1)
    sum_before = ranked.cumsum(-1) - ranked
    mask = np.empty(p.shape, bool)
    np.put_along_axis(mask, order, (np.arange(p.shape[1]) < count) & (sum_before < mass), -1)
    return mask


def _leading_of_many(logits: np.ndarray, p: np.ndarray, count: float, mass: float) -> np.ndarray:
    """Return the mask (M,) of `leading`, and sort only the tokens whose probabilities are near the limit.

    The tokens are counted in buckets of similar probabilities. Of one bucket, some tokens can stay and others not.
    """
    # The upper 17 bits of a positive float64 are 12 bits of exponent and 5 bits of mantissa.
    bucket = (p.max().view(np.int64) - p.view(np.int64)) >> 47
    # Each limit applies to a sum over the tokens that rank before a token.
    limits = [
        (each, limit, np.bincount(bucket, each).cumsum())
        for each, limit in ((np.ones_like(p), count), (p, mass))
        if limit < math.inf
    ]
    edge = min(int(sums.searchsorted(limit)) for _, limit, sums in limits)
    mask: np.ndarray = bucket < edge
    inside = np.flatnonzero(bucket == edge)
    # A stable sort of equal logits is fast, so a bucket may hold all tokens.
    order = inside[(-logits[inside]).argsort(kind="stable")]
    mask[order] = True
    for each, limit, sums in limits:
        before = each[order].cumsum() - each[order] + (sums[edge - 1] if edge else 0)
        mask[order] &= before < limit
    return mask
