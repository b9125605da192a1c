"""The step of generation: tokens of some rows through the model, by compiled code or by the model's own forward."""

from typing import Protocol, cast

import torch
from torch import Tensor

from timemix.errors import InvalidValue, nearest
from timemix.models.language_model import LanguageModel, evaluating
from timemix.models.quantize import WEIGHTS, Weights, rounded
from timemix.models.registry import find_architecture, load_part
from timemix.models.state import State


class Step(Protocol):
    """Feeds tokens to some rows of a state.

    `compiled`: whether it is C code rather than the model's own forward. `reason`: why this kind was chosen.
    """

    compiled: bool
    reason: str

    def looks_back(self, position: int) -> int:
        """Return how many positions of the past a token at a position reads on average."""
        ...

    def __call__(
        self, tokens: Tensor, state: State, rows: Tensor, counts: Tensor | None = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Feed tokens to some rows of a state, as many to each as `counts` says.

        Args:
            tokens: (T,) int64, 0 to V - 1: those of the first row, then those of the second, and so on.
            state: state of the model; consumed, its other rows unchanged.
            rows: rows of the state (R,) int64, all different.
            counts: tokens of each row (R,) int64, at least 1, T together; None: one each.
            wanted: indices (n,) int64 of the tokens whose logits are returned; None: the last one of each row.

        Returns:
            Logits (n, V) after these tokens, and the state.

        Raises:
            InvalidValue: a token outside the vocabulary, a row outside the state, or one that would pass the model's
                `max_position`.
        """


def build_step(model: LanguageModel, weights: Weights = "float32", *, backend: str = "auto") -> Step:
    """Build the step of a model. Its weights must not change while the step is in use.

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
    """The fallback: the model's own forward, in eval mode.

    Args:
        model: the model, its weights rounded already.
        reason: why this kind of step was chosen.
    """

    compiled = False

    def __init__(self, model: LanguageModel, reason: str) -> None:
        self.model, self.reason = model, reason

    def looks_back(self, position: int) -> int:
        return position

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, state: State, rows: Tensor, counts: Tensor | None = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, State]:
        device, vocab_size = self.model.device, self.model.config.vocab_size
        if not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
            raise InvalidValue(f"a token is outside the vocabulary of {vocab_size}")
        counts = torch.ones_like(rows) if counts is None else counts
        ends = counts.cumsum(0)
        wanted = ends - 1 if wanted is None else wanted
        logits = torch.zeros(len(tokens), vocab_size, dtype=self.model.head.weight.dtype, device=device)
        with evaluating(self.model):
            single = (counts == 1).nonzero().flatten()
            if len(single):
                at = ends[single] - 1
                logits[at.to(device)], state = self._decode(tokens[at].to(device), state, rows[single].to(device))
            # A longer piece is read alone: what it gives does not depend on others.
            for i in (counts > 1).nonzero().flatten().tolist():
                begin, end = int(ends[i] - counts[i]), int(ends[i])
                hidden, state = self._read(tokens[begin:end].to(device), state, rows[i : i + 1].to(device))
                own = wanted[(wanted >= begin) & (wanted < end)]
                if len(own):
                    logits[own.to(device)] = self.model.head(hidden[(own - begin).to(device)])
        return logits[wanted.to(device)], state

    def _read(self, tokens: Tensor, state: State, row: Tensor) -> tuple[Tensor, State]:
        """Feed tokens (T,) to one row (1,); rows before the head (T, C)."""
        hidden, part = self.model(tokens[None], state.select(row), logits=None)
        state.put(row, cast(State, part))
        return hidden[0], state

    def _decode(self, tokens: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
        """Feed one token to each of some rows; logits (R, V)."""
        # All rows in order need no copy of their state.
        if len(rows) == len(state.position) and bool((rows == torch.arange(len(rows), device=rows.device)).all()):
            logits, after = self.model(tokens[:, None], state, logits="last")
            return logits, cast(State, after)
        logits, part = self.model(tokens[:, None], state.select(rows), logits="last")
        state.put(rows, cast(State, part))
        return logits, state
