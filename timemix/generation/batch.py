"""The tokens that one step of the engine processes, and the rows to which the tokens belong."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from timemix.generation.drawer import scores_of
from timemix.generation.row import Row


class Batch:
    """The tokens of a step: the next piece of each row.

    Args:
        pieces: Rows with the number of tokens that each row processes, at least 1.
    """

    def __init__(self, pieces: Sequence[tuple[Row, int]]) -> None:
        self.pieces = pieces
        self._tokens: list[int] = []
        # Indices into `_tokens` of the tokens whose logits are needed.
        self._wanted: list[int] = []
        # Rows that draw a token, and prompt tokens that get a log-probability, each with an index into `_wanted`.
        self._done: list[tuple[int, Row]] = []
        self._scored: list[tuple[int, Row, int]] = []
        for row, count in pieces:
            for offset, index in row.scored(count):
                self._scored.append((len(self._wanted), row, index))
                self._wanted.append(len(self._tokens) + offset)
            begin = len(row.tokens) - row.unread
            self._tokens += row.tokens[begin : begin + count]
            if count == row.unread:
                self._done.append((len(self._wanted), row))
                self._wanted.append(len(self._tokens) - 1)

    @property
    def tokens(self) -> Tensor:
        """Token ids (T,) int64, grouped by row."""
        return _int64(self._tokens)

    @property
    def slots(self) -> Tensor:
        """Slots of the rows (R,) int64."""
        return _int64([row.slot for row, _ in self.pieces])

    def counts_and_wanted(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """Return the number of tokens of each row and the tokens that need logits; empty if each row has one token."""
        if len(self._tokens) == len(self.pieces) == len(self._wanted):
            return ()
        return _int64([count for _, count in self.pieces]), _int64(self._wanted)

    def note_processed(self, logits: np.ndarray) -> tuple[list[Row], np.ndarray]:
        """Update the rows after the step.

        Args:
            logits: Logits (n, V) after the tokens that need logits.

        Returns:
            The R rows that draw a token, and their logits (R, V).
        """
        for row, count in self.pieces:
            row.position += count
            row.unread -= count
        for i, row, index in self._scored:
            assert row.prompt_scores is not None
            request = row.request
            row.prompt_scores[index] = scores_of(logits[i], request.prompt[index], request.top_log_probabilities)
        last = logits if len(self._done) == len(logits) else logits[[i for i, _ in self._done]]
        return [row for _, row in self._done], last


def _int64(numbers: list[int]) -> Tensor:
    """Return a tensor of int64, in a third of the time of `torch.tensor`."""
    return torch.from_numpy(np.array(numbers, np.int64))
