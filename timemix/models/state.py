"""State: all that a model keeps of the tokens it has seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class WorkedOutAhead(Protocol):
    """What a step has worked out of a state for the tokens to come (models.lazy)."""

    def rows_were_written(self, state: "State", rows: Tensor) -> None:
        """To be called when rows (R,) of the state got other content, in one write to each tensor."""


@dataclass
class State:
    """All that a model keeps of the tokens it has seen.

    position (B,): tokens seen by each row. layers: the tensors of each block by name, batch first.
    A call of the model consumes its state and may write into it; `clone` branches.
    """

    position: Tensor
    layers: list[dict[str, Tensor]]
    pending: WorkedOutAhead | None = field(default=None, repr=False, compare=False)
    """What a step has worked out ahead, if it does so: no part of the state, and not copied."""

    def clone(self) -> "State":
        return State(self.position.clone(), [{n: x.clone() for n, x in layer.items()} for layer in self.layers])

    def select(self, rows: Tensor) -> "State":
        """State of the rows with these indices (R,), in this order; a row may stand more than once."""
        return State(self.position[rows], [{n: x[rows] for n, x in layer.items()} for layer in self.layers])

    @staticmethod
    def cat(states: "Sequence[State]") -> "State":
        """The rows of several states of one model, one after the other."""
        layers = zip(*(state.layers for state in states), strict=True)
        joined = [{name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in layers]
        return State(torch.cat([state.position for state in states]), joined)

    def put(self, rows: Tensor, other: "State") -> None:
        """Writes the rows of another state of this model (R rows) into these rows (R,)."""
        self.position[rows] = other.position
        for own, new in zip(self.layers, other.layers, strict=True):
            for name, x in new.items():
                own[name][rows] = x
        if self.pending is not None:
            self.pending.rows_were_written(self, rows)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        tensors = [self.position, *(x for layer in self.layers for x in layer.values())]
        return sum(x.numel() * x.element_size() for x in tensors)
