"""The compiled decode step of rwkv5 and rwkv6. The C file step.c opens with the formula.

The structures _Layer and _Model equal the C structures `layer` and `model` of step.c, field by field.
"""

import ctypes
from pathlib import Path
from typing import Any, cast

import torch

from timemix.models.compiled_step import CompiledStep
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.block import Block
from timemix.models.layers.low_rank import LowRank
from timemix.models.layers.receptance_mix import MIXED as FFN_MIXED
from timemix.models.quantize import at_least_int8
from timemix.models.rwkv6.config import Rwkv5Config, Rwkv6Config
from timemix.models.rwkv6.model import MIXED_6, Rwkv5Block, TimeMix6
from timemix.models.step_memory import Common, LinearMap
from timemix.ops.rwkv6.compiled import MOST

_MIXER, _FFN = ("key", "value", "receptance", "gate", "output"), ("key", "receptance", "value")
_STATE = ("mixer_shift", "ffn_shift", "wkv")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p * 2) for name in ("mixer_norm", "ffn_norm", "head_norm")),
        ("first_mix", ctypes.c_void_p),
        ("mix", ctypes.c_void_p * len(MIXED_6)),
        ("ffn_mix", ctypes.c_void_p * 2),
        *((name, LinearMap) for name in _MIXER),
        *((f"ffn_{name}", LinearMap) for name in _FFN),
        ("mix_down", LinearMap),
        ("mix_up", LinearMap * len(MIXED_6)),
        *((name, LinearMap) for name in ("decay_down", "decay_up")),
        *((name, ctypes.c_void_p) for name in ("decay", "bonus", *_STATE)),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("common", Common),
        *((name, ctypes.c_int64) for name in ("heads", "hidden", "rank", "decay_rank")),
        ("head_epsilon", ctypes.c_float),
        ("layer", ctypes.POINTER(_Layer)),
    ]


class Rwkv6Step(CompiledStep):
    """The compiled decode step of rwkv5 and rwkv6."""

    source = Path(__file__).with_name("step.c")
    # exp.h gives the reason.
    flags = ("-fno-associative-math",)
    layer_type, model_type = _Layer, _Model

    @classmethod
    def hindrance(cls, model: LanguageModel) -> str | None:
        """Return the reason why this step cannot run for a model; None if the step can run."""
        # The C code holds some vectors of a head on the stack.
        if cast(Rwkv5Config, model.config).head_size > MOST:
            return f"the compiled step needs a head size of at most {MOST}"
        return super().hindrance(model)

    @classmethod
    def lacking(cls, config: ModelConfig) -> tuple[str, ...]:
        """Return the names of the parts that this step needs and a model lacks. RWKV-5.0 has no gate."""
        return tuple(p for p in super().lacking(config) if p != "gate" or isinstance(config, Rwkv6Config))

    def layer_fields(self, block: Block) -> dict[str, Any]:
        """Return the weights of a block."""
        block = cast(Rwkv5Block, block)
        mixer, ffn, given = block.mixer, block.ffn, self.parameters
        own = self._fields_of_6(mixer, ffn) if isinstance(mixer, TimeMix6) else self._fields_of_5(mixer, ffn)
        return own | {
            "mixer_norm": given.norm(block.mixer_norm),
            "ffn_norm": given.norm(block.ffn_norm),
            "head_norm": (given.vector(mixer.norm_weight), given.vector(mixer.norm_bias)),
            **{name: given.linear(linear) for name in _MIXER if (linear := getattr(mixer, name)) is not None},
            **{f"ffn_{name}": given.linear(getattr(ffn, name)) for name in _FFN},
            "bonus": given.vector(mixer.bonus),
        }

    def model_fields(self) -> dict[str, Any]:
        """Return the sizes of the time-mix and the channel-mix, which are equal in all layers."""
        config = cast(Rwkv5Config, self.model.config)
        rank, decay_rank = (config.mixture_rank, config.decay_rank) if isinstance(config, Rwkv6Config) else (0, 0)
        return {
            "heads": config.heads,
            "hidden": config.ffn_hidden,
            "rank": rank,
            "decay_rank": decay_rank,
            "head_epsilon": config.group_norm_eps,
        }

    def _fields_of_5(self, mixer: Any, ffn: Any) -> dict[str, Any]:
        """Return the mixtures and the decay of rwkv5. step.c has the share of the previous token, and w of wkv6."""
        given = self.parameters
        # In bfloat16, 1 - x would be rounded.
        return {
            "mix": tuple(given.vector(1 - mixer.mix[n].float()) if n in mixer.mix else None for n in MIXED_6),
            "ffn_mix": tuple(given.vector(1 - ffn.mix[name].float()) for name in FFN_MIXED),
            "decay": given.vector(-mixer.decay.float().exp()),
        }

    def _fields_of_6(self, mixer: TimeMix6, ffn: Any) -> dict[str, Any]:
        """Return the mixtures and the decay of rwkv6, and their low-rank maps."""
        given, weights = self.parameters, at_least_int8(self.parameters.weights)
        maps = [cast(LowRank, mixer.mix_maps[name]) for name in MIXED_6]
        # One map has more panels than each of the five, so that more threads share it.
        down = torch.cat([each.down_weight for each in maps], 1)
        return {
            "first_mix": given.vector(mixer.first_mix),
            "mix": tuple(given.vector(mixer.mix[name]) for name in MIXED_6),
            "ffn_mix": tuple(given.vector(ffn.mix[name]) for name in FFN_MIXED),
            "mix_down": given.panels(down.t(), None, weights),
            "mix_up": tuple(given.panels(each.up_weight.t(), None, weights) for each in maps),
            "decay_down": given.panels(mixer.decay.down_weight.t(), None, weights),
            "decay_up": given.panels(mixer.decay.up_weight.t(), mixer.decay.bias, weights),
        }
