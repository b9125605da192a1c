"""From logits to the next token: filters remove tokens, and a draw chooses one of the remaining tokens.

Shapes: B is the number of rows of a batch, V is the size of the vocabulary. All arithmetic is float64 on the CPU, row
by row, so that a row gets the same token on every device, alone or in any batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timemix.errors import InvalidValue

PerRow = float | Sequence[float] | Tensor

TOP_P_ERROR = 1e-6
"""Tolerance in the comparison of a sum of probabilities with `top_p`: float32 logits give no more exact sums."""

_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("at least 0", lambda x: x >= 0),
    "top_k": ("a whole number, at least 0", lambda x: x >= 0 and x == int(x)),
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "top_a": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "top_a_power": ("at least 0", lambda x: x >= 0),
    "repetition_penalty": ("above 0", lambda x: x > 0),
}


@dataclass(frozen=True)
class Sampler:
    """Describe the conversion of logits to the probabilities of the next token.

    Each field is one number for all rows, or a sequence or tensor of B numbers, one per row. The operations always have
    this order:

    1. `repetition_penalty`.
    2. `temperature`: p = softmax(logits / temperature).
    3. The filters. Each filter is applied to the same p, not to the result of another filter. A token stays if every
       filter keeps the token. Among equally probable tokens the lowest ids rank first. The most probable token always
       stays.
    4. The probabilities of the tokens that stay are divided by their sum.

    Args:
        temperature: Divisor of the logits, at least 0; 0 gives all probability to the largest logit, or to the lowest
            id among equal logits.
        top_k: Number of most probable tokens that stay, at least 0; 0 = off.
        top_p: Probability, above 0 and at most 1: the most probable tokens stay, until their probabilities sum to top_p
            within 1e-6; 1 = off.
        min_p: Share of the largest probability, 0 to 1: tokens with p >= min_p * p_max stay; 0 = off.
        top_a: Factor, 0 to 1: tokens with p < top_a * p_max ** top_a_power are removed; 0 = off.
        top_a_power: Exponent of p_max in the threshold of top_a, at least 0.
        repetition_penalty: Penalty, above 0: positive logits of tokens seen in the context are divided by the penalty,
            negative logits are multiplied by the penalty; 1 = off.

    Raises:
        InvalidValue: A value is out of its range.

    Source:
        repetition_penalty: CTRL, arXiv 1909.05858. top_k: arXiv 1805.04833. top_p: arXiv 1904.09751.
        min_p: arXiv 2407.01082. top_a: RWKV-LM 0.01, doi 10.5281/zenodo.5196577.
    """

    temperature: PerRow = 1.0
    top_k: PerRow = 0
    top_p: PerRow = 1.0
    min_p: PerRow = 0.0
    top_a: PerRow = 0.0
    top_a_power: PerRow = 2.0
    repetition_penalty: PerRow = 1.0

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

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return the probabilities of the next token of each row.

        Args:
            logits: Logits (B, V) of any float type and device. Infinite logits are limits: tokens at +inf share all
                probability, and tokens at -inf have no probability.
            seen: Mask (B, V) bool of the tokens that occurred in each row's context; needed for `repetition_penalty`.

        Returns:
            Probabilities (B, V), float64 on the CPU; each row sums to 1.

        Raises:
            ValueError: A row holds NaN or only -inf, a field has neither 1 nor B values, or `repetition_penalty` is on
                and `seen` is None.
        """
        # For small arrays, a numpy call takes half the time of a torch call.
        x = logits.detach().cpu().double().numpy()
        B, V = x.shape
        if self.repetition_penalty != 1:
            if seen is None:
                raise ValueError("repetition_penalty is on, but seen is None; pass the tokens of each row's context")
            penalty = self._column("repetition_penalty", B)
            x = np.where(seen.cpu().numpy(), np.where(x > 0, x / penalty, x * penalty), x)

        largest = x.max(-1, keepdims=True)
        if not (largest > -math.inf).all():
            row = int((largest[:, 0] > -math.inf).argmin())
            fault = "hold NaN" if np.isnan(largest[row]) else "are all -inf"
            raise ValueError(f"logits of row {row} {fault}; a row needs a number above -inf, and no NaN")

        temperature = self._column("temperature", B)
        greedy = temperature == 0
        # The difference at the largest logit is set to 0, not computed: inf - inf is NaN.
        difference = np.subtract(x, largest, out=np.zeros_like(x), where=x != largest)
        # An overflow to infinity is the right limit for temperatures near 0.
        with np.errstate(over="ignore"):
            weights = np.exp(difference / np.where(greedy, 1, temperature))
        total = weights.sum(-1, keepdims=True)
        p = weights / total
        p_max = 1 / total
        keep = np.ones(x.shape, bool)
        if self.min_p != 0:
            keep &= p >= self._column("min_p", B) * p_max
        if self.top_a != 0:
            threshold = self._column("top_a", B) * p_max ** self._column("top_a_power", B)
            keep &= p >= np.minimum(threshold, p_max)
        if self.top_k != 0 or self.top_p != 1:
            top_k, top_p = self._column("top_k", B), self._column("top_p", B)
            # Rank the tokens by logit: different logits can have probabilities that round to the same number.
            order = (-x).argsort(-1, kind="stable")
            ranked = np.take_along_axis(p, order, -1)
            sum_before = ranked.cumsum(-1) - ranked
            in_top_k = (np.arange(V) < top_k) | (top_k == 0)
            in_top_p = (sum_before < top_p - TOP_P_ERROR) | (top_p == 1) | (np.arange(V) == 0)
            kept = np.empty_like(keep)
            np.put_along_axis(kept, order, in_top_k & in_top_p, -1)
            keep &= kept
        if greedy.any():
            # numpy's argmax returns the first of equal numbers, as documented.
            keep &= (np.arange(V) == x.argmax(-1)[:, None]) | ~greedy
        weights = np.where(keep, weights, 0)
        return torch.from_numpy(weights / weights.sum(-1, keepdims=True))

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


def draw(
    probabilities: Tensor,
    *,
    seed: int | Sequence[int] | Tensor,
    sample: Sequence[int] | Tensor,
    position: Sequence[int] | Tensor,
) -> Tensor:
    """Draw one token for each row, by the inverse of the row's cumulative distribution.

    The random number of a row comes from the generator Philox with key (seed, sample) and counter `position`. The
    random number depends only on the key and the counter, and no generator state is stored. A token of probability 0 is
    never drawn.

    Args:
        probabilities: Probabilities (B, V); each row sums to 1.
        seed: Random seed, 0 to 2^64 - 1: one number for all rows, or (B,).
        sample: Number of each row's text (B,), 0 to 2^64 - 1.
        position: Number of the token in each row's text (B,), at least 0.

    Returns:
        Token ids (B,) int64.

    Raises:
        InvalidValue: A seed is outside 0 to 2^64 - 1.
        ValueError: A row of probabilities does not sum to 1 within 0.01.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    seeds = [seed] * len(probabilities) if isinstance(seed, int) else _integers(seed)
    counters = zip(seeds, _integers(sample), _integers(position), strict=True)
    generator = np.random.Philox(key=0)
    u = np.array([_uniform(generator, *counter) for counter in counters])

    cumulative = probabilities.detach().cpu().double().numpy().cumsum(-1)
    total = cumulative[:, -1]
    if not (np.abs(total - 1) < 0.01).all():
        raise ValueError(f"probabilities has rows that sum to {total.tolist()}; each row must sum to 1")
    # u is below 1 even after rounding, so u * total < total. The count below is therefore an index inside the
    # vocabulary.
    return torch.from_numpy((cumulative <= (u * total)[:, None]).sum(-1))


def _uniform(generator: np.random.Philox, seed: int, sample: int, position: int) -> float:
    """Return a random multiple of 2^-53 in [0, 1) that does not depend on earlier numbers of the generator."""
    if not 0 <= seed < 2**64:
        raise InvalidValue(f"seed is {seed}; it must be a whole number from 0 to 2^64 - 1")
    # Setting the state of a generator takes a fifth of the time that a new generator takes.
    state = generator.state
    state["state"] = {"key": np.array([seed, sample], np.uint64), "counter": np.array([position, 0, 0, 0], np.uint64)}
    state["buffer_pos"] = 4
    generator.state = state
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def _integers(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(value) for value in values]
