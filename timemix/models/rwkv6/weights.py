"""Conversion of weights from and to the original code of RWKV-5 and RWKV-6 (RWKV-LM), as in the published models.

    original                                   timemix
    vectors of the blocks    (1, 1, C)         (C,)
    time_maa_w1              (C, 5 R)          five matrices (C, R), one for each mixture
    time_maa_w2              (5, R, C)         five matrices (R, C)

All other tensors have the same layout. A conversion only renames, reshapes, splits and stacks tensors, so it applies to
gradients too.

Files of 5.0 and 5.1 have one decay per head and one logarithm of a bonus, `time_first`. Both become vectors with equal
numbers, so that the model of 5.2 computes the same logits. 5.0 has no gate.
"""

import itertools
import re
from typing import Any

import torch
from torch import Tensor

from timemix.errors import InvalidValue
from timemix.models.published import PublishedNames
from timemix.models.rwkv6.config import Rwkv5Config, Rwkv6Config
from timemix.models.rwkv6.model import MIXED_6

_OUTSIDE = {
    "embedding.weight": "emb.weight",
    "input_norm.weight": "blocks.0.ln0.weight",
    "input_norm.bias": "blocks.0.ln0.bias",
    "norm.weight": "ln_out.weight",
    "norm.bias": "ln_out.bias",
    "head.weight": "head.weight",
}
_SHARED = {
    **{
        f"{ours}.{each}": f"{theirs}.{each}"
        for ours, theirs in (("mixer_norm", "ln1"), ("ffn_norm", "ln2"))
        for each in ("weight", "bias")
    },
    **{f"mixer.{name}.weight": f"att.{name}.weight" for name in ("receptance", "key", "value", "gate", "output")},
    **{f"ffn.{name}.weight": f"ffn.{name}.weight" for name in ("receptance", "key", "value")},
    "mixer.bonus": "att.time_faaaa",
    "mixer.norm_weight": "att.ln_x.weight",
    "mixer.norm_bias": "att.ln_x.bias",
}
_VECTORS_5 = {
    **{f"mixer.mix.{name}": f"att.time_mix_{name[0]}" for name in ("key", "value", "receptance", "gate")},
    **{f"ffn.mix.{name}": f"ffn.time_mix_{name[0]}" for name in ("key", "receptance")},
}
_VECTORS_6 = {
    **{f"mixer.mix.{name}": f"att.time_maa_{name[0]}" for name in ("key", "value", "receptance", "gate")},
    **{f"ffn.mix.{name}": f"ffn.time_maa_{name[0]}" for name in ("key", "receptance")},
    "mixer.mix.decay": "att.time_maa_w",
    "mixer.first_mix": "att.time_maa_x",
    "mixer.decay.bias": "att.time_decay",
}
_MAPS_6 = {
    "mixer.decay.down_weight": "att.time_decay_w1",
    "mixer.decay.up_weight": "att.time_decay_w2",
}
# The stacked low-rank maps to the mixtures: published name, name in timemix after the name of the mixture, dimension
_STACKED = (("att.time_maa_w1", "down_weight", 1), ("att.time_maa_w2", "up_weight", 0))
_MAP = re.compile(r"blocks\.(\d+)\.mixer\.mix_maps\.\w+\.(down|up)_weight")
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")


class Conversion:
    """Conversion of the names, shapes and settings of one version.

    Args:
        config: Class of the settings.
        version: Name of the version in messages.
        vectors: Published name of each vector of a block, by its name in timemix. The original code stores (1, 1, C).
        others: Published name of each other parameter of a block that the two versions do not share.
    """

    def __init__(
        self, config: type[Rwkv5Config], version: str, vectors: dict[str, str], others: dict[str, str]
    ) -> None:
        self._config, self._version, self._vectors = config, version, vectors
        self._names = PublishedNames(version, "blocks", _OUTSIDE, _SHARED | vectors | others)

    def published_name(self, name: str) -> str:
        """Convert the name of a parameter from timemix to the original code."""
        if match := _MAP.fullmatch(name):
            theirs = next(theirs for theirs, ours, _ in _STACKED if ours.startswith(match[2]))
            return f"blocks.{match[1]}.{theirs}"
        return self._names.published(name)

    def from_published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert weights from the original code to timemix.

        Args:
            weights: Weights by their names in the original code.

        Returns:
            Weights by their names in timemix.

        Raises:
            InvalidValue: A name is unknown.
        """
        found: dict[str, Tensor] = {}
        for name, weight in _with_vectors(weights).items():
            if split := _split(name, weight):
                found |= split
            else:
                ours = self._names.ours(name)
                found[ours] = weight.flatten() if _kind(ours) in self._vectors else weight
        return found

    def to_published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert weights from timemix to the original code, to the form of 5.2 or 6."""
        found = {
            self._names.published(name): weight.view(1, 1, -1) if _kind(name) in self._vectors else weight
            for name, weight in weights.items()
            if not _MAP.fullmatch(name)
        }
        layers = dict.fromkeys(match[1] for name in weights if (match := _MAP.fullmatch(name)))
        for layer, (theirs, ours, dim) in itertools.product(layers, _STACKED):
            parts = [weights[f"blocks.{layer}.mixer.mix_maps.{name}.{ours}"] for name in MIXED_6]
            found[f"blocks.{layer}.{theirs}"] = torch.cat(parts, 1) if dim else torch.stack(parts)
        return found

    def state_from_published(self, state: Tensor) -> Tensor:
        """Convert a tuned state (H, values N, keys N) of RWKV-PEFT to the state of a layer (H, keys N, values N)."""
        return state.mT

    def our_config(self, weights: dict[str, Tensor], ctx_len: int, **fields: Any) -> Rwkv5Config:
        """Read the settings of a model from the shapes of its weights in the original code.

        Args:
            weights: Weights by their names in the original code.
            ctx_len: Context length in tokens, which no shape gives.
            **fields: Other settings that no shape gives.

        Returns:
            The settings. The caller checks the names and shapes of the other weights.

        Raises:
            InvalidValue: A weight that gives a size is missing or has other dimensions, or a size is not supported.
        """
        layers = 1 + max((int(found[1]) for name in weights if (found := _BLOCK.match(name))), default=0)
        last = f"blocks.{layers - 1}"
        vocab_size, channels = self._shape(weights, "emb.weight", 2)
        ranks: dict[str, Any] = {}
        if self._config is Rwkv6Config:
            ranks["decay_rank"] = self._shape(weights, f"{last}.att.time_decay_w1", 2)[1]
            ranks["mixture_rank"] = self._shape(weights, f"{last}.att.time_maa_w2", 3)[1]
        elif f"{last}.att.gate.weight" not in weights:
            ranks["without"] = ("gate",)
        old = f"{last}.att.time_first"
        heads = self._shape(weights, old, 1) if old in weights else self._shape(weights, f"{last}.att.time_faaaa", 2)
        return self._config(
            vocab_size=vocab_size,
            ctx_len=ctx_len,
            layers=layers,
            channels=channels,
            heads=heads[0],
            ffn_ratio=self._shape(weights, f"{last}.ffn.key.weight", 2)[0] / channels,
            **ranks,
            **fields,
        )

    def check_exportable(self, config: Rwkv5Config) -> None:
        """Raise InvalidValue if the original code, which has fixed constants, does not compute the same model."""
        if config.group_norm_eps != Rwkv5Config.group_norm_eps:
            raise InvalidValue(
                f"group_norm_eps is {config.group_norm_eps:g}, but the original code has"
                f" {Rwkv5Config.group_norm_eps:g}; export a model with this constant"
            )

    def unused(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of the original code that no model uses: none."""
        return {}

    def _shape(self, weights: dict[str, Tensor], name: str, dims: int) -> torch.Size:
        """Return the shape of a weight, or raise InvalidValue if the weight is missing, or has other dimensions."""
        x = weights.get(name)
        if x is None or x.ndim != dims or not x.numel():
            kind = {1: "vector", 2: "matrix", 3: "stack of matrices"}[dims]
            raise InvalidValue(f"the weights have no {kind} {name!r}; pass all weights of a model of {self._version}")
        return x.shape


RWKV_5 = Conversion(Rwkv5Config, "RWKV-5", _VECTORS_5, {"mixer.decay": "att.time_decay"})
"""Conversion of `rwkv5`."""
RWKV_6 = Conversion(Rwkv6Config, "RWKV-6", _VECTORS_6, _MAPS_6)
"""Conversion of `rwkv6`."""


def _with_vectors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of 5.0 and 5.1 as in 5.2: decays and bonuses (H, N), where all numbers of a head are equal.

    Raises:
        InvalidValue: A block has two bonuses, or lacks a weight.
    """
    found = dict(weights)
    for name in weights:
        if not name.endswith(".att.time_first"):
            continue
        block = name.removesuffix("time_first")
        if f"{block}time_faaaa" in found:
            raise InvalidValue(f"the weights have both {name!r} and '{block}time_faaaa'; remove one of the two")
        for each in ("time_decay", "key.weight"):
            if f"{block}{each}" not in found or not found[f"{block}{each}"].ndim:
                raise InvalidValue(f"the weights have no vector or matrix '{block}{each}'; pass all weights of a model")
        decay, first = found[f"{block}time_decay"], found.pop(name).flatten()
        key = found[f"{block}key.weight"]
        N = len(key) // max(1, len(first))
        found[f"{block}time_decay"] = decay.flatten()[:, None].expand(-1, N).contiguous()
        # The exponential of a number of 16 bits has more digits than such a number.
        bonus = first.to(torch.promote_types(first.dtype, torch.float32)).exp()
        found[f"{block}time_faaaa"] = bonus[:, None].expand(-1, N).contiguous()
    return found


def _split(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the matrix of each mixture in a stacked weight of the original code; for other weights, nothing."""
    match = _BLOCK.match(name)
    for theirs, ours, dim in _STACKED:
        if match and name == match[0] + theirs and weight.ndim == 3 - dim and weight.shape[dim] % len(MIXED_6) == 0:
            parts = weight.tensor_split(len(MIXED_6), dim)
            return {
                f"{match[0]}mixer.mix_maps.{each}.{ours}": x.contiguous() if dim else x.squeeze(0)
                for each, x in zip(MIXED_6, parts, strict=True)
            }
    return {}


def _kind(name: str) -> str:
    """Return the part of a name in timemix after the number of the layer."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else ""
