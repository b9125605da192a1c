"""Penalties on the logits of tokens that a text already contains.

Shapes: B is the number of rows of a batch, V is the size of the vocabulary, and n is the number of tokens of all rows.
"""

import itertools
import sys
from collections.abc import Collection, Mapping, Sequence

import numpy as np


def penalize_seen(x: np.ndarray, seen: Sequence[Collection[int]], penalty: np.ndarray) -> None:
    """Apply `repetition_penalty` to logits, in place.

    Args:
        x: Logits (B, V) float64.
        seen: Different tokens that each row has seen.
        penalty: Penalty of each row (B, 1), or of all rows (1, 1).
    """
    own = np.broadcast_to(penalty[:, 0], len(x))
    row, at = _listed([tokens if each != 1 else () for tokens, each in zip(seen, own, strict=True)], x.shape[1])
    logits, own = x.reshape(-1)[at], own[row]
    with np.errstate(over="ignore"):
        x.reshape(-1)[at] = _limited(np.where(logits > 0, logits / own, logits * own), logits)


def penalize_counted(
    x: np.ndarray, counts: Sequence[Mapping[int, int]], presence: np.ndarray, frequency: np.ndarray
) -> None:
    """Apply `presence_penalty` and `frequency_penalty` to logits, in place.

        logit(token) -= presence + frequency * counts[token], for the tokens in `counts`

    Args:
        x: Logits (B, V) float64.
        counts: Number of times that the generated text of each row contains each of its tokens.
        presence: Presence penalty of each row (B, 1), or of all rows (1, 1).
        frequency: Frequency penalty, likewise.
    """
    once, each = (np.broadcast_to(penalty[:, 0], len(x)) for penalty in (presence, frequency))
    is_on = (once != 0) | (each != 0)
    used: list[Mapping[int, int]] = [own if on else {} for own, on in zip(counts, is_on, strict=True)]
    row, at = _listed(used, x.shape[1])
    numbers = np.fromiter(itertools.chain.from_iterable(own.values() for own in used), np.float64, len(at))
    logits = x.reshape(-1)[at]
    with np.errstate(over="ignore"):
        x.reshape(-1)[at] = _limited(logits - _finite(once[row] + each[row] * numbers), logits)


def _listed(tokens: Sequence[Collection[int]], V: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for all tokens of B rows the index of the row (n,), and the index into B * V numbers (n,)."""
    row = np.repeat(np.arange(len(tokens)), [len(own) for own in tokens])
    return row, row * V + np.fromiter(itertools.chain.from_iterable(tokens), np.int64, len(row))


def _limited(penalized: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return penalized logits, where finite logits stay finite: a penalty must not exclude every token."""
    limited: np.ndarray = np.where(np.isfinite(logits), _finite(penalized), penalized)
    return limited


def _finite(x: np.ndarray) -> np.ndarray:
    """Return x (n,) with the largest finite numbers in place of infinities."""
    finite: np.ndarray = np.clip(x, -sys.float_info.max, sys.float_info.max)
    return finite
