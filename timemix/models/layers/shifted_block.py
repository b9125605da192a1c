"""The block that the architectures of 2021 share."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from timemix.models.config import ShiftedConfig
from timemix.models.layers.block import Block, Kept, Tensors
from timemix.models.layers.linear import LayerNorm, Linear, product_dtype, to_product_dtype
from timemix.models.layers.token_shift import TokenShift
from timemix.ops.common import fused
from timemix.ops.common.norms import norm_shift


class ShiftedBlock(Block):
    """The block of 2021: x = x + mixer(shift(norm(x))), then x = x + ffn(shift(norm(x))).

    A subclass sets `Mixer` and `Ffn`, the classes of its sublayers.

    Args:
        config: Settings of the model.
        layer: Index of the block, from 0.
    """

    Mixer: ClassVar[type[Any]]
    Ffn: ClassVar[type[Any]]
    gates = (("mixer", "receptance"), ("ffn", "receptance"))
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
            weight = self.mixer_norm.weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            rows = weight.new_zeros(batch_size, self.shift.distance, len(weight), dtype=dtype)
            state |= {"mixer_shift": rows, "ffn_shift": rows.clone()}
        return state

    def forward(
        self,
        x: Tensor,
        state: Tensors | None = None,
        carry: Tensor | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensors | None, Tensor | None]:
        """Apply the block.

        Args:
            x: Input (B, T, C).
            state: State of the block after the earlier tokens, as in `Block.forward`.
            carry: Tensor that is passed on to the next block.
            position: Number of earlier tokens of each row (B,); None without a state.
            lengths: Number of valid tokens of each row (B,), 1 to T; None: all tokens are valid.
            resets: Whether a token is the first of a document (B, T) bool, without a state; None: no token. Only a
                subclass whose `takes_resets` is True supports resets.

        Returns:
            Output (B, T, C), the next state (None if `state` is None), and `carry`.
        """
        old = state or {}
        shifted, mixer_shift = self._shifted(self.mixer_norm, x, old.get("mixer_shift"), lengths, resets)
        mixer = self.mixer if resets is None else partial(self.mixer, resets=resets)
        y, state = mixer(shifted, state, position, lengths)
        x = x + self.dropout(y).to(x.dtype)
        shifted, ffn_shift = self._shifted(self.ffn_norm, x, old.get("ffn_shift"), lengths, resets)
        x = x + self.dropout(self.ffn(shifted)).to(x.dtype)
        if state is not None and mixer_shift is not None and ffn_shift is not None:
            state |= {"mixer_shift": mixer_shift, "ffn_shift": ffn_shift}
        return x, state, carry

    def _shifted(
        self, norm: LayerNorm, x: Tensor, state: Tensor | None, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply norm and token-shift to x (B, T, C). Return the result (B, T, C) and the next state of the shift."""
        if state is None and resets is None and x.dtype == torch.float32 and fused.serves(x):
            return norm_shift(x, norm.weight, norm.bias, norm.eps, self.shift.edges, product_dtype(x)), None
        result: tuple[Tensor, Tensor | None] = self.shift(to_product_dtype(norm(x)), state, lengths, resets)
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
