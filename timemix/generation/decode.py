"""The decode step of generation: compiled C code, or the model's own forward pass, processes tokens."""

import copy
from typing import Protocol, cast

import torch
from torch import Tensor

from timemix.errors import InvalidValue, nearest
from timemix.generation.graph import DecodeGraph
from timemix.models.language_model import LanguageModel, evaluating
from timemix.models.quantize import WEIGHTS, Weights, rounded
from timemix.models.registry import find_architecture, load_part
from timemix.models.state import State


class Step(Protocol):
    """A function that runs the model on the next tokens of some rows of a state.

    Attributes:
        compiled: Whether the step is C code rather than the model's own forward pass.
        reason: Reason for the choice between C code and the model's own forward pass.
    """

    compiled: bool
    reason: str

    def looks_back(self, position: int) -> int:
        """Return the average number of past positions that a token at `position` reads.

        Args:
            position: Position of the token, from 0.

        Returns:
            Number of positions.
        """
        ...

    def __call__(
        self, tokens: Tensor, state: State, rows: Tensor, counts: Tensor | None = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Run the model on the next tokens of some rows of a state.

        Args:
            tokens: Token ids (T,) int64, 0 to V - 1, grouped by row in the order of `rows`.
            state: State of the model. After the call, use only the returned state. Rows of the state outside `rows` do
                not change.
            rows: Indices of rows of the state (R,) int64, all different.
            counts: Number of tokens of each row (R,) int64, at least 1, with sum T; None: one token per row.
            wanted: Indices into `tokens` (n,) int64 of the tokens whose logits are returned; None: the last token of
                each row.

        Returns:
            Logits (n, V) after the wanted tokens, and the next state.

        Raises:
            ValueError: A token is outside the vocabulary, or the position of a row would exceed the model's
                `max_position`.
        """


def build_step(model: LanguageModel, weights: Weights = "float32", *, backend: str = "auto") -> Step:
    """Build the decode step of a model.

    Args:
        model: The model, whose weights must not change while the step is in use. The weights may be mapped.
        weights: Format to which the linear weights are rounded: "float32", "bfloat16", "int8" or "int4".
        backend: "compiled", "model", or "auto", which is "compiled" if supported, otherwise "model".

    Returns:
        The step.

    Raises:
        InvalidValue: `weights` is unknown, or `backend` is "compiled" but the C code cannot be compiled for the model,
            its device and its dtype.
    """
    if weights not in WEIGHTS:
        raise InvalidValue(f"weights={weights!r} is not supported{nearest(str(weights), WEIGHTS)}")
    reason = "asked for" if backend == "model" else _hindrance(model)
    if reason is None:
        return cast(Step, load_part(cast(str, find_architecture(model.config.arch).decode))(model, weights))
    if backend == "compiled":
        raise InvalidValue(f"backend={backend!r} is not available: {reason}; use auto or model")
    return ModelStep(rounded(_unmapped(model), weights), reason)


def _unmapped(model: LanguageModel) -> LanguageModel:
    """Return a model with its weights in memory, in float32, as PyTorch's operators need them."""
    if not model.is_mapped:
        return model
    with torch.device("meta"):
        own = LanguageModel(model.config)
    own.learned_state = copy.deepcopy(model.learned_state)
    weights = {name: x.to(torch.float32, copy=True) for name, x in model.state_dict().items()}
    own.load_state_dict(weights, assign=True)
    return own.eval()


def _hindrance(model: LanguageModel) -> str | None:
    """Return the reason why no compiled step can run for a model; None if a compiled step can run."""
    decode = find_architecture(model.config.arch).decode
    return (
        f"there is no compiled step for {model.config.arch}" if decode is None else load_part(decode).hindrance(model)
    )


class ModelStep:
    """The fallback step: the model's own forward pass, in eval mode.

    Args:
        model: The model, with rounded weights.
        reason: Reason for the choice between C code and the model's own forward pass.
    """

    compiled = False

    def __init__(self, model: LanguageModel, reason: str) -> None:
        self.model, self.reason = model, reason
        self._graph = DecodeGraph(model) if model.device.type == "cuda" else None

    def looks_back(self, position: int) -> int:
        """Return `position`: a token reads all past positions.

        Args:
            position: Position of the token, from 0.

        Returns:
            `position`.
        """
        return position

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, state: State, rows: Tensor, counts: Tensor | None = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Run the model on the next tokens of some rows of a state, as `Step` describes."""
        device, vocab_size = self.model.device, self.model.config.vocab_size
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < vocab_size:
                raise InvalidValue(f"token {token} is outside the vocabulary of {vocab_size}; ids start at 0")
        counts = torch.ones_like(rows) if counts is None else counts
        ends = counts.cumsum(0)
        wanted = ends - 1 if wanted is None else wanted
        logits = torch.zeros(len(tokens), vocab_size, dtype=self.model.head.weight.dtype, device=device)
        with evaluating(self.model):
            single = (counts == 1).nonzero().flatten()
            if len(single):
                at = ends[single] - 1
                logits[at.to(device)], state = self._decode(tokens[at], state, rows[single])
            # A piece of several tokens runs alone, so that its logits do not depend on the other rows.
            for i in (counts > 1).nonzero().flatten().tolist():
                begin, end = int(ends[i] - counts[i]), int(ends[i])
                hidden, state = self._read(tokens[begin:end].to(device), state, rows[i : i + 1].to(device))
                own = wanted[(wanted >= begin) & (wanted < end)]
                if len(own):
                    logits[own.to(device)] = self.model.head(hidden[(own - begin).to(device)])
        return logits[wanted.to(device)], state

    def _read(self, tokens: Tensor, state: State, row: Tensor) -> tuple[Tensor, State]:
        """Run the model on tokens (T,) of one row (1,); return hidden vectors (T, C) before the head, and the state."""
        hidden, part = self.model(tokens[None], state.select(row), logits=None)
        state.put(row, cast(State, part))
        return hidden[0], state

    def _decode(self, tokens: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
        """Run the model on one token of each of R rows; return the logits (R, V), and the state."""
        if self._graph is not None and self._graph.handles(state):
            return self._graph(tokens, state, rows)
        tokens = tokens.to(self.model.device)
        # If `rows` lists all rows in order, the state needs no copy.
        if len(rows) == len(state.position) and bool((rows == torch.arange(len(rows))).all()):
            logits, after = self.model(tokens[:, None], state, logits="last")
            # The state stays the same object, by which a graph recognizes its state.
            state.position, state.layers = after.position, after.layers
            return logits, state
        rows = rows.to(self.model.device)
        logits, part = self.model(tokens[:, None], state.select(rows), logits="last")
        state.put(rows, cast(State, part))
        return logits, state
