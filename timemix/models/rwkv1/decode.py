"""The compiled decode step of rwkv1 and rwkv1_exp. The C file step.c opens with the formula.

The structures _Layer and _Model equal the C structures `layer` and `model` of step.c, field by field.
"""

import ctypes
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from timemix.models.compiled_step import CompiledStep
from timemix.models.config import ShiftedConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.block import Block
from timemix.models.layers.channel_mix import ChannelMix
from timemix.models.quantize import Weights
from timemix.models.rwkv1.config import Rwkv1Config, Rwkv1ExpConfig
from timemix.models.rwkv1.exp_time_mix import ExpTimeMix
from timemix.models.rwkv1.model import Rwkv1Block
from timemix.models.rwkv1.time_mix import TimeMix
from timemix.models.state import State
from timemix.models.step_memory import Common, LinearMap, Shift
from timemix.ops.common.fused import ACTIVATION_KINDS
from timemix.ops.common.history import extended
from timemix.ops.rwkv1.curves import basis, fading, turned

_LINEARS = ("key", "value", "receptance", "output", "ffn_key", "ffn_value", "ffn_receptance", "ffn_output")
_STATE = ("numerators", "denominators", "mixer_shift", "ffn_shift", "taps", "far")


class _Layer(ctypes.Structure):
    _fields_ = [
        ("mixer_norm", ctypes.c_void_p * 2),
        ("ffn_norm", ctypes.c_void_p * 2),
        ("shift", Shift),
        *((name, LinearMap) for name in _LINEARS),
        *((name, ctypes.c_void_p) for name in ("f", "alpha", "beta", "gamma")),
        *((name, ctypes.c_void_p) for name in ("own", "other", "begin", "coefficients", "direct", "fade")),
        *((name, ctypes.c_void_p) for name in _STATE),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("common", Common),
        *((name, ctypes.c_int64) for name in ("activation", "heads", "hidden", "positions", "history")),
        *((name, ctypes.c_int64) for name in ("modes", "taps")),
        ("known", ctypes.c_void_p),
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

    def __init__(self, owner: "Rwkv1Step", state: State, block: int) -> None:
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


class Rwkv1Step(CompiledStep):
    """The compiled decode step of rwkv1 and rwkv1_exp."""

    source = Path(__file__).with_name("step.c")
    layer_type, model_type = _Layer, _Model

    def __init__(self, model: LanguageModel, weights: Weights) -> None:
        super().__init__(model, weights)
        self._block: int = self._code.timemix_block()
        self._far: FarSums | None = None

    @classmethod
    def hindrance(cls, model: LanguageModel) -> str | None:
        """Return the reason why this step cannot run for a model; None if the step can run."""
        config = model.config
        if isinstance(config, Rwkv1Config) and (config.denominator == "weighted" or config.weights == "free"):
            return "there is no compiled step for a weighted denominator or a free W"
        return super().hindrance(model)

    def looks_back(self, position: int) -> int:
        """Return the average number of past positions that a decode step reads for a token at `position`.

        The number has three parts: the earlier positions of the token's block, 1 for the sum over all earlier blocks,
        and the token's share of the positions from which the step computes the sums of a block.
        """
        blocks, rest = divmod(position, self._block)
        return rest + (blocks + 1 if blocks else 0)

    def layer_fields(self, block: Block) -> dict[str, Any]:
        """Return the weights of a block."""
        block = cast(Rwkv1Block, block)
        mixer, ffn, given = block.mixer, cast(ChannelMix, block.ffn), self.parameters
        linears = {name: getattr(mixer, name) for name in _LINEARS[:4]}
        linears |= {name: getattr(ffn, name.removeprefix("ffn_")) for name in _LINEARS[4:]}
        tables = _exponentials(mixer) if isinstance(mixer, ExpTimeMix) else _tables(cast(TimeMix, mixer))
        return {
            "mixer_norm": given.norm(block.mixer_norm),
            "ffn_norm": given.norm(block.ffn_norm),
            "shift": given.shift(block.shift),
            **{name: None if table is None else given.vector(table) for name, table in tables.items()},
            **{name: given.linear(linear) for name, linear in linears.items()},
        }

    def model_fields(self) -> dict[str, Any]:
        """Return the sizes of the time-mix and the channel-mix, which are equal in all layers."""
        config = cast(ShiftedConfig, self.model.config)
        if isinstance(config, Rwkv1ExpConfig):
            sizes = {"positions": config.ctx_len + 1, "modes": config.exponentials, "taps": config.taps}
        else:
            sizes = {"positions": config.ctx_len, "history": config.ctx_len}
        activation = ACTIVATION_KINDS.index(config.activation)
        return {"activation": activation, "heads": config.heads, "hidden": config.ffn_hidden, **sizes}

    def point_to(self, state: State) -> None:
        """Store the addresses of the tensors of a state and, for rwkv1, of its `FarSums` in the C structures."""
        super().point_to(state)
        if not isinstance(self.model.config, Rwkv1Config):
            return
        far = state.pending
        # A state may come from another decode step, whose tables differ.
        if not isinstance(far, FarSums) or far.owner is not self:
            state.pending = far = FarSums(self, state, self._block)
        far.check(state)
        if far is not self._far:
            self._far = far
            self._model.known = far.known.data_ptr()
            for own, sums in zip(self._layers, far.sums, strict=True):
                own.far = sums.data_ptr()


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
        "direct": curves.taps,
        "fade": (-fading(curves.forget)).exp(),
    }
    found |= {n: None if (t := getattr(mixer, n)) is None else extended(t, end) for n in ("alpha", "beta", "gamma")}
    return {name: None if x is None else x.float() for name, x in found.items()}
