"""Random draws by the inverse of a cumulative distribution, with random numbers that no earlier draw changes.

Shapes: B is the number of rows of a batch, and M is the number of candidate tokens.
"""

import numpy as np

from timemix.errors import InvalidValue
from timemix.generation.ranking import LARGE

BLOCK = 64
"""Number of tokens whose random numbers are computed together."""


def search(weights: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Return for each row the first index whose cumulative weight is above u times the sum of the row.

    Args:
        weights: Weights (B, M), at least 0; each row has a weight above 0.
        u: Numbers (B,) from 0 to less than 1.

    Returns:
        Indices (B,) int64.
    """
    if weights.shape[1] > LARGE:
        return np.array([_search_blocks(*each) for each in zip(weights, u, strict=True)])
    cumulative = weights.cumsum(-1)
    # u is below 1 even after rounding, so u * sum < sum. The count below is therefore an index inside the row.
    found: np.ndarray = (cumulative <= (u * cumulative[:, -1])[:, None]).sum(-1)
    return found


def _search_blocks(weights: np.ndarray, u: float) -> int:
    """Return the index of `search` for weights (M,). Sums of blocks take less time than a cumulative sum."""
    size = 256
    cumulative = np.add.reduceat(weights, np.arange(0, len(weights), size)).cumsum()
    target = u * cumulative[-1]
    block = int(cumulative.searchsorted(target, "right"))
    own = weights[block * size : (block + 1) * size]
    inside = own.cumsum() + (cumulative[block - 1] if block else 0)
    # The sum of a block can round to a larger number than its cumulative sum.
    index = min(int(inside.searchsorted(target, "right")), int(own.nonzero()[0][-1]))
    return block * size + index


class Uniforms:
    """The random numbers of one text, a multiple of 2^-53 from 0 to less than 1 for each token.

    The number of a token comes from the generator Philox with key (seed, sample) and the number of the token as its
    counter. No generator state is stored, so texts in one batch get the numbers that they would get alone. A generator
    computes the numbers of a block of tokens together, in a tenth of the time of single numbers.

    Args:
        seed: Random seed, 0 to 2^64 - 1.
        sample: Number of the text, 0 to 2^64 - 1.

    Raises:
        InvalidValue: The seed is out of its range.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """

    def __init__(self, seed: int, sample: int) -> None:
        if not 0 <= seed < 2**64:
            raise InvalidValue(f"seed is {seed}; it must be a whole number from 0 to 2^64 - 1")
        self._key = np.array([seed, sample], np.uint64)
        self._begin = 0
        self._numbers: list[float] = []

    def at(self, position: int) -> float:
        """Return the random number of a token.

        Args:
            position: Number of the token in the text, at least 0.

        Returns:
            The number, which does not depend on the numbers that were requested before.
        """
        if not 0 <= position - self._begin < len(self._numbers):
            generator = np.random.Philox(key=self._key, counter=np.array([position, 0, 0, 0], np.uint64))
            # For each value of its counter, the generator has four numbers of 64 bits.
            bits = generator.random_raw(4 * BLOCK)[::4]
            self._begin, self._numbers = position, ((bits >> 11) * 2.0**-53).tolist()
        return self._numbers[position - self._begin]
