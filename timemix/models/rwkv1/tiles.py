"""What the past adds to positions to come, worked out in tiles: a step's sum over the past without a look at all of it.

A token needs sum_u f(t-u) x[u] over all of its past: at long contexts more bytes than the weights. Here a step looks at
the last BLOCK tokens alone. Whenever so many are complete, the newest U of them, U the largest power of two of blocks
that divides what is complete, add to the next U positions in one product: each pair of an input and a later output
meets once (the online convolution of Fischer and Stockmeyer, 1974; arXiv 2410.12982). Every input lies in the past of
every output that it reaches, so rounding is as in `ops.spectral`.

It is derived from a state, never saved, and made again where it does not fit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from timemix.models.state import State
from timemix.ops.common.spectral import spectral_convolution

BLOCK = 64
FROM = 2048
"""ctx_len from which it pays: the history of a row is then read from memory, and is a fifth of the weights at 17 M."""

_BY_MATRIX = 256
"""Inputs of a tile up to which a matrix serves, kept for the next."""
_BY_TILES = 1024
"""Tokens of a past that is made up for tile by tile, rather than by one convolution over the whole context."""


class Pending:
    """What the past of each row adds to its later positions, as far as tiles are done; of one state."""

    def __init__(self, state: State, filters: list[Tensor]) -> None:
        """`filters`: f (H, ctx_len) of each layer."""
        self.filters = filters
        self.sums = [torch.zeros_like(layer["numerators"]) for layer in state.layers]
        rows = len(state.position)
        # Where tiling began, and where the row was left.
        self._origin = torch.zeros(rows, dtype=torch.int64)
        self._position = torch.full((rows,), -1)
        self._written = _written(state)
        self._matrices: dict[tuple[int, int], Tensor] = {}

    def rows_were_written(self, state: State, rows: Tensor) -> None:
        """To be told when rows of the state got other content, in one write to each tensor."""
        self._position[rows] = -1
        once = [(address, count + 1) for address, count in self._written]
        self._written = _written(state)
        if self._written != once:
            self._position.fill_(-1)

    def starts(self, state: State, rows: Tensor) -> Tensor:
        """The first of the newest tokens that a step of each row (R,) must look at itself."""
        if (written := _written(state)) != self._written:
            self._position.fill_(-1)
            self._written = written
        position = state.position[rows]
        for row in rows[self._position[rows] != position].tolist():
            self._make_up_for(state, row)
        return position - (position - self._origin[rows]) % BLOCK

    def advance(self, state: State, rows: Tensor) -> None:
        """After a step of these rows: the tiles that are complete now."""
        position = state.position[rows]
        self._position[rows] = position
        for row in rows[(position - self._origin[rows]) % BLOCK == 0].tolist():
            self._add_tile(state, row, int(state.position[row]))

    def _make_up_for(self, state: State, row: int) -> None:
        """All that a row's past adds, from a state of unknown origin."""
        position = int(state.position[row])
        self._origin[row] = 0 if position <= _BY_TILES else position
        for f, sums, layer in zip(self.filters, self.sums, state.layers, strict=True):
            sums[row] = 0
            if position > _BY_TILES:
                x = F.pad(layer["numerators"][row, :, :position], (0, 0, 0, f.shape[1] - position))
                sums[row, :, position:] = _convolved(x, f)[:, position:]
        if position <= _BY_TILES:
            for end in range(BLOCK, position + 1, BLOCK):
                self._add_tile(state, row, end)

    def _add_tile(self, state: State, row: int, end: int) -> None:
        """The newest U tokens before `end` add to the U positions from it, as far as the context goes."""
        left = self.filters[0].shape[1] - end
        if left == 0:
            return
        blocks = (end - int(self._origin[row])) // BLOCK
        U = BLOCK * (blocks & -blocks)
        for i, (f, sums, layer) in enumerate(zip(self.filters, self.sums, state.layers, strict=True)):
            x, after = layer["numerators"][row, :, end - U : end], sums[row, :, end : end + U]
            if U <= _BY_MATRIX:
                after += self._matrix(i, U)[:, : after.shape[1]] @ x
            else:
                n = min(U, left)
                after += _convolved(F.pad(x, (0, 0, 0, n)), f[:, : U + n])[:, U:]

    def _matrix(self, layer: int, U: int) -> Tensor:
        """f at the lags of a tile: (H, U, U), rows of outputs."""
        if (layer, U) not in self._matrices:
            steps = torch.arange(U)
            f = F.pad(self.filters[layer], (0, 2 * U))
            self._matrices[layer, U] = f[:, U + steps[:, None] - steps]
        return self._matrices[layer, U]


def _convolved(x: Tensor, f: Tensor) -> Tensor:
    """Causal convolution of x (H, T, N) with f (H, T), each output (H, T, N) from its past."""
    return spectral_convolution(x.transpose(0, 1)[None], f)[0].transpose(0, 1)


def _written(state: State) -> list[tuple[int, int]]:
    """Address of each history, and how often torch wrote into it; compiled code writes uncounted.

    Tensors of inference mode have no count: there a put has all rows made up for again.
    """
    histories = [layer["numerators"] for layer in state.layers]
    return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in histories]
