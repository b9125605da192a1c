"""The compiled decode step of models of rotary attention and gated feed-forward sublayers.

The C file step.c opens with the formula. The structures _Layer and _Model equal the C structures `layer` and `model` of
step.c, field by field.
"""

import ctypes
from pathlib import Path
from typing import Any, cast

import torch

from timemix.models.attention.config import RotaryConfig
from timemix.models.attention.model import RotaryBlock, rotated
from timemix.models.compiled_step import CompiledStep
from timemix.models.layers.block import Block
from timemix.models.layers.rotary import rotary_turns
from timemix.models.step_memory import Common, LinearMap, Shift
from timemix.ops.common.fused import ACTIVATION_KINDS

MIXER, FFN = ("query", "key", "value", "output"), ("key", "value", "output")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p * 2) for name in ("mixer_norm", "ffn_norm")),
        ("shift", Shift),
        *((name, LinearMap) for name in (*MIXER, *(f"ffn_{name}" for name in FFN))),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "mixer_shift", "ffn_shift")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("common", Common),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "hidden", "activation", "pairs")),
        ("turns", ctypes.c_void_p),
        ("layer", ctypes.POINTER(_Layer)),
    ]


class AttentionStep(CompiledStep):
    """The compiled decode step of rotary attention, GeGLU and token-shift."""

    source = Path(__file__).with_name("step.c")
    layer_type, model_type = _Layer, _Model

    def looks_back(self, position: int) -> int:
        """Return `position`: a token reads all past positions.

        Args:
            position: Position of the token, from 0.

        Returns:
            `position`.
        """
        return position

    def layer_fields(self, block: Block) -> dict[str, Any]:
        """Return the weights of a block."""
        block, given = cast(RotaryBlock, block), self.parameters
        return {
            "mixer_norm": given.norm(block.mixer_norm),
            "ffn_norm": given.norm(block.ffn_norm),
            "shift": given.shift(block.shift),
            **{name: given.linear(getattr(block.mixer, name)) for name in MIXER},
            **{f"ffn_{name}": given.linear(getattr(block.ffn, name)) for name in FFN},
        }

    def model_fields(self) -> dict[str, Any]:
        """Return the sizes of the sublayers, which are equal in all layers, and the rotations."""
        config = cast(RotaryConfig, self.model.config)
        return {
            "heads": config.heads,
            "key_heads": config.heads,
            "hidden": config.ffn_hidden,
            "activation": ACTIVATION_KINDS.index(config.activation),
            **self.rotations(config.rotary_base, rotated(config.head_size)),
        }

    def rotations(self, base: float, dims: int) -> dict[str, Any]:
        """Return the fields for rotary positions.

        Args:
            base: Base of the frequencies.
            dims: Number of rotated dimensions of a head.

        Returns:
            Values by name of the field.
        """
        turns = rotary_turns.function(torch.arange(self.model.config.ctx_len), base, dims)
        return {"pairs": dims // 2, "turns": self.parameters.vector(turns)}
