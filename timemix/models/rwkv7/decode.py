"""The compiled decode step of rwkv7. The C file step.c opens with the formula.

The structures _Layer and _Model equal the C structures `layer` and `model` of step.c, field by field.
"""

import ctypes
from pathlib import Path
from typing import Any, cast

from timemix.models.compiled_step import CompiledStep
from timemix.models.language_model import LanguageModel
from timemix.models.layers.block import Block
from timemix.models.layers.low_rank import LowRank
from timemix.models.quantize import at_least_int8
from timemix.models.rwkv7.config import Rwkv7Config
from timemix.models.rwkv7.model import MIXED, Rwkv7Block
from timemix.models.step_memory import Common, LinearMap
from timemix.ops.rwkv7.compiled import MOST

_LOW_RANKS = ("decay", "rate", "residual", "gate")
_MIXER, _FFN = ("receptance", "key", "value", "output"), ("key", "value")
_VECTORS = ("removal", "replacement", "bonus")
_STATE = ("mixer_shift", "ffn_shift", "wkv")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p * 2) for name in ("mixer_norm", "ffn_norm", "head_norm")),
        ("mix", ctypes.c_void_p * len(MIXED)),
        ("ffn_mix", ctypes.c_void_p),
        *((name, LinearMap) for name in _MIXER),
        *((name, LinearMap * len(_LOW_RANKS)) for name in ("down", "up")),
        *((f"ffn_{name}", LinearMap) for name in _FFN),
        *((name, ctypes.c_void_p) for name in (*_VECTORS, *_STATE)),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("common", Common),
        *((name, ctypes.c_int64) for name in ("heads", "hidden", "ranks")),
        ("head_epsilon", ctypes.c_float),
        ("layer", ctypes.POINTER(_Layer)),
    ]


class Rwkv7Step(CompiledStep):
    """The compiled decode step of rwkv7."""

    source = Path(__file__).with_name("step.c")
    # wkv7.h gives the reason.
    flags = ("-fno-associative-math",)
    layer_type, model_type = _Layer, _Model

    @classmethod
    def hindrance(cls, model: LanguageModel) -> str | None:
        """Return the reason why this step cannot run for a model; None if the step can run."""
        # The C code holds some vectors of a head on the stack.
        if cast(Rwkv7Config, model.config).head_size > MOST:
            return f"the compiled step needs a head size of at most {MOST}"
        return super().hindrance(model)

    def layer_fields(self, block: Block) -> dict[str, Any]:
        """Return the weights of a block."""
        block = cast(Rwkv7Block, block)
        mixer, ffn, given = block.mixer, block.ffn, self.parameters
        down, up = zip(*(self._low_rank(getattr(mixer, name)) for name in _LOW_RANKS), strict=True)
        head_norm = (given.vector(mixer.norm_weight), given.vector(mixer.norm_bias))
        return {
            "mixer_norm": given.norm(block.mixer_norm),
            "ffn_norm": given.norm(block.ffn_norm),
            "head_norm": head_norm,
            "mix": tuple(given.vector(mixer.mix[name]) for name in MIXED),
            "ffn_mix": given.vector(ffn.mix),
            "down": down,
            "up": up,
            **{name: given.linear(getattr(mixer, name)) for name in _MIXER},
            **{f"ffn_{name}": given.linear(getattr(ffn, name)) for name in _FFN},
            **{name: given.vector(getattr(mixer, name)) for name in _VECTORS},
        }

    def model_fields(self) -> dict[str, Any]:
        """Return the sizes of the time-mix and the channel-mix, which are equal in all layers."""
        config = cast(Rwkv7Config, self.model.config)
        return {
            "heads": config.heads,
            "hidden": config.ffn_hidden,
            "ranks": sum(config.ranks.values()),
            "head_epsilon": config.group_norm_eps,
        }

    def _low_rank(self, low_rank: LowRank | None) -> tuple[LinearMap, LinearMap]:
        """Return the two linear maps of a low-rank map, without weights for None."""
        if low_rank is None:
            return LinearMap(), LinearMap()
        pack, weights = self.parameters.panels, at_least_int8(self.parameters.weights)
        down = pack(low_rank.down_weight.t(), None, weights)
        # The gate has no bias.
        return down, pack(low_rank.up_weight.t(), getattr(low_rank, "bias", None), weights)
