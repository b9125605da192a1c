"""The language model that every architecture uses: embedding, blocks, head, and the state between calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from timemix.errors import InvalidValue
from timemix.models.config import ModelConfig, Recompute
from timemix.models.documents import by_document
from timemix.models.layers.block import Block
from timemix.models.layers.linear import Embedding, Linear
from timemix.models.layers.recompute import recomputed
from timemix.models.learned_state import LearnedState
from timemix.models.registry import find_architecture, load_part, model_config
from timemix.models.state import State
from timemix.ops.common.kernels import check_shapes
from timemix.runtime.device import is_recording
from timemix.runtime.threads import share


def block_class(config: ModelConfig) -> type[Block]:
    """Import the block class of an architecture, which also defines the parts of the model outside its blocks.

    Args:
        config: Settings of the model.

    Returns:
        The class.
    """
    result: type[Block] = load_part(find_architecture(config.arch).model)
    return result


def model_parts(config: ModelConfig) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the name of each module of a model and a function that creates the module, in order of creation."""
    block = block_class(config)
    yield "embedding", lambda: Embedding(config.vocab_size, config.channels)
    yield "input_norm", lambda: block.input_norm(config)
    yield "blocks", nn.ModuleList
    for layer in range(config.layers):
        yield f"blocks.{layer}", partial(block, config, layer)
    yield "norm", lambda: block.final_norm(config)
    yield "head", lambda: Linear(config.channels, config.vocab_size, bias=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to eval mode in a `with` block, and restore the previous mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def build_model(arch: str, **fields: Any) -> "LanguageModel":
    """Create a model with initial values from PyTorch's global random generator.

    Args:
        arch: Name of an architecture, see `list_architectures`.
        **fields: Settings of the architecture, such as `layers=2`, `channels=64`, `ctx_len=128`, `vocab_size=256`.

    Returns:
        The model on the CPU in float32, in training mode.

    Raises:
        InvalidValue: The architecture is unknown or lacks a field, or a value is out of its range.
    """
    return LanguageModel(model_config(arch, **fields))


class LanguageModel(nn.Module):
    """A language model of any architecture, which maps token ids to logits.

    The model has no position embedding. The head has no bias and is not tied to the embedding.

    Args:
        config: Settings of the model, an instance of the config class of the architecture `config.arch`.

    Raises:
        InvalidValue: The architecture is unknown, or the class of `config` is that of another architecture.
    """

    embedding: Embedding
    input_norm: nn.Module
    blocks: list[Block]
    norm: nn.Module
    head: Linear

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.architecture = find_architecture(config.arch)
        if not isinstance(config, self.architecture.config):
            raise InvalidValue(
                f"config is a {type(config).__name__}; model.arch {config.arch} needs a"
                f" {self.architecture.config.__name__}"
            )
        self.block = block_class(config)
        for name, create in model_parts(config):
            parent, _, own = name.rpartition(".")
            self.get_submodule(parent).add_module(own, create())
        self.dropout = nn.Dropout(config.dropout)
        self.learned_state: LearnedState | None = None
        """State before the first token, which state tuning learns; None: the state of `Block.init_state`."""
        self.recompute: Recompute = "none"
        self.is_mapped = False
        """Whether the weights are mapped from a file, in the types of the file, for a decode step to copy."""
        if self.device.type != "meta":
            self.block.set_initial_values(self)

    @property
    def max_position(self) -> int | None:
        """Largest number of tokens in a context: ctx_len, or None for an architecture with unbounded context."""
        return self.config.ctx_len if self.architecture.bounded else None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.weight.device

    def check_end(self, end: int) -> None:
        """Check that a number of tokens fits in the context.

        Args:
            end: Number of tokens of a row, including the next tokens.

        Raises:
            ValueError: The number exceeds `max_position`.
        """
        if self.max_position is not None and end > self.max_position:
            raise ValueError(f"{end} tokens are more than this model's context of {self.max_position}; pass fewer")

    def init_state(self, batch_size: int) -> State:
        """Create the state before the first token.

        Args:
            batch_size: Number of rows B, at least 0.

        Returns:
            The state, on the model's device.
        """
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        layers = [block.init_state(batch_size) for block in self.blocks]
        if self.learned_state is not None:
            with torch.no_grad():
                layers = [
                    layer | self.learned_state.rows(i, block, batch_size)
                    for i, (layer, block) in enumerate(zip(layers, self.blocks, strict=True))
                ]
        return State(position, layers)

    @property
    def resets_in_rows(self) -> bool:
        """Whether `forward` resets the state within a row. Otherwise, each document becomes a row of its own."""
        return self.block.takes_resets and self.learned_state is None

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        logits: Literal["all", "last"] | None = "all",
    ) -> tuple[Tensor, State | None]:
        """Compute the logits of the next token after each token.

        Args:
            tokens: Token ids (B, T) int64, 0 to V - 1.
            state: State that the tokens continue, with T > 1 for a prefill and T = 1 for a decode step. The call
                consumes the state. None, as in training: the tokens begin at position 0.
            lengths: Number of valid tokens of each row (B,), 1 to T. Later tokens of the row are padding. None: all
                tokens are valid.
            resets: Whether a token is the first of a document (B, T) bool. It and later tokens depend on no earlier
                token. None: no token, except at position 0.
            logits: "all": logits after each token. "last": logits after the last token of each row. None: hidden rows,
                which are the input of the head, instead of logits.

        Returns:
            Logits (B, T, V) for "all", logits (B, V) for "last", or hidden rows (B, T, C) for None. The second value is
            the next state, or None if `state` is None.

        Raises:
            ValueError: The context would have more tokens than `max_position`, or `state`, `lengths` or `resets` does
                not fit `tokens`.
            InvalidValue: The model does not support `resets` with a state.
        """
        B, T = tokens.shape
        if not torch.compiler.is_compiling():
            share()
            position = None if state is None else state.position
            others = {"state.position": (position, (B,)), "lengths": (lengths, (B,)), "resets": (resets, (B, T))}
            check_shapes("tokens", tokens, others)
        if self.max_position is not None and B and not is_recording():
            self.check_end(T if state is None else int((state.position + (T if lengths is None else lengths)).max()))
        if resets is None or (self.resets_in_rows and (state is None or self.max_position is None)):
            x, state = self._rows(tokens, state, lengths, resets)
        elif state is None:
            x = by_document(lambda documents: self._rows(documents, None, None, None)[0], tokens, resets)
        else:
            raise InvalidValue(f"this {self.config.arch} does not support resets with a state; leave out state")
        if logits == "last":
            last = torch.full((B,), T, device=x.device) if lengths is None else lengths
            x = x[torch.arange(B, device=x.device), last - 1]
        x = self.norm(x)
        return (x if logits is None else self.head(x)), state

    def _rows(
        self, tokens: Tensor, state: State | None, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, State | None]:
        """Return the output of the last block (B, T, C), and the next state. `forward` documents the arguments."""
        B, T = tokens.shape
        x = self.input_norm(self.dropout(self.embedding(tokens)))
        layers: list[dict[str, Tensor]] = []
        carry: Tensor | None = None
        position = None if state is None else state.position
        if state is None and self.learned_state is not None:
            position = torch.zeros(B, dtype=torch.int64, device=x.device)
        for i, block in enumerate(self.blocks):
            start = None if state is None else state.layers[i]
            if state is None and self.learned_state is not None:
                start = self.learned_state.rows(i, block, B)
            x, layer, carry = recomputed(block, x, carry, self.recompute, start, position, lengths, resets)
            if layer is not None:
                layers.append(layer)
        if state is not None:
            state = State(state.position + (T if lengths is None else lengths), layers)
        return x, state
