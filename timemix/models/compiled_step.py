"""The part of a compiled decode step that all architectures share.

    logits, state = step(tokens, state, rows, counts)

The speed of a decode step is limited by reading the weights from memory. In a model's own forward pass, most of the
time of a decode step goes to calls of small operators, on one thread. A compiled step is one call of C code for the
whole model. The compiled step processes prompts and new tokens of many texts in one call. The results of a text are
bit-identical for every division of the text into pieces, and for any other texts in a call.

An architecture adds a C file that opens with the formula, and a class derived from `CompiledStep`. This module prepares
the memory layout that the C file reads. The structures of this module equal the C structures of ops/common/panels.h,
ops/common/shift.h and ops/common/step.h, field by field.
"""

import ctypes
import operator
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.errors import InvalidValue
from timemix.models.language_model import LanguageModel
from timemix.models.layers.block import Block
from timemix.models.layers.token_shift import TokenShift
from timemix.models.quantize import GROUP, WEIGHTS, Weights, at_least_int8, quantized, quantized_in_groups
from timemix.models.state import State
from timemix.runtime.machine import huge_pages
from timemix.runtime.native import library
from timemix.runtime.threads import share
from timemix.storage.tensors import release

_STORED = (torch.float32, torch.bfloat16, torch.float16)
"""Types of mapped weights that a compiled step copies."""

_PANELS = 8
"""Number of panels that are rounded at a time."""

_ALIGNMENT, _AT_LEAST = 64, 2**24
"""Bytes between which panels begin, and least number of bytes of memory that are reserved at a time."""


class LinearMap(ctypes.Structure):
    """The structure `linear` of panels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("type", "outputs", "inputs")),
    ]


class Shift(ctypes.Structure):
    """The structure `token_shift` of shift.h."""

    _fields_ = [("distance", ctypes.c_void_p), ("farthest", ctypes.c_int64)]


class Common(ctypes.Structure):
    """The structure `common` of step.h: the model without its blocks."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("vocabulary", "layers", "channels", "limit", "threads", "stored")),
        ("epsilon", ctypes.c_float),
        ("embedding", ctypes.c_void_p),
        ("input_norm", ctypes.c_void_p * 2),
        ("norm", ctypes.c_void_p * 2),
        ("head", LinearMap),
    ]


class Batch(ctypes.Structure):
    """The structure `batch` of step.h: the pieces of a call."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("pieces", "slots", "outputs")),
        *((name, ctypes.c_void_p) for name in ("slot", "first", "position", "tokens", "wanted")),
    ]


class Parameters:
    """The parameters of a model in the memory layout of the C code.

    The C structures hold addresses of tensors. This object keeps the tensors alive.

    Args:
        weights: Format to which the linear weights are rounded: "float32", "bfloat16", "int8" or "int4".
        panel: Number of outputs in a panel (ops/common/panels.h).
        mapped: Whether the parameters are mapped from a file, so that their memory is released after use.
    """

    def __init__(self, weights: Weights, panel: int, *, mapped: bool = False) -> None:
        self.weights, self.panel, self.mapped = weights, panel, mapped
        self._held: list[Tensor] = []
        # Reserved memory that no panel uses yet.
        self._free = torch.empty(0, dtype=torch.uint8)

    def address(self, x: Tensor) -> int:
        """Return the address of a tensor's numbers, which stays valid while this object exists.

        Args:
            x: The tensor, of any type. The C code reads a contiguous tensor in place.

        Returns:
            The address.
        """
        self._held.append(x.detach().contiguous())
        return self._held[-1].data_ptr()

    def vector(self, x: Tensor) -> int:
        """Return the address of a parameter's numbers in float32, which stays valid while this object exists.

        Args:
            x: The parameter. The C code reads a contiguous parameter of float32 in place.

        Returns:
            The address.
        """
        return self.address(x.float())

    def norm(self, norm: nn.Module) -> ctypes.Array[Any]:
        """Return the addresses of the weight and bias of a norm. The bias of an RMSNorm is NULL.

        Args:
            norm: A LayerNorm or an RMSNorm. Both addresses of any other module are NULL.

        Returns:
            An array of two addresses.
        """
        pair: list[int | None] = [None, None]
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
            pair[0] = self.vector(norm.weight)
        if isinstance(norm, nn.LayerNorm):
            pair[1] = self.vector(norm.bias)
        return (ctypes.c_void_p * 2)(*pair)

    def shift(self, shift: TokenShift) -> Shift:
        """Return the structure of a token-shift.

        Args:
            shift: The token-shift.

        Returns:
            The structure that shift.h reads.
        """
        return Shift(self.address(shift.distances()), shift.distance)

    def linear(self, linear: nn.Linear) -> LinearMap:
        """Round the weight of a linear map, and copy it into panels.

        Args:
            linear: The linear map.

        Returns:
            The structure that panels.h reads.
        """
        return self.panels(linear.weight, linear.bias, self.weights)

    def panels(self, weight: Tensor, bias: Tensor | None, weights: Weights) -> LinearMap:
        """Round a weight, and copy it into panels.

        Args:
            weight: Weight (outputs, inputs).
            bias: Bias (outputs,); None: no bias.
            weights: Format to which the weight is rounded.

        Returns:
            The structure that panels.h reads.
        """
        outputs, inputs = weight.shape
        scales: list[Tensor] = []

        def parts() -> Iterator[Tensor]:
            # Rounding a part of the outputs at a time needs little memory.
            for part in weight.detach().split(_PANELS * self.panel):
                rounded, scale = _rounded(part.float(), weights)
                scales.extend([] if scale is None else [scale])
                yield rounded
                if self.mapped and weight.is_contiguous():
                    release(part)

        panels = self._in_panels(parts(), outputs)
        return LinearMap(
            weight=self.address(panels),
            scale=self.address(self._in_panels(scales, outputs)) if scales else None,
            bias=None if bias is None else self.vector(F.pad(bias.detach(), (0, -outputs % self.panel))),
            type=WEIGHTS.index(weights),
            outputs=outputs,
            inputs=inputs,
        )

    def _in_panels(self, parts: Iterable[Tensor], outputs: int) -> Tensor:
        """Return the parts (some outputs, n) of a tensor as (panels, n, PANEL), with zeros after the last output."""
        found, at = torch.empty(0), 0
        for part in parts:
            # (outputs, n) -> (panels, PANEL, n) -> (panels, n, PANEL)
            own = F.pad(part, (0, 0, 0, -len(part) % self.panel)).view(-1, self.panel, part.shape[1]).transpose(1, 2)
            if at == 0:
                found = self._memory(-(-outputs // self.panel) * own[0].nbytes).view(own.dtype).view(-1, *own.shape[1:])
            found[at : at + len(own)] = own
            at += len(own)
        return found

    def _memory(self, size: int) -> Tensor:
        """Return memory (size,) uint8. All panels lie one after another, because most are smaller than a huge page."""
        if size > len(self._free):
            self._free = huge_pages(max(size, _AT_LEAST))
        found, self._free = self._free[:size], self._free[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        return found


def _rounded(weight: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """Round a weight (outputs, inputs) float32. Return the numbers that panels.h reads, and scales (outputs, n)."""
    if weights == "int4":
        codes, scale = quantized_in_groups(weight)
        return _words(codes), scale
    if weights == "int8":
        integers, scale = quantized(weight)
        return integers, scale[:, None]
    return weight.to(torch.bfloat16 if weights == "bfloat16" else torch.float32), None


def _words(codes: Tensor) -> Tensor:
    """Pack the codes (outputs, inputs) of 8 inputs into one word: (outputs, words) int32, the first input lowest.

    The words of a group are complete: a group of 32 inputs has 4 words.
    """
    outputs, inputs = codes.shape
    # (outputs, inputs) -> (outputs, words, 8)
    eights = F.pad(codes, (0, -inputs % GROUP)).view(outputs, -1, 8).to(torch.int64)
    words = (eights << torch.arange(0, 32, 4)).sum(-1)
    # The same 32 bits as a signed number.
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


class CompiledStep:
    """A decode step that computes the whole model in one call of C code.

    Linear weights are copied into panels (ops/common/panels.h). The C code reads all other parameters in place.

    Args:
        model: A supported model (`hindrance` checks the support).
        weights: Format to which the linear weights are rounded: "float32", "bfloat16", "int8" or "int4".
    """

    compiled = True
    source: ClassVar[Path]
    """The C file of the architecture."""
    flags: ClassVar[tuple[str, ...]] = ()
    """Additional flags of the compiler."""
    layer_type: ClassVar[type[ctypes.Structure]]
    """The C structure of a layer. Its fields for the state have the names of the state's tensors."""
    model_type: ClassVar[type[ctypes.Structure]]
    """The C structure of the model, with the fields `common` and `layer`."""

    def __init__(self, model: LanguageModel, weights: Weights) -> None:
        found, self.reason = self.library()
        assert found is not None
        found.timemix_scratch.restype = ctypes.c_int64
        self._code = found
        self.model = model
        # Only one call at a time may use the structures and the scratch memory.
        self._lock = threading.Lock()
        self.parameters = Parameters(weights, found.timemix_panel(), mapped=model.is_mapped)
        layers = [self.layer_type(**self.layer_fields(block)) for block in model.blocks]
        self._layers = (self.layer_type * len(layers))(*layers)
        self._model = self.model_type(common=self._common(), layer=self._layers, **self.model_fields())
        self._scratch = torch.empty(0)
        # Result of `_bounds` for the newest call with one token for each row. Most calls have one token for each row.
        self._single = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        # Tensors of the state that the C structures of the layers point to.
        self._bound: list[Tensor] = []

    @classmethod
    def library(cls) -> tuple[ctypes.CDLL | None, str]:
        """Compile and load the C file.

        Returns:
            The library and the compiler, or None and the reason of the failure.
        """
        return library(cls.source, *cls.flags)

    @classmethod
    def hindrance(cls, model: LanguageModel) -> str | None:
        """Return the reason why this step cannot run for a model.

        Args:
            model: A model of the architecture.

        Returns:
            The reason; None if the step can run.
        """
        dtype = model.head.weight.dtype
        if model.device.type != "cpu" or not (dtype == torch.float32 or (model.is_mapped and dtype in _STORED)):
            return f"the compiled step is for float32 on the CPU, not {dtype} on {model.device.type}"
        found, reason = cls.library()
        return None if found else reason

    def layer_fields(self, block: Block) -> dict[str, Any]:
        """Return the fields of the C structure of a layer, except the state.

        Args:
            block: The block, whose parameters `self.parameters` prepares.

        Returns:
            Values by name of the field.
        """
        raise NotImplementedError

    def model_fields(self) -> dict[str, Any]:
        """Return the fields of the C structure of the model, except `common` and `layer`.

        Returns:
            Values by name of the field.
        """
        raise NotImplementedError

    def looks_back(self, position: int) -> int:
        """Return the average number of past positions that a token reads, as `Step` describes.

        Args:
            position: Position of the token, from 0.

        Returns:
            0, for an architecture whose state has a constant size.
        """
        return 0

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor, state: State, rows: Tensor, counts: Tensor | None = None, wanted: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Feed tokens to some rows of a state. `Step` documents the arguments."""
        with self._lock:
            return self._step(_int64(tokens), state, _int64(rows), *self._bounds(len(rows), counts, wanted))

    def point_to(self, state: State) -> None:
        """Store the addresses of the tensors of a state in the C structures of the layers.

        Args:
            state: The state. Its tensors become contiguous.
        """
        tensors = [state.position, *(x for layer in state.layers for x in layer.values())]
        if len(tensors) == len(self._bound) and not any(map(operator.is_not, tensors, self._bound)):
            return
        state.position = state.position.contiguous()
        for own, layer in zip(self._layers, state.layers, strict=True):
            for name, x in layer.items():
                # The model's own forward pass may leave non-contiguous views in a state.
                x = layer[name] = x.contiguous()
                setattr(own, name, x.data_ptr())
        self._bound = [state.position, *(x for layer in state.layers for x in layer.values())]

    def _common(self) -> Common:
        """Return the structure of the layers before the first block and after the last block."""
        model = self.model
        norm, embedding = cast(nn.LayerNorm, model.norm), model.embedding.weight
        if embedding.dtype == torch.float16:
            embedding = embedding.float()
        return Common(
            vocabulary=model.config.vocab_size,
            layers=model.config.layers,
            channels=model.config.channels,
            limit=model.max_position or 0,
            stored=WEIGHTS.index("bfloat16" if embedding.dtype == torch.bfloat16 else "float32"),
            epsilon=norm.eps,
            embedding=self.parameters.address(embedding),
            input_norm=self.parameters.norm(model.input_norm),
            norm=self.parameters.norm(norm),
            head=self.parameters.panels(model.head.weight, model.head.bias, at_least_int8(self.parameters.weights)),
        )

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
        """Call the C code for pieces of tokens with bounds `first`."""
        self.point_to(state)
        model, position = ctypes.byref(self._model), state.position
        size = self._code.timemix_scratch(model, ctypes.c_int64(len(tokens)), ctypes.c_int64(len(rows)))
        if len(self._scratch) < size:
            self._scratch = torch.empty(size)
        self._model.common.threads = share()
        logits = torch.empty(len(wanted), self._model.common.vocabulary)
        given = (x.data_ptr() for x in (rows, first, position, tokens, wanted))
        batch = Batch(len(rows), len(position), len(wanted), *given)
        results = (ctypes.c_void_p(x.data_ptr()) for x in (logits, self._scratch))
        self._check(self._code.timemix_step(model, ctypes.byref(batch), *results), tokens, len(position))
        return logits, state

    def _check(self, fault: int, tokens: Tensor, slots: int) -> None:
        """Raise the error of a fault of step.h."""
        model = self._model.common
        if fault == 1:
            token = int(tokens[(tokens < 0) | (tokens >= model.vocabulary)][0])
            raise InvalidValue(f"token {token} is outside the vocabulary of {model.vocabulary}; ids start at 0")
        if fault == 2:
            raise InvalidValue(
                f"a row would pass {model.limit}, the end of this model's context; continue it from a new state"
            )
        if fault == 3:
            raise InvalidValue(
                f"rows holds an index outside 0 to {slots - 1}, or a row at a negative position; pass"
                " rows of this state"
            )


def _int64(x: Tensor) -> Tensor:
    """Convert a tensor to contiguous int64, the format of indices in the C code."""
    return x if x.dtype == torch.int64 and x.is_contiguous() else x.to(torch.int64).contiguous()
