"""Snapshots of states after prefixes of prompts: a prompt that begins like an earlier prompt continues from a snapshot.

A chain of digests names the prefixes of a text, which is cut into pieces of equally many tokens:

    digest 0 = H(scope)        digest k = H(digest k-1, token ids of piece k)

Digest k names the first k pieces, so a search for the longest known prefix costs one look-up per piece. H is BLAKE2b
with 256 bits, for which nobody can construct two texts of equal digest.

A prompt of K pieces stores the states after K, K-1, K-2, K-4, K-8 ... pieces: at most 2 + log2(K) snapshots. If a later
prompt has other tokens in the last d of these pieces, the nearest snapshot lies less than d pieces before these tokens.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from timemix.errors import InvalidValue
from timemix.models.state import State

OVERHEAD = 1024
"""Number of bytes that a snapshot needs for each tensor beside its numbers, for objects of Python and PyTorch."""


@dataclass
class Prefix:
    """The prefixes of one text, for which a cache can have snapshots.

    Args:
        digests: Digest k of the first k pieces, for all whole pieces of the prompt, and of the generated text if
            `allows_decoded`.
        size: Number of tokens of a piece.
        last: Number of whole pieces of the prompt.
        allows_decoded: Whether the text may use and store states of tokens that were read one by one.
        is_decoded: Whether the state of the text is such a state.
    """

    digests: tuple[bytes, ...]
    size: int
    last: int
    allows_decoded: bool = False
    is_decoded: bool = False

    def grow(self, tokens: Sequence[int]) -> None:
        """Add the prefix that ends with a piece of generated tokens."""
        self.digests = (*self.digests, _next_digest(self.digests[-1], np.array(tokens, np.int64)))
        self.is_decoded = True


def new_prefix(scope: str, prompt: Sequence[int], size: int, *, allows_decoded: bool = False) -> Prefix:
    """Return the prefixes of a prompt.

    Args:
        scope: Name of the group of requests that share snapshots.
        prompt: Token ids.
        size: Number of tokens of a piece.
        allows_decoded: Whether the text may use and store states of tokens that were read one by one.

    Returns:
        The prefixes.
    """
    # A snapshot lacks the last token of its prompt, which each sample processes itself.
    ids = np.array(prompt[:-1], np.int64)
    digests = [_digest(scope.encode(errors="surrogatepass"))]
    for end in range(size, len(ids) + 1, size):
        digests.append(_next_digest(digests[-1], ids[end - size : end]))
    return Prefix(tuple(digests), size, len(digests) - 1, allows_decoded)


def _next_digest(digest: bytes, piece: np.ndarray) -> bytes:
    return _digest(digest + piece.tobytes())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=32).digest()


class PrefixCache:
    """Store snapshots of the states of one engine.

    If the cache is full, a new snapshot replaces the least recently used snapshots. `Engine.step` calls `find` and
    `store`. Any thread may read the counts.

    Args:
        max_bytes: Largest size of all snapshots in bytes, at least 0. A larger snapshot is not stored.

    Attributes:
        nbytes: Size of all snapshots in bytes.
        hits: Number of texts that continued from a snapshot.
        misses: Number of texts with a prompt of at least one whole piece, for which there was no snapshot.

    Raises:
        InvalidValue: `max_bytes` is below 0.
    """

    def __init__(self, max_bytes: int) -> None:
        if not max_bytes >= 0:
            raise InvalidValue(f"max_bytes is {max_bytes!r}; it must be a number of bytes, at least 0")
        self.max_bytes = max_bytes
        self.nbytes = self.hits = self.misses = 0
        # The key is a digest, and whether the state was decoded. The most recently used snapshot is the last.
        self._snapshots: OrderedDict[tuple[bytes, bool], State] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of snapshots."""
        return len(self._snapshots)

    def find(self, prefix: Prefix) -> tuple[int, State] | None:
        """Find the snapshot of the longest prefix of a text.

        Args:
            prefix: The prefixes of the text.

        Returns:
            Number of tokens and the state of one row after them, which must not be changed; None without a snapshot.
        """
        for number in range(prefix.last, 0, -1):
            for is_decoded in (False, True)[: 1 + prefix.allows_decoded]:
                if self._is_known(key := (prefix.digests[number], is_decoded)):
                    self.hits += 1
                    prefix.is_decoded = is_decoded
                    return number * prefix.size, self._snapshots[key]
        self.misses += prefix.last > 0
        return None

    def store(self, prefix: Prefix, tokens: Sequence[int], position: int, state: Callable[[], State]) -> None:
        """Store the state of a text at the end of a piece, if a snapshot of this prefix is wanted and not known.

        Args:
            prefix: The prefixes of the text.
            tokens: Newest tokens in the state, at least one piece.
            position: Number of tokens in the state, a multiple of the size of a piece.
            state: Function that returns a copy of the state of one row.
        """
        number = position // prefix.size
        if number > prefix.last:
            if not prefix.allows_decoded:
                return
            if number - 1 > prefix.last:
                # Of an answer, only the newest snapshot is kept: a prompt that continues the answer contains all of it.
                self._remove((prefix.digests[number - 1], True))
            prefix.grow(tokens[-prefix.size :])
        # The numbers 0, 1, 2, 4, 8 ... have no bit in common with the number before.
        distance = max(0, prefix.last - number)
        key = prefix.digests[number], prefix.is_decoded
        if distance & (distance - 1) == 0 and not self._is_known(key):
            self._put(key, state())

    def _is_known(self, key: tuple[bytes, bool]) -> bool:
        """Return whether the cache has a snapshot, which then counts as the most recently used."""
        if key not in self._snapshots:
            return False
        self._snapshots.move_to_end(key)
        return True

    def _put(self, key: tuple[bytes, bool], state: State) -> None:
        if size_of(state) > self.max_bytes:
            return
        self._snapshots[key] = state
        self.nbytes += size_of(state)
        while self.nbytes > self.max_bytes:
            self._remove(next(iter(self._snapshots)))

    def _remove(self, key: tuple[bytes, bool]) -> None:
        state = self._snapshots.pop(key, None)
        self.nbytes -= 0 if state is None else size_of(state)


def size_of(state: State) -> int:
    """Return the size of a snapshot in bytes.

    Args:
        state: State of one row.

    Returns:
        The size of the tensors, and of the objects that hold them.
    """
    return state.nbytes + OVERHEAD * (1 + sum(map(len, state.layers)))
