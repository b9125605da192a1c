"""The part of a compiled decode step that all architectures share.

    logits, state = step(tokens, state, rows, counts)

The speed of a decode step is limited by reading the weights from memory. In a model's own forward pass, most of the
time of a decode step goes to calls of small operators, on one thread. A compiled step is one call of C code for the
whole model. The compiled step processes prompts and new tokens of many texts in one call. The results of a text are
bit-identical for every division of the text into pieces, and for any other texts in a call.

An architecture adds a C file that opens with the formula, and a class derived from `CompiledStep`. step_memory.py
prepares the memory layout that the C file reads.
"""

import ctypes
import operator
import threading
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.errors import InvalidValue
from timemix.models.config import ModelConfig
from timemix.models.language_model import LanguageModel
from timemix.models.layers.block import Block
from timemix.models.quantize import WEIGHTS, Weights, at_least_int8
from timemix.models.state import State
from timemix.models.step_memory import Batch, Common, Parameters
from timemix.runtime.native import library
from timemix.runtime.threads import share

_STORED = (torch.float32, torch.bfloat16, torch.float16)
"""Types of mapped weights that a compiled step copies."""


class CompiledStep:
    """A decode step that computes the whole model in one call of C code.

    Linear weights are copied into panels (ops/common/panels.h). Vectors that the C code needs in another form, such as
    -exp(decay), and parameters in another number format are copied too. The C code reads all other parameters in place.

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
        if without := cls.lacking(model.config):
            return f"the compiled step is for whole models, not for a model without {', '.join(without)}"
        dtype = model.head.weight.dtype
        if model.device.type != "cpu" or not (dtype == torch.float32 or (model.is_mapped and dtype in _STORED)):
            return f"the compiled step is for float32 on the CPU, not {dtype} on {model.device.type}"
        found, reason = cls.library()
        return None if found else reason

    @classmethod
    def lacking(cls, config: ModelConfig) -> tuple[str, ...]:
        """Return the names of the parts that this step needs and a model lacks.

        Args:
            config: Settings of the model.
        """
        without: tuple[str, ...] = getattr(config, "without", ())
        return without

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
            return self._step(
                _int64(tokens), state, _int64(rows), *self._bounds(len(tokens), len(rows), counts, wanted)
            )

    def point_to(self, state: State) -> None:
        """Store the addresses of the tensors of a state in the C structures of the layers.

        Args:
            state: The state. Its tensors become contiguous.

        Raises:
            InvalidValue: A tensor of a layer is not float32.
        """
        tensors = [state.position, *(x for layer in state.layers for x in layer.values())]
        if len(tensors) == len(self._bound) and not any(map(operator.is_not, tensors, self._bound)):
            return
        state.position = state.position.contiguous()
        for own, layer in zip(self._layers, state.layers, strict=True):
            for name, x in layer.items():
                # The model's own forward pass may leave non-contiguous views in a state.
                if x.dtype != torch.float32:
                    raise InvalidValue(f"{name} of the state is {x.dtype}; the compiled step needs float32")
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

    def _bounds(self, tokens: int, rows: int, counts: Tensor | None, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the bounds (R + 1,) of one piece of tokens per row, and the indices of the tokens that need logits.

        Piece p consists of the tokens bounds[p] to bounds[p + 1] - 1.

        Raises:
            InvalidValue: The counts are not one positive number for each row, with the number of tokens as their sum,
                or a wanted index is outside the tokens. The C code does not check these indices.
        """
        if counts is None:
            fits = tokens == rows
        else:
            fits = len(counts) == rows and int(counts.sum()) == tokens and not (counts < 1).any()
        if not fits:
            raise InvalidValue(
                f"counts must have {rows} positive numbers, one for each row, with the sum {tokens}, the number of"
                " tokens; without counts, each row has one token"
            )
        if wanted is not None and len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < tokens:
            raise InvalidValue(
                f"wanted holds an index outside the {tokens} tokens; pass indices from 0 to {tokens - 1}"
            )
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
