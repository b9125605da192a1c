"""Near-duplicates of documents, found by MinHash signatures and bands in one pass.

The shingles of a document are its substrings of SHINGLE characters. The similarity of two documents A and B is the
Jaccard index of their sets of shingles, J = |A & B| / |A | B|.

Signature: each shingle has a random hash of 64 bits. Value i of a signature (i = 0, ..., VALUES - 1) is the smallest
hash at or above i 2^64 / VALUES, or the smallest of all hashes if there is none. The first hash of A | B at or above
that point belongs to each shingle of A | B with equal probability, and both signatures have it if and only if its
shingle is in A & B. So P(value i of A = value i of B) = J. One hash per shingle gives all values.

Only the lowest 8 bits of each value are stored. They are equal by chance with probability 1/256, so a share m of equal
values estimates J = (m - 1/256) / (1 - 1/256). With at least VALUES distinct shingles, the standard error is about
sqrt(J (1 - J) / VALUES): 0.035 at J = 0.8. In shorter documents, several values have the same hash, so the error is
larger.

Bands: two documents are compared if one of the VALUES / ROWS bands of ROWS values is equal in both, which has the
probability 1 - (1 - J^ROWS)^(VALUES / ROWS): 0.9999 at J = 0.9, 0.95 at J = 0.8, 0.06 at J = 0.5.

Source: Broder, On the resemblance and containment of documents, 1997 (MinHash); Shrivastava and Li, Densifying one
    permutation hashing via rotation, 2014 (one hash per shingle); Li and Koenig, b-bit minwise hashing, 2010 (8 bits).
"""

import numpy as np

SHINGLE, VALUES, ROWS = 8, 128, 8
SIMILARITY = 0.8
"""Least estimated Jaccard index of a near-duplicate."""
COMPARED = 16
"""Largest number of earlier documents of a band with which a document is compared."""
BLOCK = 1 << 16
"""Number of characters hashed at a time."""

_FACTORS = tuple(np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))
_ROWS_EQUAL = round(VALUES * (SIMILARITY * 255 / 256 + 1 / 256))
"""Number of equal values from which the estimate is about SIMILARITY."""


class Signature:
    """Signature of a document, which is read in pieces."""

    def __init__(self) -> None:
        self._rest = ""
        self._least = np.full(VALUES, 2**64 - 1, np.uint64)
        self._is_short = True

    def add(self, text: str) -> None:
        """Add a piece of the document."""
        text = self._rest + text
        for start in range(0, len(text) - SHINGLE + 1, BLOCK):
            self._add_hashes(shingle_hashes(text[start : start + BLOCK + SHINGLE - 1]))
            self._is_short = False
        self._rest = text[-(SHINGLE - 1) :]

    def _add_hashes(self, hashes: np.ndarray) -> None:
        np.minimum.at(self._least, _bins(hashes), hashes)

    def values(self) -> bytes:
        """Return the lowest 8 bits of each value, VALUES bytes."""
        if self._is_short:
            # The only shingle of a short document is the document, filled up with spaces.
            self._add_hashes(shingle_hashes(self._rest.ljust(SHINGLE)))
        return _values(self._least[None]).tobytes()


def signatures(texts: list[str]) -> np.ndarray:
    """Return the signatures of many short documents, which is faster than one by one.

    Args:
        texts: The documents.

    Returns:
        The lowest 8 bits of each value, (documents, VALUES), uint8.
    """
    texts = [text.ljust(SHINGLE) for text in texts]
    lengths = np.array([len(text) for text in texts])
    hashes = shingle_hashes("".join(texts))  # (characters - SHINGLE + 1,)
    owner = np.repeat(np.arange(len(texts)), lengths)[: len(hashes)]
    # The shingles that begin in the last characters of a document end in the next document.
    ends = np.cumsum(lengths)[:-1, None] - np.arange(1, SHINGLE)
    whole = np.ones(len(hashes), bool)
    whole[ends.ravel()] = False
    least = np.full((len(texts), VALUES), 2**64 - 1, np.uint64)
    hashes = hashes[whole]
    np.minimum.at(least.reshape(-1), owner[whole] * VALUES + _bins(hashes), hashes)
    return _values(least)


def _bins(hashes: np.ndarray) -> np.ndarray:
    """Return the bin of each hash: bin i has the hashes from i 2^64 / VALUES to below (i + 1) 2^64 / VALUES."""
    return (hashes >> np.uint64(64 - VALUES.bit_length() + 1)).astype(np.intp)


def _values(least: np.ndarray) -> np.ndarray:
    """Return the lowest 8 bits of the values of signatures, (documents, VALUES), uint8.

    Args:
        least: Least hash of each bin, 2^64 - 1 for an empty bin, (documents, VALUES), uint64.
    """
    # An empty bin gets the least hash of the next bin that has one, and the first of all hashes after the last bin.
    values = np.minimum.accumulate(least[:, ::-1], axis=1)[:, ::-1]
    return np.where(values == np.uint64(2**64 - 1), values[:, :1], values).astype(np.uint8)


def shingle_hashes(text: str) -> np.ndarray:
    """Return a random hash of each shingle of a text, (characters - SHINGLE + 1,). Line breaks count as spaces."""
    code: np.ndarray = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    code = np.maximum(code, ord(" ")).astype(np.uint64)
    # Polynomial of the codes of 2, then 4, then 8 characters: hash of both parts, each of n characters.
    for n, factor in zip((1, 2, 4), _FACTORS, strict=True):
        code = code[:-n] * factor + code[n:]
    # Each bit of the result depends on each bit of the polynomial.
    for shift, factor in zip((33, 29), _FACTORS, strict=False):
        code ^= code >> np.uint64(shift)
        code *= factor
    code ^= code >> np.uint64(32)
    return code


def near_duplicates(signatures: np.ndarray) -> np.ndarray:
    """Find the documents that are similar to an earlier document.

    Args:
        signatures: Signatures of the documents, (documents, VALUES), uint8.

    Returns:
        Whether each document is a near-duplicate of an earlier one, (documents,), bool. The earlier document may itself
        be a near-duplicate.
    """
    found = np.zeros(len(signatures), bool)
    bands = np.ascontiguousarray(signatures).view(np.uint64)  # (documents, VALUES) -> (documents, VALUES / ROWS)
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        keys = band[order]
        for distance in range(1, COMPARED + 1):
            same = np.flatnonzero(keys[distance:] == keys[:-distance])
            if not len(same):
                break
            same = same[~found[order[same + distance]]]
            for part in np.array_split(same, len(same) // BLOCK + 1):
                earlier, later = signatures[order[part]], signatures[order[part + distance]]
                equal = (earlier == later).sum(1)
                found[order[part[equal >= _ROWS_EQUAL] + distance]] = True
    return found
