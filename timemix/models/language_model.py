"""The language model around every architecture: embedding, blocks, head, and the state that it carries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from timemix.errors import InvalidValue
from timemix.models.config import ModelConfig, Recompute
from timemix.models.layers.block import Block
from timemix.models.layers.linear import Embedding, Linear
from timemix.models.layers.recompute import recomputed
from timemix.models.registry import find_architecture, load_part, model_config
from timemix.models.state import State
from timemix.runtime.threads import share


def block_class(config: ModelConfig) -> type[Block]:
    """Import the class of the blocks of a config's architecture, which also answers for what stands outside them."""
    result: type[Block] = load_part(find_architecture(config.arch).model)
    return result


def model_parts(config: ModelConfig) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the modules with parameters of a model: their names, and functions that create them, in this order."""
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
    """Have a model in eval mode for a while; each module gets back the mode that it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def build_model(arch: str, **fields: Any) -> "LanguageModel":
    """Create a model with initial values from torch's random generator.

    Args:
        arch: Name of an architecture, see `list_architectures`.
        **fields: Settings of the architecture, such as `layers=2`, `channels=64`, `ctx_len=128`, `vocab_size=256`.

    Returns:
        The model on the CPU in float32, in training mode.

    Raises:
        InvalidValue: The architecture is unknown, lacks a field, or a value is out of its range.
    """
    return LanguageModel(model_config(arch, **fields))


class LanguageModel(nn.Module):
    """Tokens to logits, for every architecture of the config.

    No position embedding; the head has no bias and is not tied to the embedding.
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
                f"{config.arch} takes a {self.architecture.config.__name__}, not {type(config).__name__}"
            )
        self.block = block_class(config)
        for name, create in model_parts(config):
            parent, _, own = name.rpartition(".")
            self.get_submodule(parent).add_module(own, create())
        self.dropout = nn.Dropout(config.dropout)
        self.recompute: Recompute = "none"
        if self.device.type != "meta":
            self.block.set_initial_values(self)

    @property
    def max_position(self) -> int | None:
        """Tokens that a context can hold: ctx_len, where the tables (or the key/value cache) end; None: any number."""
        return self.config.ctx_len if self.architecture.bounded else None

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def init_state(self, batch_size: int) -> State:
        """State before the first token, for `batch_size` rows."""
        position = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        return State(position, [block.init_state(batch_size) for block in self.blocks])

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        logits: Literal["all", "last"] | None = "all",
    ) -> tuple[Tensor, State | None]:
        """Logits of the next token after each of `tokens` (B, T) int64, and the next state.

        Without a state (training) none is built. With one, the tokens continue it: T > 1 is a prefill, T = 1
        a step; the state is consumed. `lengths` (B,), from 1 to T: only the first `lengths` tokens of a row
        count, the rest is padding. `logits`: "all" gives (B, T, V), "last" those after each row's last token
        (B, V), None the hidden rows before the head (B, T, C).

        Raises ValueError when the tokens would pass `max_position`.
        """
        if not torch.compiler.is_compiling():
            share()
        B, T = tokens.shape
        end = T if state is None else int((state.position + (T if lengths is None else lengths)).max())
        if self.max_position is not None and end > self.max_position:
            raise ValueError(f"{end} tokens are more than this model's context of {self.max_position}")
        x = self.input_norm(self.dropout(self.embedding(tokens)))
        layers: list[dict[str, Tensor]] = []
        carry: Tensor | None = None
        for i, block in enumerate(self.blocks):
            if state is None:
                x, carry = recomputed(block, x, carry, self.recompute)
            else:
                x, layer, carry = block(x, state.layers[i], carry, state.position, lengths)
                layers.append(layer)
        if state is not None:
            state = State(state.position + (T if lengths is None else lengths), layers)
        if logits == "last":
            last = torch.full((B,), T, device=x.device) if lengths is None else lengths
            x = x[torch.arange(B, device=x.device), last - 1]
        x = self.norm(x)
        return (x if logits is None else self.head(x)), state
