"""Tokenization by longest match: at each position, the token is the longest entry of the vocabulary that matches.

The C code searches a trie. Without a C compiler, Python code searches a dictionary and gives the same ids.
"""

import ctypes
import logging
import multiprocessing
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from timemix.runtime.native import library

logger = logging.getLogger("timemix")

BLOCK = 1 << 20
"""Largest number of tokens of a call of C code. Ctrl-C takes effect between two calls."""

_NODE = np.dtype([("row", np.int32), ("token", np.int32), ("low", np.uint16), ("span", np.uint16)], align=True)


class LongestMatch:
    """Encoder of bytes by longest match.

    Args:
        pieces: Bytes of each token, by id. Empty pieces match nothing. All 256 single bytes must be among the pieces.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    def encode(self, text: bytes) -> np.ndarray:
        """Encode bytes.

        Args:
            text: Any bytes.

        Returns:
            Token ids (tokens,), int32.
        """
        return self.encode_in_python(text) if _library() is None else self.encode_in_c(text)

    def encode_in_c(self, text: bytes) -> np.ndarray:
        """Encode bytes with the C code."""
        code = _library()
        assert code is not None
        nodes, children = self._trie
        position = ctypes.c_int64(0)
        blocks = [np.empty(0, np.int32)]
        while position.value < len(text):
            ids = np.empty(min(len(text) - position.value, BLOCK), np.int32)
            given = (nodes.ctypes.data, children.ctypes.data, text, len(text))
            count = code(*given, ctypes.byref(position), ids.ctypes.data, len(ids))
            blocks.append(ids[:count])
        return np.concatenate(blocks)

    def encode_in_python(self, text: bytes) -> np.ndarray:
        """Encode bytes without C code."""
        id_of, lengths_after = self._dictionary
        ids = []
        position = 0
        while position < len(text):
            for length in lengths_after.get(text[position : position + 2], ()):
                # At the end of the text, a slice may be shorter than `length`. Then it is the longest possible match.
                piece = text[position : position + length]
                if piece in id_of:
                    break
            else:
                piece = text[position : position + 1]
            ids.append(id_of[piece])
            position += len(piece)
        return np.array(ids, np.int32)

    @cached_property
    def _dictionary(self) -> tuple[dict[bytes, int], dict[bytes, list[int]]]:
        """The id of each piece; and by the first two bytes of a piece, the lengths of such pieces, longest first."""
        id_of = {piece: i for i, piece in enumerate(self._pieces) if piece}
        lengths: defaultdict[bytes, list[int]] = defaultdict(list)
        for beginning, length in sorted({(piece[:2], len(piece)) for piece in id_of if len(piece) > 1}, reverse=True):
            lengths[beginning].append(length)
        return id_of, lengths

    @cached_property
    def _trie(self) -> tuple[np.ndarray, np.ndarray]:
        """The arrays `nodes` and `children` of longest_match.c."""
        edges, token = _edges(self._pieces)
        parent, byte = np.divmod(edges, 256)
        nodes = np.zeros(len(edges) + 1, _NODE)
        nodes["token"] = token
        # The edges of a node are neighbours, in the order of their bytes.
        parents, first = np.unique(parent, return_index=True)
        last = np.append(first[1:], len(edges)) - 1
        nodes["low"][parents] = byte[first]
        nodes["span"][parents] = byte[last] - byte[first] + 1
        ends = np.cumsum(nodes["span"], dtype=np.int64)
        nodes["row"] = ends - nodes["span"]
        children = np.zeros(ends[-1], np.int32)
        children[nodes["row"][parent] + byte - nodes["low"][parent]] = np.arange(1, len(nodes))
        return nodes, children


def _edges(pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of the trie of all pieces, level by level.

    Args:
        pieces: Bytes of each token, by id.

    Returns:
        256 * parent + byte for each edge (edges,), in ascending order. Edge i leads to node i + 1.
        The id of the piece that ends in each node, or -1 (nodes,).
    """
    text = np.frombuffer(b"".join(pieces), np.uint8).astype(np.int64)
    lengths = np.array([len(piece) for piece in pieces])
    starts = np.cumsum(lengths) - lengths
    # The pieces that are longer than the current depth, and the node that each of these pieces has reached.
    ids = np.flatnonzero(lengths)
    node = np.zeros(len(ids), np.int64)
    levels, tokens, count, depth = [np.empty(0, np.int64)], [np.full(1, -1)], 1, 0
    while len(ids):
        edges, place = np.unique(256 * node + text[starts[ids] + depth], return_inverse=True)
        depth += 1
        ends = lengths[ids] == depth
        token = np.full(len(edges), -1)
        token[place[ends]] = ids[ends]
        ids, node = ids[~ends], count + place[~ends]
        count += len(edges)
        levels.append(edges)
        tokens.append(token)
    return np.concatenate(levels), np.concatenate(tokens)


@cache
def _library() -> "ctypes._NamedFuncPointer | None":
    """Return the C function, or None if the C code cannot be compiled. A warning then gives the reason."""
    code, reason = library(Path(__file__).with_suffix(".c"))
    if code is None:
        if multiprocessing.parent_process() is None:
            logger.warning("the World tokenizer encodes without C code, which is slower (%s)", reason)
        return None
    function = code.timemix_longest_match
    address, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [address, address, ctypes.c_char_p, number, ctypes.POINTER(number), address, number]
    function.restype = number
    return function
