"""From logits to the next token: filters on the probabilities, and a draw that depends on nothing else.

Shapes: B rows of a batch, V vocabulary. All arithmetic is float64 on the CPU, row by row, so that a row gives
the same token on every device, alone or in any batch.
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
"""By how much a sum of probabilities from float32 logits may miss `top_p` and still reach it."""

_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0 or more", lambda x: x >= 0),
    "top_k": ("a whole number, 0 or more", lambda x: x >= 0 and x == int(x)),
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "top_a": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "top_a_power": ("0 or more", lambda x: x >= 0),
    "repetition_penalty": ("above 0", lambda x: x > 0),
}


@dataclass(frozen=True)
class Sampler:
    """Describe how logits become the probabilities of the next token.

    Each field is one number for all rows, or a sequence or tensor of B numbers, one per row. The order is always:

    1. `repetition_penalty`.
    2. `temperature`: p = softmax(logits / temperature).
    3. The filters, each judging the same p (not what another filter left): a token stays if every filter keeps it.
       Among equal tokens the lowest ids rank first.
    4. What stays is renormalised. The most probable token always stays.

    Args:
        temperature: At least 0; 0 = greedy, all probability on the largest logit, the lowest id among equals.
        top_k: Whole number, at least 0: keep the k most probable tokens; 0 = off.
        top_p: Above 0, at most 1: keep the most probable up to the first whose running sum reaches top_p, within
            1e-6; 1 = off.
        min_p: 0 to 1: keep p >= min_p * p_max; 0 = off.
        top_a: 0 to 1: remove p < top_a * p_max ** top_a_power; 0 = off.
        top_a_power: At least 0.
        repetition_penalty: Above 0: positive logits of tokens seen in the context are divided by it, negative ones
            multiplied; 1 = off.

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
            # Numbers of an array or a tensor are those of Python.
            plain = given.tolist() if hasattr(given, "tolist") else given
            allowed, accepts = _ALLOWED[field.name]
            is_one = not isinstance(plain, Sequence) or isinstance(plain, str)
            for value in [plain] if is_one else plain:
                if not (_is_finite(value) and accepts(value)):
                    raise InvalidValue(f"{field.name} must be {allowed}, not {value!r}")
            # Plain numbers keep samplers comparable and hashable, which tensors are not.
            object.__setattr__(self, field.name, float(plain) if is_one else tuple(map(float, plain)))

    @property
    def is_of_one_row(self) -> bool:
        """Whether each field is one number."""
        return not any(isinstance(getattr(self, field.name), tuple) for field in fields(self))

    def row(self, i: int) -> "Sampler":
        """The sampler of row i alone. Raises IndexError for a row that it does not have."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Sampler(**{name: value[i] if isinstance(value, tuple) else value for name, value in values.items()})

    @staticmethod
    def joined(samplers: "Sequence[Sampler]") -> "Sampler":
        """One sampler for rows with a sampler each."""
        columns = {field.name: tuple(getattr(each, field.name) for each in samplers) for field in fields(Sampler)}
        return Sampler(**{name: values if len(set(values)) > 1 else values[0] for name, values in columns.items()})

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Probabilities of the next token, (B, V) float64 on the CPU, each row summing to 1.

        logits (B, V), any float type and device; infinite ones are limits: tokens at +inf share all
        probability, -inf has none. seen (B, V) bool: tokens that occurred in the row's context.

        Raises ValueError for a row that holds NaN or only -inf, for fields whose length is not B, and where
        `repetition_penalty` is on without `seen`.
        """
        # numpy: its calls on a few numbers take half the time of torch's.
        x = logits.detach().cpu().double().numpy()
        B, V = x.shape
        if self.repetition_penalty != 1:
            if seen is None:
                raise ValueError("repetition_penalty needs `seen`, the tokens of each row's context")
            penalty = self._column("repetition_penalty", B)
            x = np.where(seen.cpu().numpy(), np.where(x > 0, x / penalty, x * penalty), x)

        largest = x.max(-1, keepdims=True)
        if not (largest > -math.inf).all():
            row = int((largest[:, 0] > -math.inf).argmin())
            raise ValueError(f"logits of row {row} {'hold NaN' if np.isnan(largest[row]) else 'are all -inf'}")

        temperature = self._column("temperature", B)
        greedy = temperature == 0
        # The largest is set, not subtracted: inf - inf is NaN.
        difference = np.subtract(x, largest, out=np.zeros_like(x), where=x != largest)
        # Infinity is the right limit for temperatures near 0.
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
            # Ranked by logit: two of them can differ where their probabilities round to the same.
            order = (-x).argsort(-1, kind="stable")
            ranked = np.take_along_axis(p, order, -1)
            sum_before = ranked.cumsum(-1) - ranked
            in_top_k = (np.arange(V) < top_k) | (top_k == 0)
            in_top_p = (sum_before < top_p - TOP_P_ERROR) | (top_p == 1) | (np.arange(V) == 0)
            kept = np.empty_like(keep)
            np.put_along_axis(kept, order, in_top_k & in_top_p, -1)
            keep &= kept
        if greedy.any():
            # numpy's argmax promises the first of equals.
            keep &= (np.arange(V) == x.argmax(-1)[:, None]) | ~greedy
        weights = np.where(keep, weights, 0)
        return torch.from_numpy(weights / weights.sum(-1, keepdims=True))

    def _column(self, name: str, rows: int) -> np.ndarray:
        """A field as (1, 1) or (B, 1), to broadcast over (B, V)."""
        column = np.array(getattr(self, name), np.float64).reshape(-1, 1)
        if len(column) not in (1, rows):
            raise ValueError(f"{name} has {len(column)} values for {rows} rows")
        return column


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        # An integer larger than any float.
        return False


def draw(
    probabilities: Tensor,
    *,
    seed: int | Sequence[int] | Tensor,
    sample: Sequence[int] | Tensor,
    position: Sequence[int] | Tensor,
) -> Tensor:
    """One token per row, (B,) int64, by the inverse of the row's cumulative distribution.

    probabilities (B, V); `seed` one for all rows or (B,); `sample` (B,) the number of the text being written;
    `position` (B,) of the token in it. The randomness of a row is Philox (Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3") with key (seed, sample) and counter position: it depends on nothing
    else, and no state is carried. A token of probability 0 is never drawn.

    Raises TimemixError for a seed outside 0 to 2^64 - 1, ValueError for a row that does not sum to 1 (within 0.01).
    """
    seeds = [seed] * len(probabilities) if isinstance(seed, int) else _integers(seed)
    counters = zip(seeds, _integers(sample), _integers(position), strict=True)
    generator = np.random.Philox(key=0)
    u = np.array([_uniform(generator, *counter) for counter in counters])

    cumulative = probabilities.detach().cpu().double().numpy().cumsum(-1)
    total = cumulative[:, -1]
    if not (np.abs(total - 1) < 0.01).all():
        raise ValueError(f"probabilities of each row must sum to 1, not {total.tolist()}")
    # u < 1 also after rounding, so u * total < total: the count below stays inside the vocabulary.
    return torch.from_numpy((cumulative <= (u * total)[:, None]).sum(-1))


def _uniform(generator: np.random.Philox, seed: int, sample: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2^-53; what the generator gave before does not matter."""
    if not 0 <= seed < 2**64:
        raise InvalidValue(f"seed must be a whole number from 0 to 2^64 - 1, not {seed}")
    # A fifth of the time of a new generator.
    state = generator.state
    state["state"] = {"key": np.array([seed, sample], np.uint64), "counter": np.array([position, 0, 0, 0], np.uint64)}
    state["buffer_pos"] = 4
    generator.state = state
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def _integers(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(value) for value in values]
