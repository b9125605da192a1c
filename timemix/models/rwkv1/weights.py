"""Conversion of weights from and to the original 2021 code (RWKV-LM 0.01, 0.02): RWKV, MHA_rotary, _shift, _pro.

    original                                 timemix
    time_w      (H, ctx_len), lag 0 last     f      (H, ctx_len), lag 0 first
    time_alpha  (H, 1, ctx_len)              alpha  (H, ctx_len)
    time_beta   (H, ctx_len, 1)              beta   (H, ctx_len)
    time_gamma  (ctx_len, 1)                 gamma  (ctx_len,)
    head_mix    (H, H, 1, 1)                 head_mix (H, H)

All other layouts are the same. A conversion only renames, reverses and reshapes, so it applies to gradients too.
"""

import re
from collections.abc import Sequence

from torch import Tensor

from timemix.errors import InvalidValue

# Pairs (original, ours): modules, with a weight and perhaps a bias, and single tensors.
_OUTSIDE = (("tok_emb", "embedding"), ("ln_f", "norm"), ("head", "head"))
_IN_BLOCK = (
    ("ln1", "mixer_norm"),
    ("ln2", "ffn_norm"),
    *((f"attn.{name}", f"mixer.{name}") for name in ("query", "key", "value", "receptance", "output")),
    *((f"mlp.{name}", f"ffn.{name}") for name in ("key", "value", "receptance")),
    ("mlp.weight", "ffn.output"),
)
_TENSORS = {
    "attn.time_w": "mixer.f",
    "attn.time_alpha": "mixer.alpha",
    "attn.time_beta": "mixer.beta",
    "attn.time_gamma": "mixer.gamma",
    "attn.head_mix.weight": "mixer.head_mix",
}


def _parameters(modules: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Map the names of the weight and bias of each module."""
    return {f"{theirs}.{each}": f"{ours}.{each}" for theirs, ours in modules for each in ("weight", "bias")}


_TO_OURS = _parameters(_OUTSIDE), _parameters(_IN_BLOCK) | _TENSORS
_TO_THEIRS = [{ours: theirs for theirs, ours in names.items()} for names in _TO_OURS]


def our_name(name: str) -> str:
    """Return the name in timemix of a parameter of the original code.

    Args:
        name: Name in the original code.

    Returns:
        Name in timemix.

    Raises:
        InvalidValue: The name is unknown.
    """
    return _renamed(name, _TO_OURS, "of the original 2021 code")


def published_name(name: str) -> str:
    """Return the name in the original code of a parameter of timemix.

    Args:
        name: Name in timemix.

    Returns:
        Name in the original code.

    Raises:
        InvalidValue: The original code has no such parameter.
    """
    return _renamed(name, _TO_THEIRS, "that the original 2021 code has")


def _renamed(name: str, names: Sequence[dict[str, str]], whose: str) -> str:
    """Rename a parameter by the maps for names outside and inside blocks."""
    found = re.match(r"blocks\.\d+\.", name)
    block = found[0] if found else ""
    rest = name.removeprefix(block)
    outside, in_block = names
    known = in_block if block else outside
    if rest not in known:
        raise InvalidValue(f"{name!r} is not a parameter {whose}")
    return block + known[rest]


def from_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights, or gradients, of the original code to the names and layouts of timemix.

    Args:
        weights: Tensors by name in the original code.

    Returns:
        Tensors by name in timemix.

    Raises:
        InvalidValue: A name is unknown.
    """
    return {our_name(name): _our_layout(name.rpartition("attn.")[2], x) for name, x in weights.items()}


def to_published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights of timemix to the names and layouts of the original code.

    Args:
        weights: Tensors by name in timemix.

    Returns:
        Tensors by name in the original code.

    Raises:
        InvalidValue: The original code has no such parameter, or W is free.
    """
    return {published_name(name): _their_layout(name, x) for name, x in weights.items()}


def _our_layout(table: str, x: Tensor) -> Tensor:
    """Convert a tensor of the original code, by its name in `attn`, to the layout of timemix."""
    match table:
        case "time_w":
            return x.flip(-1)
        case "time_alpha":
            return x.squeeze(1)
        case "time_beta" | "time_gamma":
            return x.squeeze(-1)
        case "head_mix.weight":
            return x.flatten(1)
    return x


def _their_layout(name: str, x: Tensor) -> Tensor:
    """Convert a tensor of timemix, by its name, to the layout of the original code."""
    match name.rpartition(".mixer.")[2]:
        case "f":
            if x.ndim != 2:
                raise InvalidValue(f"{name} is a free W; the original 2021 code supports decomposed ones only")
            return x.flip(-1)
        case "alpha":
            return x.unsqueeze(1)
        case "beta" | "gamma":
            return x.unsqueeze(-1)
        case "head_mix":
            return x[..., None, None]
    return x
