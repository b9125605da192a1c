"""From logits to the next token: filters remove tokens, and a draw chooses one of the remaining tokens.

Shapes: B is the number of rows of a batch, V is the size of the vocabulary, and M is the number of candidate tokens.
All arithmetic is float64 on the CPU, row by row, so that a row gets the same token on every device, alone or in any
batch.

The cost for a large vocabulary: the weight exp((logit - largest logit) / temperature) of each token is computed once.
A lower bound on the weights of the tokens that stay then selects the candidates, and the filters process only the
candidates.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.generation.penalties import penalize_counted, penalize_seen
from timemix.generation.random_draws import search
from timemix.generation.ranking import LARGE, leading, reached

PerRow = float | Sequence[float] | Tensor

TOP_P_ERROR = 1e-6
"""Tolerance in the comparison of a sum of probabilities with `top_p`: float32 logits give no more exact sums."""

FEW = 256
"""Number of tokens of a large vocabulary that usually reach `top_p` together."""

_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("at least 0 and finite", lambda x: x >= 0),
    "top_k": ("a whole number, at least 0", lambda x: x >= 0 and x == int(x)),
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "top_a": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "top_a_power": ("at least 0 and finite", lambda x: x >= 0),
    "repetition_penalty": ("above 0 and finite", lambda x: x > 0),
    "presence_penalty": ("a finite number", math.isfinite),
    "frequency_penalty": ("a finite number", math.isfinite),
}


@dataclass(frozen=True)
class Sampler:
    """Describe the conversion of logits to the probabilities of the next token.

    Each field is one number for all rows, or a sequence or tensor of B numbers, one per row. The operations always have
    this order:

    1. `repetition_penalty`.
    2. `presence_penalty` and `frequency_penalty`: with c the number of times that the text generated so far contains a
       token, frequency_penalty * c is subtracted from the logit of the token, and presence_penalty if c > 0.
    3. `temperature`: p = softmax(logits / temperature).
    4. The filters. Each filter is applied to the same p, not to the result of another filter. A token stays if every
       filter keeps the token. Among equally probable tokens the lowest ids rank first. The most probable token always
       stays.
    5. The probabilities of the tokens that stay are divided by their sum.

    Args:
        temperature: Divisor of the logits, at least 0; 0 gives all probability to the largest logit, or to the lowest
            id among equal logits.
        top_k: Number of most probable tokens that stay, at least 0; 0 = off.
        top_p: Probability, above 0 and at most 1: the most probable tokens stay, until their probabilities sum to top_p
            within 1e-6; 1 = off.
        min_p: Share of the largest probability, 0 to 1: tokens with p >= min_p * p_max stay; 0 = off.
        top_a: Factor, 0 to 1: tokens with p < top_a * p_max ** top_a_power are removed; 0 = off.
        top_a_power: Exponent of p_max in the threshold of top_a, at least 0.
        repetition_penalty: Penalty, above 0: positive logits of tokens that occur in the prompt or in the text are
            divided by the penalty, negative logits are multiplied by the penalty; 1 = off. Tokens before a bounded
            context count too.
        presence_penalty: Number subtracted from the logits of generated tokens; 0 = off. Tokens of the prompt do not
            count, and a negative number makes generated tokens more probable.
        frequency_penalty: Number subtracted from the logits of generated tokens, once for each occurrence; 0 = off.

    Raises:
        InvalidValue: A value is out of its range.

    Source:
        repetition_penalty: CTRL, arXiv 1909.05858. presence_penalty and frequency_penalty: OpenAI API.
        top_k: arXiv 1805.04833. top_p: arXiv 1904.09751. min_p: arXiv 2407.01082.
        top_a: RWKV-LM 0.01, doi 10.5281/zenodo.5196577.
    """

    temperature: PerRow = 1.0
    top_k: PerRow = 0
    top_p: PerRow = 1.0
    min_p: PerRow = 0.0
    top_a: PerRow = 0.0
    top_a_power: PerRow = 2.0
    repetition_penalty: PerRow = 1.0
    presence_penalty: PerRow = 0.0
    frequency_penalty: PerRow = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            # `tolist` converts the numbers of an array or a tensor to Python numbers.
            plain = given.tolist() if hasattr(given, "tolist") else given
            allowed, accepts = _ALLOWED[field.name]
            is_one = not isinstance(plain, Sequence) or isinstance(plain, str)
            for value in [plain] if is_one else plain:
                if not (_is_finite(value) and accepts(value)):
                    raise InvalidValue(f"{field.name} is {value!r}; it must be {allowed}")
            # Store plain numbers: unlike tensors, plain numbers can be compared and hashed.
            object.__setattr__(self, field.name, float(plain) if is_one else tuple(map(float, plain)))

    @property
    def is_of_one_row(self) -> bool:
        """Whether each field is one number."""
        return not any(isinstance(getattr(self, field.name), tuple) for field in fields(self))

    def row(self, i: int) -> "Sampler":
        """Return the sampler of one row.

        Args:
            i: Index of the row, 0 to B - 1.

        Returns:
            A sampler with one number for each field.

        Raises:
            IndexError: A field has no number for this row.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Sampler(**{name: value[i] if isinstance(value, tuple) else value for name, value in values.items()})

    @staticmethod
    def joined(samplers: "Sequence[Sampler]") -> "Sampler":
        """Join the samplers of several rows into one sampler.

        Args:
            samplers: One sampler for each row, each with one number for each field.

        Returns:
            A sampler with one number per row for each field that differs between the samplers.
        """
        columns = {field.name: tuple(getattr(each, field.name) for each in samplers) for field in fields(Sampler)}
        return Sampler(**{name: values if len(set(values)) > 1 else values[0] for name, values in columns.items()})

    def _is_on(self, name: str, off: float) -> bool:
        value = getattr(self, name)
        return any(each != off for each in (value if isinstance(value, tuple) else (value,)))

    def probabilities(self, logits: Tensor, seen: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """Return the probabilities of the next token of each row.

        Args:
            logits: Logits (B, V) of any float type and device. Infinite logits are limits: tokens at +inf share all
                probability, and tokens at -inf have no probability.
            seen: Mask (B, V) bool of the tokens that occurred in each row's prompt or text; needed for
                `repetition_penalty`.
            counts: Number of times (B, V) that each row's generated text contains each token; needed for
                `presence_penalty` and `frequency_penalty`.

        Returns:
            Probabilities (B, V), float64 on the CPU; each row sums to 1.

        Raises:
            ValueError: A row holds NaN or only -inf, a field has neither 1 nor B values, or a penalty is on and `seen`
                or `counts` is None.
        """
        rows, V = numbers(logits), logits.shape[1]
        p = np.zeros(rows.shape)
        listed = None if seen is None else [row.nonzero().flatten().tolist() for row in seen]
        counted = None if counts is None else [{t: row[t] for t in row.nonzero()[0]} for row in counts.cpu().numpy()]
        for at, tokens, weights in self._filtered(rows, listed, counted):
            # A cumulative sum has the same bits with further weights 0.
            normalized = weights / weights.cumsum(-1)[:, -1:]
            # A row may list a token again, with weight 0.
            np.add.at(p[at], (np.arange(len(weights))[:, None], np.arange(V) if tokens is None else tokens), normalized)
        return torch.from_numpy(p)

    def draw(
        self,
        logits: np.ndarray,
        seen: Sequence[Collection[int]] | None = None,
        counts: Sequence[Mapping[int, int]] | None = None,
        *,
        u: np.ndarray,
    ) -> np.ndarray:
        """Draw the next token of each row, by the inverse of its cumulative distribution.

        Args:
            logits: Logits (B, V), float32 or float64.
            seen: For each row the different tokens that occurred in its context.
            counts: For each row the number of times that the generated text contains each of its tokens.
            u: Random numbers (B,), from 0 to less than 1.

        Returns:
            Token ids (B,) int64.

        Raises:
            ValueError: As for `probabilities`.
        """
        found = np.empty(len(logits), np.int64)
        for at, tokens, weights in self._filtered(logits, seen, counts):
            index = search(weights, u[at])
            found[at] = index if tokens is None else np.take_along_axis(tokens, index[:, None], -1)[:, 0]
        return found

    def _filtered(
        self,
        logits: np.ndarray,
        seen: Sequence[Collection[int]] | None,
        counts: Sequence[Mapping[int, int]] | None,
    ) -> Iterator[tuple[slice, np.ndarray | None, np.ndarray]]:
        """Yield some rows of a batch at a time, with the tokens (rows, M) that can stay and their weights (rows, M).

        The probabilities of the rows are proportional to the weights. The weights of removed tokens are 0. The tokens
        are in ascending order; None: all tokens, M = V. If the rows have different numbers of tokens, token 0 with
        weight 0 fills the shorter rows.
        """
        B, V = logits.shape
        columns = {field.name: self._column(field.name, B) for field in fields(self)}
        seen, counts = self._needed(seen, counts)
        size = 1 if V > LARGE else max(1, B)
        for at in (slice(begin, begin + size) for begin in range(0, B, size)):
            own = {name: column if len(column) == 1 else column[at] for name, column in columns.items()}
            x = logits[at]
            if seen is not None or counts is not None:
                x = x.astype(np.float64, order="C")
            if seen is not None:
                penalize_seen(x, seen[at], own["repetition_penalty"])
            if counts is not None:
                penalize_counted(x, counts[at], own["presence_penalty"], own["frequency_penalty"])
            largest = x.max(-1, keepdims=True)
            if not (largest > -math.inf).all():
                row = int((largest[:, 0] > -math.inf).argmin())
                fault = "hold NaN" if np.isnan(largest[row]) else "are all -inf"
                raise ValueError(f"logits of row {at.start + row} {fault}; a row needs a number above -inf, and no NaN")
            yield at, *_survivors(x, largest.astype(np.float64), own)

    def _needed(
        self, seen: Sequence[Collection[int]] | None, counts: Sequence[Mapping[int, int]] | None
    ) -> tuple[Sequence[Collection[int]] | None, Sequence[Mapping[int, int]] | None]:
        """Return `seen` and `counts`, each as None if no penalty uses it. Raise ValueError if a penalty lacks it."""
        is_seen_used = self._is_on("repetition_penalty", 1)
        are_counts_used = self._is_on("presence_penalty", 0) or self._is_on("frequency_penalty", 0)
        if is_seen_used and seen is None:
            raise ValueError(
                "repetition_penalty is on, but seen is None; pass the tokens of each row's prompt and text"
            )
        if are_counts_used and counts is None:
            raise ValueError("a penalty on generated tokens is on, but counts is None; pass the counts of each row")
        return seen if is_seen_used else None, counts if are_counts_used else None

    def _column(self, name: str, rows: int) -> np.ndarray:
        """Return a field as (1, 1) or (B, 1), to broadcast over (B, V)."""
        column = np.array(getattr(self, name), np.float64).reshape(-1, 1)
        if len(column) not in (1, rows):
            raise ValueError(f"{name} has {len(column)} values for {rows} rows; give one value, or one per row")
        return column


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        # The value is an integer larger than any float.
        return False


def numbers(logits: Tensor) -> np.ndarray:
    """Return logits as an array of float64, or of float32 if float32 holds them exactly."""
    x = logits.detach().cpu()
    return (x if x.dtype == torch.float64 else x.float()).numpy()


def _survivors(
    logits: np.ndarray, largest: np.ndarray, settings: Mapping[str, np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return tokens (B, M), None for all tokens, and their weights (B, M), which are 0 for removed tokens.

    weight = exp((logit - largest) / temperature). If V > LARGE, then B is 1.
    """
    temperature, top_k, top_p = settings["temperature"], settings["top_k"], settings["top_p"]
    greedy = temperature == 0
    if greedy.all():
        # numpy's argmax returns the first of equal numbers, as documented.
        return logits.argmax(-1)[:, None], np.ones((len(logits), 1))
    weights = _weights(logits, largest, np.where(greedy, 1, temperature))
    total = weights.sum(-1, keepdims=True)
    p_max = 1 / total
    threshold = np.minimum(settings["top_a"] * p_max ** settings["top_a_power"], p_max)
    floor = np.maximum(settings["min_p"] * p_max, threshold)
    # A token stays if fewer than `count` tokens rank before it, and if the sum of their probabilities is below `mass`.
    count = np.where(greedy, 1, np.where(top_k == 0, np.inf, top_k))
    # The smallest limit is above 0, because the most probable token always stays.
    mass = np.where(top_p == 1, np.inf, np.maximum(top_p - TOP_P_ERROR, 1e-300))
    is_ranked = bool((np.minimum(count, mass) < np.inf).any())
    if not (is_ranked or floor.any()):
        return None, weights
    tokens = None
    candidates = weights >= _bound(weights, total, floor, count, top_p)
    # Copies of most of the numbers take more time than they save.
    if np.count_nonzero(candidates) < candidates.size / 2:
        tokens, logits, weights = _selected(candidates, logits, weights)
    p = weights / total
    keep = p >= floor
    if is_ranked:
        keep &= leading(logits, p, count, mass)
    return tokens, np.where(keep, weights, 0)


def _weights(logits: np.ndarray, largest: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """Return exp((logits - largest) / temperature), (B, V) float64."""
    # An overflow to -infinity is the right limit for temperatures near 0.
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.subtract(logits, largest, dtype=np.float64)
        if np.isinf(largest).any():
            # inf - inf is NaN.
            difference[logits == largest] = 0
        if (temperature != 1).any():
            difference /= temperature
    weights: np.ndarray = np.exp(difference, out=difference)
    return weights


def _bound(
    weights: np.ndarray, total: np.ndarray, floor: np.ndarray, count: np.ndarray, top_p: np.ndarray
) -> np.ndarray:
    """Return a number (B, 1) that the weight of each token that stays reaches, from weights (B, V)."""
    # The subtrahends cover the rounding of floor * total.
    V = weights.shape[1]
    bounds = [floor * total * (1 - 1e-9) - 1e-300]
    is_counted = count < np.inf
    if is_counted.any():
        bounds.append(np.where(is_counted, reached(weights, count[is_counted].max()), -np.inf))
    if (top_p < 1).any():
        # If the largest weights have enough probability, all tokens that stay are among the largest weights.
        few = reached(weights, min(FEW, V // 8))
        at = np.flatnonzero(weights >= few)
        sums = np.bincount(at // V, weights.ravel()[at], len(weights))[:, None]
        is_enough = (few > 0) & (sums >= top_p * total)
        # All tokens with smaller weights than this bound together have a probability below 1 - top_p.
        rest = (1 - top_p) * total / V
        bounds.append(np.where(top_p < 1, np.where(is_enough, few, rest), -np.inf))
    return functools.reduce(np.maximum, bounds)


def _selected(mask: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens in a mask (B, V), in ascending order, with their logits and weights, each as (B, M).

    M is the largest number of tokens of a row. The other rows end with tokens of logit -inf and weight 0.
    """
    at = np.flatnonzero(mask)
    if len(mask) == 1:
        return at[None], logits[:, at], weights[:, at]
    row, token = divmod(at, mask.shape[1])
    sizes = np.bincount(row, minlength=len(mask))[:, None]
    is_used = np.arange(sizes.max()) < sizes  # (B, M)
    tokens, own_weights = np.zeros(is_used.shape, np.int64), np.zeros(is_used.shape)
    own_logits = np.full(is_used.shape, -np.inf, logits.dtype)
    tokens[is_used], own_logits[is_used], own_weights[is_used] = token, logits.ravel()[at], weights.ravel()[at]
    return tokens, own_logits, own_weights
