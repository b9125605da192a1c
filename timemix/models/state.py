"""The state, which holds everything that a model stores about earlier tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class WorkedOutAhead(Protocol):
    """What a decode step has computed in advance from a state, such as results for the next tokens."""

    def rows_were_written(self, state: "State", rows: Tensor) -> None:
        """Discard what was computed from rows that other code has replaced by one write to each tensor of the state.

        Args:
            state: The state.
            rows: Indices of the rows (R,).
        """


@dataclass(eq=False)
class State:
    """Store everything that a model needs about earlier tokens.

    A call of the model consumes the state and may write into the state's tensors. To continue from one state in several
    ways, make copies with `clone`.

    Args:
        position: Number of tokens of each row so far (B,) int64.
        layers: Tensors of each block by name, batch first.
        pending: Results that a decode step has computed in advance, or None. A copy of a state has `pending` None.
    """

    position: Tensor
    layers: list[dict[str, Tensor]]
    pending: WorkedOutAhead | None = field(default=None, repr=False)

    def clone(self) -> "State":
        """Return a copy of the state, which has its own tensors.

        Returns:
            The copy.
        """
        return State(self.position.clone(), [{n: x.clone() for n, x in layer.items()} for layer in self.layers])

    def select(self, rows: Tensor) -> "State":
        """Copy some rows.

        Args:
            rows: Indices of the rows (R,), in any order; a row may occur several times.

        Returns:
            The state of the given rows, in the given order.
        """
        return State(self.position[rows], [{n: x[rows] for n, x in layer.items()} for layer in self.layers])

    @staticmethod
    def cat(states: "Sequence[State]") -> "State":
        """Concatenate the rows of several states of one model.

        Args:
            states: The states.

        Returns:
            One state with all rows.
        """
        layers = zip(*(state.layers for state in states), strict=True)
        joined = [{name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in layers]
        return State(torch.cat([state.position for state in states]), joined)

    def put(self, rows: Tensor, other: "State") -> None:
        """Replace some rows by the rows of another state of the same model.

        Args:
            rows: Indices of the rows to replace (R,), all different.
            other: State of R rows.
        """
        self.position[rows] = other.position
        for own, new in zip(self.layers, other.layers, strict=True):
            for name, x in new.items():
                own[name][rows] = x
        if self.pending is not None:
            self.pending.rows_were_written(self, rows)

    @property
    def shapes(self) -> list[dict[str, torch.Size]]:
        """Shapes of the tensors of one row, by layer and name."""
        return [{name: x.shape[1:] for name, x in layer.items()} for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        tensors = [self.position, *(x for layer in self.layers for x in layer.values())]
        return sum(x.numel() * x.element_size() for x in tensors)
