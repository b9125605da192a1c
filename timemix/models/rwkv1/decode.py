"""One token at a time, at the speed at which the weights can be read: the step of generation.

A model's own forward spends most of such a step in calls of small operators, and on one thread. Here it is one call of
compiled code (step.c), for the weights as they are, in bfloat16, or in 8 bits. Where that cannot serve, the model does.
"""

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.config import ShiftedConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.channel_mix import ChannelMix
from timemix.models.quantize import WEIGHTS, Weights, quantized
from timemix.models.rwkv1 import tiles as lazy
from timemix.models.rwkv1.config import Rwkv1Config, Rwkv1ExpConfig
from timemix.models.rwkv1.exp_time_mix import ExpTimeMix
from timemix.models.rwkv1.model import Rwkv1Block
from timemix.models.rwkv1.tiles import Pending
from timemix.models.rwkv1.time_mix import TimeMix
from timemix.models.state import State
from timemix.ops.common.fused import ACTIVATION_KINDS
from timemix.ops.common.history import extended
from timemix.ops.rwkv1.exponential import basis, fading, turned
from timemix.runtime.native import library


def step_library() -> tuple[ctypes.CDLL | None, str]:
    return library(Path(__file__).with_name("step.c"))


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs")),
    ]


_LINEARS = ("key", "value", "receptance", "output", "ffn_key", "ffn_value", "ffn_receptance", "ffn_output")
_STATE = ("numerators", "denominators", "mixer_shift", "ffn_shift", "newest")


class _Layer(ctypes.Structure):
    _fields_ = [
        ("mixer_norm", ctypes.c_void_p * 2),
        ("ffn_norm", ctypes.c_void_p * 2),
        ("distance", ctypes.c_void_p),
        ("farthest", ctypes.c_int64),
        *((name, _Linear) for name in _LINEARS),
        *((name, ctypes.c_void_p) for name in ("f", "alpha", "beta", "gamma")),
        *((name, ctypes.c_void_p) for name in ("own", "other", "begin", "coefficients", "taps", "fade")),
        *((name, ctypes.c_void_p) for name in (*_STATE, "pending")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("type", "activation", "vocabulary", "layers", "heads", "channels")),
        *((name, ctypes.c_int64) for name in ("hidden", "positions", "limit", "history", "modes", "newest", "threads")),
        ("epsilon", ctypes.c_float),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p * 2),
        ("head", _Linear),
        ("layer", ctypes.POINTER(_Layer)),
    ]


class CompiledStep:
    """The whole model in one call of step.c, which reads a copy of the linear weights, laid out for it."""

    compiled = True

    def __init__(self, model: LanguageModel, weights: Weights) -> None:
        found, self.reason = step_library()
        assert found is not None
        self._call = cast(Callable[..., int], found.timemix_step)
        self.model = model
        # The structures are of one call at a time.
        self._lock = threading.Lock()
        self._type = WEIGHTS.index(weights)
        self._panel = found.timemix_panel()
        # What the structures point to.
        self._held: list[Tensor] = []
        config, norm = cast(ShiftedConfig, model.config), cast(nn.LayerNorm, model.norm)
        self._layers = (_Layer * config.layers)(*(self._layer(cast(Rwkv1Block, block)) for block in model.blocks))
        C, hidden = config.channels, config.ffn_hidden
        self._model = _Model(
            type=self._type,
            activation=ACTIVATION_KINDS.index(config.activation),
            vocabulary=config.vocab_size,
            layers=config.layers,
            heads=config.heads,
            channels=C,
            hidden=hidden,
            **self._sizes(config),
            epsilon=norm.eps,
            embedding=self._hold(model.embedding.weight),
            norm=self._norm(norm),
            head=self._linear(model.head),
            layer=self._layers,
        )
        self._filters: list[Tensor] | None = None
        if isinstance(config, Rwkv1Config) and config.ctx_len >= lazy.FROM:
            self._filters = [cast(TimeMix, block.mixer).f.detach() for block in model.blocks]
        self.tiled = self._filters is not None
        self._scratch = torch.empty(1, 2 * C + max(3 * C, 2 * hidden + C) + max(C, hidden))

    @torch.no_grad()
    def __call__(self, tokens: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
        with self._lock:
            return self._step(tokens.to(torch.int64).contiguous(), state, rows.to(torch.int64).contiguous())

    def _step(self, tokens: Tensor, state: State, rows: Tensor) -> tuple[Tensor, State]:
        count, places = len(rows), len(state.position)
        state.position = state.position.contiguous()
        for own, tensors in zip(self._layers, state.layers, strict=True):
            for name, x in tensors.items():
                # A prefill may leave views.
                if not x.is_contiguous():
                    x = tensors[name] = x.contiguous()
                setattr(own, "newest" if name == "taps" else name, x.data_ptr())
        if len(self._scratch) < count:
            self._scratch = torch.empty(count, self._scratch.shape[1])
        starts = self._starts(state, rows)
        self._model.threads = torch.get_num_threads()
        logits = torch.empty(count, self._model.vocabulary)
        given = (rows, state.position, starts, tokens, logits, self._scratch)
        pointers = (None if x is None else x.data_ptr() for x in given)
        sizes = (ctypes.c_int64(count), ctypes.c_int64(places))
        fault = self._call(ctypes.byref(self._model), *sizes, *map(ctypes.c_void_p, pointers))
        if fault == 1:
            raise ValueError(f"a token is outside the vocabulary of {self._model.vocabulary}")
        if fault == 2:
            raise ValueError(f"a row stands at {self._model.limit}, the end of this model's context")
        if fault == 3:
            raise ValueError(f"a row is not one of the state's {places}, or stands at a negative position")
        if isinstance(state.pending, Pending):
            state.pending.advance(state, rows)
        return logits, state

    @staticmethod
    def hindrance(model: LanguageModel) -> str | None:
        """Return why this step cannot run for a model, None where it can."""
        config = model.config
        if isinstance(config, Rwkv1Config) and (config.denominator == "weighted" or config.weights == "free"):
            return "there is no compiled step for a weighted denominator or a free W"
        if model.device.type != "cpu" or model.head.weight.dtype != torch.float32:
            return f"the compiled step is for float32 on the CPU, not {model.head.weight.dtype} on {model.device.type}"
        found, reason = step_library()
        return None if found else reason

    def looks_back(self, position: int) -> int:
        """Positions of the past that a step at a position reads: with tiles, the newest block and what is pending."""
        return min(position, lazy.BLOCK) + 1 if self.tiled else position

    def _starts(self, state: State, rows: Tensor) -> Tensor | None:
        """Where each row's own look at its past begins, what is older being pending; None: at its first token."""
        if self._filters is None:
            return None
        pending = state.pending
        if not isinstance(pending, Pending) or pending.filters is not self._filters:
            state.pending = pending = Pending(state, self._filters)
        starts = pending.starts(state, rows)
        for own, sums in zip(self._layers, pending.sums, strict=True):
            own.pending = sums.data_ptr()
        return starts

    def _sizes(self, config: ShiftedConfig) -> dict[str, int]:
        """What of the mixer is the same in all layers."""
        ctx_len = config.ctx_len
        if isinstance(config, Rwkv1ExpConfig):
            return {"positions": ctx_len + 1, "modes": config.exponentials, "newest": config.taps}
        return {"positions": ctx_len, "limit": ctx_len, "history": ctx_len}

    def _layer(self, block: Rwkv1Block) -> _Layer:
        mixer, ffn = block.mixer, cast(ChannelMix, block.ffn)
        linears = {name: getattr(mixer, name) for name in _LINEARS[:4]}
        linears |= {name: getattr(ffn, name.removeprefix("ffn_")) for name in _LINEARS[4:]}
        tables = _exponentials(mixer) if isinstance(mixer, ExpTimeMix) else _tables(cast(TimeMix, mixer))
        return _Layer(
            mixer_norm=self._norm(block.mixer_norm),
            ffn_norm=self._norm(block.ffn_norm),
            distance=self._hold(block.shift.distances()),
            farthest=block.shift.distance,
            **{name: None if table is None else self._hold(table) for name, table in tables.items()},
            **{name: self._linear(linear) for name, linear in linears.items()},
        )

    def _linear(self, linear: nn.Linear) -> _Linear:
        weight, scale, panel = linear.weight.detach(), None, self._panel
        if WEIGHTS[self._type] == "int8":
            weight, scale = quantized(weight)
        elif WEIGHTS[self._type] == "bfloat16":
            weight = weight.to(torch.bfloat16)
        missing = -linear.out_features % panel
        panels = F.pad(weight, (0, 0, 0, missing)).view(-1, panel, linear.in_features).transpose(1, 2)
        return _Linear(
            weight=self._hold(panels),
            scale=None if scale is None else self._hold(F.pad(scale, (0, missing))),
            bias=None if linear.bias is None else self._hold(F.pad(linear.bias.detach(), (0, missing))),
            outputs=linear.out_features,
            inputs=linear.in_features,
        )

    def _norm(self, norm: nn.LayerNorm) -> ctypes.Array:
        return (ctypes.c_void_p * 2)(self._hold(norm.weight), self._hold(norm.bias))

    def _hold(self, x: Tensor) -> int:
        """Address of a tensor's numbers, which stay there as long as this step."""
        self._held.append(x.detach().contiguous())
        return self._held[-1].data_ptr()


def _tables(mixer: TimeMix) -> dict[str, Tensor | None]:
    """What a layer of rwkv1 looks up."""
    return {name: getattr(mixer, name) for name in ("f", "alpha", "beta", "gamma")}


@torch.no_grad()
def _exponentials(mixer: ExpTimeMix) -> dict[str, Tensor | None]:
    """What a layer of rwkv1_exp looks up: how its slots grow a token older, and tables with an entry for the end."""
    curves, end = mixer.curves, mixer.config.ctx_len + 1
    own, sines = turned(curves, torch.ones(()))
    found = {
        "own": own,
        # A pair turns: the sine goes down into the first and up into the second.
        "other": torch.where(torch.arange(own.shape[1]) % 2 == 0, -sines, sines),
        "begin": basis(curves, torch.zeros(())),
        "coefficients": curves.coefficients,
        "taps": curves.taps,
        "fade": (-fading(curves.forget)).exp(),
    }
    found |= {n: None if (t := getattr(mixer, n)) is None else extended(t, end) for n in ("alpha", "beta", "gamma")}
    return {name: None if x is None else x.float() for name, x in found.items()}
