"""What a language model asks of the blocks of an architecture, and the block that those of 2021 share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from timemix.models.config import ModelConfig, ShiftedConfig
from timemix.models.layers.linear import LayerNorm, Linear, product_dtype, to_product_dtype
from timemix.models.layers.token_shift import TokenShift
from timemix.ops.common import fused

Tensors = dict[str, Tensor]


class Model(Protocol):
    """The language model, as far as its architecture fills it with values."""

    @property
    def config(self) -> Any: ...

    @property
    def blocks(self) -> Any: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True)
class Recipe:
    """How an architecture wants to be optimized.

    Args:
        lr_scale: Multiples of the learning rate by the end of a parameter's name; others have 1.
        decay_all_matrices: Also decay the embedding and the head, not the linear weights inside blocks alone.
        warmup_floor: Share of the learning rate at which a warm-up begins.
    """

    lr_scale: tuple[tuple[str, float], ...] = ()
    decay_all_matrices: bool = False
    warmup_floor: float = 0.0

    def scale_of(self, name: str) -> float:
        """Return the multiple of the learning rate for a parameter."""
        return next((scale for end, scale in self.lr_scale if name.endswith(end)), 1.0)


@dataclass(frozen=True)
class Kept:
    """Numbers that training keeps of a forward pass, for the estimate of its memory.

    Args:
        block: Per token and layer.
        products: The same with `recompute="cheap"`: outputs of matrix products alone.
        squares: Besides, in all layers together: matrices over pairs of positions.
    """

    block: int
    products: int
    squares: int = 0


class Block(nn.Module):
    """One layer of an architecture; its class also answers for all that stands outside the blocks.

    Subclasses take (config, layer) and define `forward` and `init_state`; the rest has the usual answers here.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

    def init_state(self, batch_size: int) -> Tensors:
        """Return the state before the first token: tensors by name, batch first."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        state: Tensors | None = None,
        carry: Tensor | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensors | None, Tensor | None]:
        """Apply the block.

        Args:
            x: Rows (B, T, C).
            state: What the block keeps of earlier tokens; None in training, where none is built.
            carry: What an earlier block hands on within the same tokens; None from those that hand on nothing.
            position: Tokens that each row has seen (B,); None without a state.
            lengths: Tokens of each row that count (B,), 1 to T; None: all.

        Returns:
            Rows (B, T, C), the next state, and the carry for the next block.
        """
        raise NotImplementedError

    @classmethod
    def input_norm(cls, config: Any) -> nn.Module:
        """Return what stands between embedding and first block."""
        return nn.Identity()

    @classmethod
    def final_norm(cls, config: Any) -> nn.Module:
        """Return what stands between last block and head."""
        return LayerNorm(config.channels)

    @classmethod
    def set_initial_values(cls, model: Model) -> None:
        """Fill every weight of a model in place, from torch's global generator, embedding and head included."""
        raise NotImplementedError

    @classmethod
    def training_loss(cls, loss: Tensor, logits: Tensor) -> Tensor:
        """Return the loss to differentiate, from the mean cross-entropy and the logits (B, T, V)."""
        return loss

    @classmethod
    def recipe(cls, config: Any) -> Recipe:
        """Return what the optimizer does differently for this architecture."""
        return Recipe()

    @classmethod
    def mixing_flops(cls, config: Any) -> int:
        """Return the operations per token of a forward pass over ctx_len, all layers, without those of weights."""
        return 0

    @classmethod
    def kept(cls, config: Any, rows: int) -> Kept:
        """Return what a training step keeps for its backward pass, with `rows` windows at a time."""
        raise NotImplementedError

    @classmethod
    def resized(cls, weights: Tensors, config: Any, ctx_len: int) -> Tensors:
        """Return the weights by name of the same model for another context length."""
        return dict(weights)

    @classmethod
    def runs_in_c(cls, config: Any, precision: str, device: torch.device) -> bool:
        """Whether C code does all of a training step but its matrix products."""
        return False

    @classmethod
    def forms(cls, config: Any, precision: str) -> dict[str, str]:
        """Return the forms in which ops are computed for a whole context, with their reasons, by the op's name."""
        return {}

    @property
    def shifted(self) -> int:
        """First channels of each projection's input that come from earlier tokens."""
        return 0

    def tables(self) -> Tensors:
        """Return learned tables over time by name, for `timemix inspect`."""
        return {}

    def projections(self) -> dict[tuple[str, str], nn.Linear]:
        """Return the linear maps that read the input of a sublayer, by sublayer and name, for `timemix inspect`."""
        return {}


class ShiftedBlock(Block):
    """x + mixer(shift(norm(x))), then x + ffn(shift(norm(x)))."""

    Mixer: ClassVar[type[Any]]
    Ffn: ClassVar[type[Any]]
    TABLES = ("f", "alpha", "beta", "gamma")
    PROJECTIONS = ("query", "receptance", "key", "value")

    def __init__(self, config: ShiftedConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.mixer_norm = LayerNorm(config.channels)
        self.ffn_norm = LayerNorm(config.channels)
        self.shift = TokenShift(config, layer)
        self.mixer = self.Mixer(config)
        self.ffn = self.Ffn(config)
        self.dropout = nn.Dropout(config.dropout)

    def init_state(self, batch_size: int) -> Tensors:
        state: Tensors = self.mixer.init_state(batch_size)
        if self.shift.distance:
            rows = self.mixer_norm.weight.new_zeros(batch_size, self.shift.distance, len(self.mixer_norm.weight))
            state |= {"mixer_shift": rows, "ffn_shift": rows.clone()}
        return state

    def forward(
        self,
        x: Tensor,
        state: Tensors | None = None,
        carry: Tensor | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensors | None, Tensor | None]:
        old = state or {}
        shifted, mixer_shift = self._shifted(self.mixer_norm, x, old.get("mixer_shift"), lengths)
        y, state = self.mixer(shifted, state, position, lengths)
        x = x + self.dropout(y).to(x.dtype)
        shifted, ffn_shift = self._shifted(self.ffn_norm, x, old.get("ffn_shift"), lengths)
        x = x + self.dropout(self.ffn(shifted)).to(x.dtype)
        if state is not None and mixer_shift is not None and ffn_shift is not None:
            state |= {"mixer_shift": mixer_shift, "ffn_shift": ffn_shift}
        return x, state, carry

    def _shifted(
        self, norm: LayerNorm, x: Tensor, state: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if state is None and x.dtype == torch.float32 and fused.serves(x):
            return fused.norm_shift(x, norm.weight, norm.bias, norm.eps, self.shift.edges, product_dtype(x)), None
        result: tuple[Tensor, Tensor | None] = self.shift(to_product_dtype(norm(x)), state, lengths)
        return result

    @classmethod
    def kept(cls, config: ShiftedConfig, rows: int) -> Kept:
        C, hidden = config.channels, config.ffn_hidden
        return Kept(25 * C + 6 * hidden, 7 * C + 2 * hidden)

    @property
    def shifted(self) -> int:
        return self.shift.shifted

    def tables(self) -> Tensors:
        found = {name: getattr(self.mixer, name, None) for name in self.TABLES}
        return {name: table for name, table in found.items() if isinstance(table, Tensor)}

    def projections(self) -> dict[tuple[str, str], nn.Linear]:
        sublayers = {"mixer": self.mixer, "ffn": self.ffn}
        return {
            (where, name): linear
            for where, sublayer in sublayers.items()
            for name in self.PROJECTIONS
            if isinstance(linear := getattr(sublayer, name, None), Linear)
        }
