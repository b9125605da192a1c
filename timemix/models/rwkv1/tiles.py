"""Sums over the past for the decode step, computed ahead in tiles: a step then reads little of a long history.

    y[t] = sum_{u<=t} f(t-u) x[u]  =  pending[t] + sum_{start<=u<=t} f(t-u) x[u]

A step needs that sum over its whole past. At long contexts those are more bytes than the weights. With tiles, a step
sums the newest tokens alone, at most TILE of them, from `start` on. The rest was added to pending[t] before, in
products of many inputs and many outputs (the online convolution of Fischer and Stockmeyer, 1974; arXiv 2410.12982):

    whenever TILE more tokens are complete, at position p (a multiple of TILE):
        U = the largest power of two times TILE that divides p
        pending[p ... p+U] += the sums over x[p-U ... p]

Each pair of an input and a later output is in exactly one tile or one step. A token is an input of O(log T) tiles.
Every input lies in the past of every output that it reaches, so rounding is as in `ops.common.spectral`.

The sums are derived from a state: never saved, and recomputed after a change of the state from outside.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.models.state import State
from timemix.ops.common.spectral import spectral_convolution

TILE = 64
"""Tokens of the smallest tile, and the most that a step sums itself."""

FROM = 2048
"""ctx_len from which tiles are faster: the history of a row then exceeds the processor's cache, and is a fifth of the
weights of a model of 17 M parameters."""

_BY_MATRIX = 256
"""Inputs of a tile up to which it is a product with a cached matrix; larger tiles are convolutions."""

_BY_TILES = 1024
"""Tokens of a past up to which its sums are recomputed tile by tile, else by one convolution over the context."""


class Pending:
    """Partial sums for later positions of each row of one state, as far as tiles are complete.

    Args:
        state: the state, of a model of rwkv1.
        filters: f (H, ctx_len) of each layer.
    """

    def __init__(self, state: State, filters: list[Tensor]) -> None:
        self.filters = filters
        # pending of each layer: (B, H, ctx_len, N)
        self.sums = [torch.zeros_like(layer["numerators"]) for layer in state.layers]
        rows = len(state.position)
        # For each row: the position that tiles count from, and its position after the last step, -1 for unknown.
        self._origin = torch.zeros(rows, dtype=torch.int64)
        self._position = torch.full((rows,), -1)
        self._written = _written(state)
        self._matrices: dict[tuple[int, int], Tensor] = {}

    def rows_were_written(self, state: State, rows: Tensor) -> None:
        """Mark rows of the state as overwritten from outside, by one write to each of its tensors.

        Args:
            state: the state.
            rows: the rows (R,) that changed.
        """
        self._position[rows] = -1
        # Any other number of writes may have changed any row.
        once = [(address, count + 1) for address, count in self._written]
        self._written = _written(state)
        if self._written != once:
            self._position.fill_(-1)

    def starts(self, state: State, rows: Tensor) -> Tensor:
        """Return `start` of each row for the next step, after recomputing sums that no longer fit the state.

        Args:
            state: the state.
            rows: the rows (R,) of the step.

        Returns:
            Positions (R,): the first of the newest tokens that the step sums itself.
        """
        if (written := _written(state)) != self._written:
            self._position.fill_(-1)
            self._written = written
        position = state.position[rows]
        for row in rows[self._position[rows] != position].tolist():
            self._recompute(state, row)
        return position - (position - self._origin[rows]) % TILE

    def advance(self, state: State, rows: Tensor) -> None:
        """Add the tiles that are complete after a step.

        Args:
            state: the state after the step.
            rows: the rows (R,) of the step.
        """
        position = state.position[rows]
        self._position[rows] = position
        for row in rows[(position - self._origin[rows]) % TILE == 0].tolist():
            self._add_tile(state, row, int(state.position[row]))

    def _recompute(self, state: State, row: int) -> None:
        """Compute the sums of a row from its history alone."""
        position = int(state.position[row])
        self._origin[row] = 0 if position <= _BY_TILES else position
        for f, sums, layer in zip(self.filters, self.sums, state.layers, strict=True):
            sums[row] = 0
            if position > _BY_TILES:
                # (H, ctx_len, N), zeros from `position` on: outputs there are sums over the past alone.
                x = F.pad(layer["numerators"][row, :, :position], (0, 0, 0, f.shape[1] - position))
                sums[row, :, position:] = _causal_convolution(x, f)[:, position:]
        if position <= _BY_TILES:
            for end in range(TILE, position + 1, TILE):
                self._add_tile(state, row, end)

    def _add_tile(self, state: State, row: int, end: int) -> None:
        """Add the newest U tokens before `end` to the U positions from `end` on, as far as the context goes.

        sums[end + i] += sum_{j<U} f(U + i - j) x[end - U + j].
        """
        left = self.filters[0].shape[1] - end
        if left == 0:
            return
        blocks = (end - int(self._origin[row])) // TILE
        # blocks & -blocks: the largest power of two that divides it.
        U = TILE * (blocks & -blocks)
        for i, (f, sums, layer) in enumerate(zip(self.filters, self.sums, state.layers, strict=True)):
            # Views (H, U, N) of inputs and outputs.
            x, after = layer["numerators"][row, :, end - U : end], sums[row, :, end : end + U]
            if U <= _BY_MATRIX:
                after += self._matrix(i, U)[:, : after.shape[1]] @ x
            else:
                # One convolution over inputs and outputs, of which the outputs are kept.
                n = min(U, left)
                after += _causal_convolution(F.pad(x, (0, 0, 0, n)), f[:, : U + n])[:, U:]

    def _matrix(self, layer: int, U: int) -> Tensor:
        """Return f(U + i - j) at [i, j], the lags of a tile: (H, U, U)."""
        if (layer, U) not in self._matrices:
            steps = torch.arange(U)
            f = F.pad(self.filters[layer], (0, 2 * U))
            self._matrices[layer, U] = f[:, U + steps[:, None] - steps]
        return self._matrices[layer, U]


def _causal_convolution(x: Tensor, f: Tensor) -> Tensor:
    """Return y[t] = sum_{u<=t} f(t-u) x[u], (H, T, N), from x of that shape and f (H, T) by lag."""
    # (H, T, N) -> (1, T, H, N) and back
    result: Tensor = spectral_convolution(x.transpose(0, 1)[None], f)[0].transpose(0, 1)
    return result


def _written(state: State) -> list[tuple[int, int]]:
    """Return the address of each history, and how often torch wrote into it; the compiled step writes uncounted.

    Tensors of inference mode have no count. There a put makes all rows be recomputed.
    """
    histories = [layer["numerators"] for layer in state.layers]
    return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in histories]
