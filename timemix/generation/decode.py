"""The step of generation: one token for each of some rows, by compiled code or by the model."""

from typing import Protocol, cast

import torch
from torch import Tensor

from timemix.errors import InvalidValue, nearest
from timemix.models.language_model import LanguageModel
from timemix.models.quantize import WEIGHTS, Weights, rounded
from timemix.models.registry import find_architecture, load_part
from timemix.models.state import State


class Step(Protocol):
    """Feeds one token to each of some rows of a state.

    `compiled`: whether it is C code rather than the model's own forward. `reason`: why this kind was chosen. `tiled`:
    whether it works out ahead, in tiles, what the past adds to positions to come.
    """

    compiled: bool
    reason: str
    tiled: bool

    def looks_back(self, position: int) -> int:
        """Positions of the past that a step at a position reads."""
        ...

    def __call__(self, tokens: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
        """Feed one token to each of some rows of a state.

        Args:
            tokens: (R,) int64, 0 to V - 1.
            state: state of the model; consumed, its other rows unchanged.
            rows: rows of the state (R,) int64, all different.

        Returns:
            Logits (R, V) after these tokens, and the state.

        Raises:
            InvalidValue: a token outside the vocabulary, a row outside the state, or one at the model's `max_position`.
        """


def build_step(model: LanguageModel, weights: Weights = "float32", *, backend: str = "auto") -> Step:
    """Build the decode step of a model. Its weights must not change while the step is in use.

    Args:
        model: the model.
        weights: the format that linear weights are rounded to.
        backend: "compiled", "model", or "auto": compiled where supported.

    Returns:
        The step.

    Raises:
        InvalidValue: `weights` is unknown; or the compiled step was requested, and the model, its device or its dtype
            is not supported, or the C code cannot be compiled.
    """
    if weights not in WEIGHTS:
        raise InvalidValue(f"weights={weights!r} is not supported{nearest(str(weights), WEIGHTS)}")
    reason = "asked for" if backend == "model" else _hindrance(model)
    if reason is None:
        return cast(Step, load_part(cast(str, find_architecture(model.config.arch).decode))(model, weights))
    if backend == "compiled":
        raise InvalidValue(f"the compiled step is unavailable: {reason}")
    return ModelStep(rounded(model, weights), reason)


def _hindrance(model: LanguageModel) -> str | None:
    """Why no compiled step can run for a model."""
    decode = find_architecture(model.config.arch).decode
    return (
        f"there is no compiled step for {model.config.arch}" if decode is None else load_part(decode).hindrance(model)
    )


class ModelStep:
    """The fallback: the model's own forward.

    Args:
        model: the model, its weights rounded already.
        reason: why this kind of step was chosen.
    """

    compiled = False
    tiled = False

    def looks_back(self, position: int) -> int:
        return position

    def __init__(self, model: LanguageModel, reason: str) -> None:
        self.model, self.reason = model, reason

    @torch.no_grad()
    def __call__(self, tokens: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
        device, vocab_size = self.model.device, self.model.config.vocab_size
        if not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
            raise InvalidValue(f"a token is outside the vocabulary of {vocab_size}")
        # All rows in order need no copy of their state.
        if torch.equal(rows, torch.arange(len(state.position))):
            logits, after = self.model(tokens[:, None].to(device), state, logits="last")
            return logits, cast(State, after)
        rows = rows.to(device)
        logits, part = self.model(tokens[:, None].to(device), state.select(rows), logits="last")
        state.put(rows, cast(State, part))
        return logits, state
