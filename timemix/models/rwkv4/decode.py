"""The compiled decode step of rwkv4. The C file step.c opens with the formula.

The structures _Layer and _Model equal the C structures `layer` and `model` of step.c, field by field.
"""

import ctypes
from pathlib import Path
from typing import Any, cast

from timemix.models.compiled_step import CompiledStep
from timemix.models.layers.block import Block
from timemix.models.rwkv4.config import Rwkv4Config
from timemix.models.rwkv4.model import MIXED, Rwkv4Block
from timemix.models.step_memory import Common, LinearMap

_MIXER, _FFN = (*MIXED, "output"), ("key", "receptance", "value")
_STATE = ("mixer_shift", "ffn_shift", "wkv")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p * 2) for name in ("mixer_norm", "ffn_norm")),
        ("mix", ctypes.c_void_p * len(MIXED)),
        ("ffn_mix", ctypes.c_void_p * 2),
        *((name, LinearMap) for name in _MIXER),
        *((f"ffn_{name}", LinearMap) for name in _FFN),
        *((name, ctypes.c_void_p) for name in ("decay", "bonus", *_STATE)),
    ]


class _Model(ctypes.Structure):
    _fields_ = [("common", Common), ("hidden", ctypes.c_int64), ("layer", ctypes.POINTER(_Layer))]


class Rwkv4Step(CompiledStep):
    """The compiled decode step of rwkv4."""

    source = Path(__file__).with_name("step.c")
    # wkv4.c gives the reason.
    flags = ("-fno-associative-math",)
    layer_type, model_type = _Layer, _Model

    def layer_fields(self, block: Block) -> dict[str, Any]:
        """Return the weights of a block."""
        block = cast(Rwkv4Block, block)
        mixer, ffn, given = block.mixer, block.ffn, self.parameters
        return {
            "mixer_norm": given.norm(block.mixer_norm),
            "ffn_norm": given.norm(block.ffn_norm),
            # step.c has the share of the previous token.
            "mix": tuple(given.vector(1 - mixer.mix[name].float()) for name in MIXED),
            "ffn_mix": tuple(given.vector(1 - ffn.mix[name].float()) for name in ("key", "receptance")),
            **{name: given.linear(getattr(mixer, name)) for name in _MIXER},
            **{f"ffn_{name}": given.linear(getattr(ffn, name)) for name in _FFN},
            "decay": given.vector(-mixer.decay.float().exp()),
            "bonus": given.vector(mixer.bonus),
        }

    def model_fields(self) -> dict[str, Any]:
        """Return the hidden size of the channel-mix, which is equal in all layers."""
        return {"hidden": cast(Rwkv4Config, self.model.config).ffn_hidden}
