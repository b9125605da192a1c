"""Decoding on a GPU: one CUDA graph runs the model on the next token of each row.

Launching the kernels of a small model, some hundreds of them, takes longer than the kernels take. A CUDA graph runs
recorded kernels by a single launch. The kernels always use the same tensors: the tokens and the logits of the graph,
and one state, which the graph updates in place.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from timemix.models.language_model import LanguageModel
from timemix.models.state import State
from timemix.runtime.device import cuda_graph

STEPS_BEFORE = 8
"""Number of steps with one state before a graph is recorded: recording takes as long as some tens of steps."""


class DecodeGraph:
    """The decode step of a model as a CUDA graph.

    A graph handles one state. For the first `STEPS_BEFORE` steps with another state, `handles` is false.

    Args:
        model: The model, on a CUDA device and in eval mode.
        record: Function that takes a function and returns a function that repeats it; `cuda_graph` except in tests.
    """

    def __init__(
        self, model: LanguageModel, record: Callable[[Callable[[], None]], Callable[[], None]] = cuda_graph
    ) -> None:
        self._model, self._record = model, record
        self._state: State | None = None
        self._positions: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self._steps = 0

    def handles(self, state: State) -> bool:
        """Return whether a graph exists for a state, and record it if it is time.

        Args:
            state: The state. If it is not the state of the last call, the graph of the last state is deleted.

        Returns:
            True if `__call__` accepts the state.
        """
        if state is not self._state:
            self._state, self._positions, self._replay, self._steps = state, None, None, 0
        self._steps += 1
        if self._steps > STEPS_BEFORE and self._replay is None:
            B, head = len(state.position), self._model.head.weight
            # The token of each row, and 1 for a row that has a token in this step. With zeros, `_work` changes nothing.
            self._given = torch.zeros(2, B, dtype=torch.int64, device=head.device)
            self._logits = head.new_zeros(B, head.shape[0])
            self._replay = self._record(self._work)
        return self._replay is not None

    def rows_were_written(self, state: State, rows: Tensor) -> None:
        """Note that the positions of rows have changed, as `State.put` reports.

        Args:
            state: The state.
            rows: Indices of the rows (R,).
        """
        self._positions = None

    def __call__(self, tokens: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
        """Run the model on one token of some rows of a state for which `handles` is true.

        Args:
            tokens: Token ids (R,) int64, on the CPU.
            state: The state, whose tensors are updated in place.
            rows: Indices of the rows (R,) int64, all different, on the CPU.

        Returns:
            Logits (R, V), and the same state.

        Raises:
            ValueError: The position of a row would exceed the model's `max_position`.
        """
        assert state is self._state
        assert self._replay is not None
        # The positions are read from the device once after a row was replaced, and counted here afterwards.
        if self._positions is None:
            self._positions = state.position.to("cpu", copy=True)
            state.pending = self
        self._model.check_end(int(self._positions[rows].max()) + 1)
        self._positions[rows] += 1
        given = torch.zeros(2, len(state.position), dtype=torch.int64)
        given[0, rows], given[1, rows] = tokens, 1
        self._given.copy_(given)
        self._replay()
        return self._logits[rows.to(self._logits.device)], state

    def _work(self) -> None:
        """Compute the logits of all rows, and update the rows of the state that have a token."""
        assert self._state is not None
        state, (tokens, active) = self._state, self._given
        position = state.position
        if self._model.max_position is not None:
            # A row whose context is full has no token, but the kernels process it too.
            position = position.clamp(max=self._model.max_position - 1)
        logits, after = self._model(tokens[:, None], State(position, state.layers), logits="last")
        self._logits.copy_(logits)
        for own, new in zip(state.layers, after.layers, strict=True):
            for name, x in new.items():
                # A history is updated in place: without a token, the entry at the row's position is still free.
                if x is not own[name]:
                    own[name].copy_(torch.where(active.bool().view(-1, *[1] * (x.ndim - 1)), x, own[name]))
        state.position.add_(active)
