"""The compiled decode step, whose speed is limited by reading the weights from memory.

    logits, state = step(tokens, state, rows, counts)

In a model's own forward pass, most of the time of a decode step goes to calls of small operators, on one thread. The
compiled step is one call of C code for the whole model, with weights in float32, bfloat16 or int8. The C file step.c
opens with the formula. The compiled step processes prompts and new tokens of many texts in one call. The results of a
text are bit-identical for every division of the text into pieces, and for any other texts in a call.

This module prepares the memory layout that step.c reads. The structures _Linear, _Layer and _Model equal the C
structures of step.c and ops/common/panels.h, field by field.
"""

import ctypes
import operator
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.errors import InvalidValue
from timemix.models.config import ShiftedConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.channel_mix import ChannelMix
from timemix.models.quantize import WEIGHTS, Weights, quantized
from timemix.models.rwkv1.config import Rwkv1Config, Rwkv1ExpConfig
from timemix.models.rwkv1.exp_time_mix import ExpTimeMix
from timemix.models.rwkv1.model import Rwkv1Block
from timemix.models.rwkv1.time_mix import TimeMix
from timemix.models.state import State
from timemix.ops.common.fused import ACTIVATION_KINDS
from timemix.ops.common.history import extended
from timemix.ops.rwkv1.curves import basis, fading, turned
from timemix.runtime.native import library
from timemix.runtime.threads import share


def _int64(x: Tensor) -> Tensor:
    """Convert a tensor to contiguous int64, the format of indices in the C code."""
    return x if x.dtype == torch.int64 and x.is_contiguous() else x.to(torch.int64).contiguous()


def step_library() -> tuple[ctypes.CDLL | None, str]:
    """Compile and load step.c. Return the library and the compiler, or None and the reason of the failure."""
    return library(Path(__file__).with_name("step.c"))


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs")),
    ]


_LINEARS = ("key", "value", "receptance", "output", "ffn_key", "ffn_value", "ffn_receptance", "ffn_output")
_STATE = ("numerators", "denominators", "mixer_shift", "ffn_shift", "newest", "far")


class _Layer(ctypes.Structure):
    _fields_ = [
        ("mixer_norm", ctypes.c_void_p * 2),
        ("ffn_norm", ctypes.c_void_p * 2),
        ("distance", ctypes.c_void_p),
        ("farthest", ctypes.c_int64),
        *((name, _Linear) for name in _LINEARS),
        *((name, ctypes.c_void_p) for name in ("f", "alpha", "beta", "gamma")),
        *((name, ctypes.c_void_p) for name in ("own", "other", "begin", "coefficients", "taps", "fade")),
        *((name, ctypes.c_void_p) for name in _STATE),
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


class FarSums:
    """For each position of a row's current block, sums over all earlier blocks (`far` of step.c).

    The sums are derived from the state, and are never saved. If code outside the step changes the state, the step
    recomputes the sums.

    Args:
        owner: The step that computes the sums.
        state: A state of rwkv1.
        block: Number of positions of a block.
    """

    def __init__(self, owner: "CompiledStep", state: State, block: int) -> None:
        self.owner = owner
        # The tensor `far` of each layer: (B, H, block, N)
        self.sums = [
            torch.zeros_like(layer["numerators"][:, :, :1].expand(-1, -1, block, -1)) for layer in state.layers
        ]
        # First position of the block whose sums are stored for each row; -1: no sums are stored.
        self.known = torch.full((len(state.position),), -1)
        self._written = _written(state)

    def rows_were_written(self, state: State, rows: Tensor) -> None:
        """Discard the sums of rows after other code has replaced the rows by one write to each tensor of the state.

        Args:
            state: The state.
            rows: Indices of the rows (R,).
        """
        self.known[rows] = -1
        # After more than one write to a tensor of the state, any row may have changed.
        once = [(history, count + 1) for history, count in self._written]
        self._written = _written(state)
        if self._written != once:
            self.known.fill_(-1)

    def check(self, state: State) -> None:
        """Discard the sums of all rows if code outside the step has written to the state since the last call."""
        if (written := _written(state)) != self._written:
            self.known.fill_(-1)
            self._written = written


def _written(state: State) -> list[tuple[int, int]]:
    """Return the id() of each layer's tensor `numerators`, and PyTorch's count of writes to the tensor.

    PyTorch does not count the writes of the compiled step. For tensors created in inference mode, PyTorch counts no
    writes, so the step recomputes all rows after `State.put`.
    """
    histories = [layer["numerators"] for layer in state.layers]
    if histories[0].is_inference():
        return [(id(x), 0) for x in histories]
    return [(id(x), x._version) for x in histories]


class CompiledStep:
    """The decode step that computes the whole model in one call of step.c.

    Linear weights are copied into panels (ops/common/panels.h). The C code reads all parameters except linear weights
    in place.

    Args:
        model: A supported model (`build_step` checks the support).
        weights: Format to which the linear weights are rounded: "float32", "bfloat16" or "int8".
    """

    compiled = True

    def __init__(self, model: LanguageModel, weights: Weights) -> None:
        found, self.reason = step_library()
        assert found is not None
        self._call = cast(Callable[..., int], found.timemix_step)
        found.timemix_step.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 8]
        self.model = model
        # Only one call at a time may use the structures and the scratch memory.
        self._lock = threading.Lock()
        self._type = WEIGHTS.index(weights)
        self._panel: int = found.timemix_panel()
        self._block: int = found.timemix_block()
        # This list keeps alive the tensors that the structures point to.
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
        self._remembers = isinstance(config, Rwkv1Config)
        # Number of scratch values for each token and for each piece of tokens, as documented at timemix_step.
        self._sizes_of_scratch = (
            3 * C + max(3 * C, 2 * hidden + C) + max(C, hidden),
            C * max(cast(Rwkv1Block, block).shift.distance for block in model.blocks),
        )
        self._scratch = torch.empty(0)
        # Result of `_bounds` for the newest call with one token for each row. Most calls have one token for each row.
        self._single = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        # Tensors of the state that the C structures of the layers point to.
        self._bound: list[Tensor] = []
        self._far: FarSums | None = None

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, state: State, rows: Tensor, counts: Tensor | None = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Feed tokens to some rows of a state. `Step` documents the arguments."""
        with self._lock:
            return self._step(_int64(tokens), state, _int64(rows), *self._bounds(len(rows), counts, wanted))

    def _bounds(self, rows: int, counts: Tensor | None, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the bounds (R + 1,) of one piece of tokens per row, and the indices of the tokens that need logits.

        Piece p consists of the tokens bounds[p] to bounds[p + 1] - 1.
        """
        if counts is None and wanted is None and len(self._single[1]) == rows:
            return self._single
        first = torch.arange(rows + 1) if counts is None else F.pad(_int64(counts).cumsum(0), (1, 0))
        found = first, first[1:] - 1 if wanted is None else _int64(wanted)
        if counts is None and wanted is None:
            self._single = found
        return found

    def _step(self, tokens: Tensor, state: State, rows: Tensor, first: Tensor, wanted: Tensor) -> tuple[Tensor, State]:
        """Call step.c for pieces of tokens with bounds `first`."""
        known = self._point_to(state)
        per_row, per_piece = self._sizes_of_scratch
        if len(self._scratch) < (size := len(tokens) * per_row + len(rows) * per_piece):
            self._scratch = torch.empty(size)
        self._model.threads = share()
        logits = torch.empty(len(wanted), self._model.vocabulary)
        given = (rows, first, state.position, known, tokens, wanted, logits, self._scratch)
        pointers = [None if x is None else x.data_ptr() for x in given]
        fault = self._call(ctypes.byref(self._model), len(rows), len(state.position), len(wanted), *pointers)
        if fault == 1:
            token = int(tokens[(tokens < 0) | (tokens >= self._model.vocabulary)][0])
            raise InvalidValue(f"token {token} is outside the vocabulary of {self._model.vocabulary}; ids start at 0")
        if fault == 2:
            raise InvalidValue(
                f"a row would pass {self._model.limit}, the end of this model's context; continue it from a new state"
            )
        if fault == 3:
            raise InvalidValue(
                f"rows holds an index outside 0 to {len(state.position) - 1}, or a row at a negative position; pass"
                " rows of this state"
            )
        return logits, state

    def _point_to(self, state: State) -> Tensor | None:
        """Store pointers to the tensors of a state in the C structures of the layers.

        Return `FarSums.known` for rwkv1, and None for rwkv1_exp.
        """
        tensors = [state.position, *(x for layer in state.layers for x in layer.values())]
        if len(tensors) != len(self._bound) or any(map(operator.is_not, tensors, self._bound)):
            self._bind(state)
        if not self._remembers:
            return None
        far = state.pending
        # A state may come from another decode step, whose tables differ.
        if not isinstance(far, FarSums) or far.owner is not self:
            state.pending = far = FarSums(self, state, self._block)
        far.check(state)
        if far is not self._far:
            self._far = far
            for own, sums in zip(self._layers, far.sums, strict=True):
                own.far = sums.data_ptr()
        return far.known

    def _bind(self, state: State) -> None:
        """Make the tensors of a state contiguous, and write their addresses into the C structures of the layers."""
        state.position = state.position.contiguous()
        for own, tensors in zip(self._layers, state.layers, strict=True):
            for name, x in tensors.items():
                # The model's own forward pass may leave non-contiguous views in a state.
                x = tensors[name] = x.contiguous()
                setattr(own, "newest" if name == "taps" else name, x.data_ptr())
        self._bound = [state.position, *(x for layer in state.layers for x in layer.values())]

    @staticmethod
    def hindrance(model: LanguageModel) -> str | None:
        """Return the reason why this step cannot run for a model; None if the step can run."""
        config = model.config
        if isinstance(config, Rwkv1Config) and (config.denominator == "weighted" or config.weights == "free"):
            return "there is no compiled step for a weighted denominator or a free W"
        if model.device.type != "cpu" or model.head.weight.dtype != torch.float32:
            return f"the compiled step is for float32 on the CPU, not {model.head.weight.dtype} on {model.device.type}"
        found, reason = step_library()
        return None if found else reason

    def looks_back(self, position: int) -> int:
        """Return the average number of past positions that a decode step reads for a token at `position`.

        The number has three parts: the earlier positions of the token's block, 1 for the sum over all earlier blocks,
        and the token's share of the positions from which the step computes the sums of a block.
        """
        blocks, rest = divmod(position, self._block)
        return rest + (blocks + 1 if blocks else 0)

    def _sizes(self, config: ShiftedConfig) -> dict[str, int]:
        """Return the sizes of the time-mix, which are equal in all layers."""
        ctx_len = config.ctx_len
        if isinstance(config, Rwkv1ExpConfig):
            return {"positions": ctx_len + 1, "modes": config.exponentials, "newest": config.taps}
        return {"positions": ctx_len, "limit": ctx_len, "history": ctx_len}

    def _layer(self, block: Rwkv1Block) -> _Layer:
        """Return the C structure of a block, with pointers to its weights. `_bind` adds the pointers to the state."""
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
        """Round the weight of a linear map, and copy it into panels."""
        weight, scale, panel = linear.weight.detach(), None, self._panel
        if WEIGHTS[self._type] == "int8":
            weight, scale = quantized(weight)
        elif WEIGHTS[self._type] == "bfloat16":
            weight = weight.to(torch.bfloat16)
        missing = -linear.out_features % panel
        # (outputs, inputs) -> (panels, PANEL, inputs) -> (panels, inputs, PANEL), with zeros after the last output
        panels = F.pad(weight, (0, 0, 0, missing)).view(-1, panel, linear.in_features).transpose(1, 2)
        return _Linear(
            weight=self._hold(panels),
            scale=None if scale is None else self._hold(F.pad(scale, (0, missing))),
            bias=None if linear.bias is None else self._hold(F.pad(linear.bias.detach(), (0, missing))),
            outputs=linear.out_features,
            inputs=linear.in_features,
        )

    def _norm(self, norm: nn.LayerNorm) -> ctypes.Array[Any]:
        return (ctypes.c_void_p * 2)(self._hold(norm.weight), self._hold(norm.bias))

    def _hold(self, x: Tensor) -> int:
        """Return the address of a tensor's numbers, which stays valid while this step exists."""
        self._held.append(x.detach().contiguous())
        return self._held[-1].data_ptr()


def _tables(mixer: TimeMix) -> dict[str, Tensor | None]:
    """Return the tables of a layer of rwkv1."""
    return {name: getattr(mixer, name) for name in ("f", "alpha", "beta", "gamma")}


@torch.no_grad()
def _exponentials(mixer: ExpTimeMix) -> dict[str, Tensor | None]:
    """Return the tables of a layer of rwkv1_exp.

    Each token changes slot j from S_j to own_j S_j + other_j S_partner, where own and other are (H, K). The table begin
    (H, K) is phi(0), and fade (H,) is rho. The tables alpha, beta and gamma have an additional last entry, which
    applies to all positions from ctx_len on.
    """
    curves, end = mixer.curves, mixer.config.ctx_len + 1
    own, sines = turned(curves, torch.ones(()))
    found = {
        "own": own,
        # A pair of slots is rotated: the first slot gets minus the sine, the second slot plus the sine, as in
        # `partners`.
        "other": torch.where(torch.arange(own.shape[1]) % 2 == 0, -sines, sines),
        "begin": basis(curves, torch.zeros(())),
        "coefficients": curves.coefficients,
        "taps": curves.taps,
        "fade": (-fading(curves.forget)).exp(),
    }
    found |= {n: None if (t := getattr(mixer, n)) is None else extended(t, end) for n in ("alpha", "beta", "gamma")}
    return {name: None if x is None else x.float() for name, x in found.items()}
