"""The memory that the C code of a compiled decode step reads: its structures, and the parameters of a model.

The structures equal the C structures of ops/common/panels.h, ops/common/shift.h and ops/common/step.h, field by field.
"""

import ctypes
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timemix.models.layers.token_shift import TokenShift
from timemix.models.quantize import GROUP, WEIGHTS, Weights, quantized, quantized_in_groups
from timemix.runtime.machine import huge_pages
from timemix.storage.tensors import release

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

    def vector(self, x: Tensor | None) -> int | None:
        """Return the address of a parameter's numbers in float32, which stays valid while this object exists.

        Args:
            x: The parameter; None: no parameter. The C code reads a contiguous parameter of float32 in place.

        Returns:
            The address; None for no parameter.
        """
        return None if x is None else self.address(x.float())

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
