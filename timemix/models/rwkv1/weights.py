"""Conversion of weights from and to the original 2021 code, RWKV-LM 0.01 and 0.02.

The models of the original code are RWKV, MHA_rotary, MHA_shift and MHA_pro.

    original                                 timemix
    time_w      (H, ctx_len), lag 0 last     f      (H, ctx_len), lag 0 first
    time_alpha  (H, 1, ctx_len)              alpha  (H, ctx_len)
    time_beta   (H, ctx_len, 1)              beta   (H, ctx_len)
    time_gamma  (ctx_len, 1)                 gamma  (ctx_len,)
    head_mix    (H, H, 1, 1)                 head_mix (H, H)

All other tensors have the same layout in the original code and in timemix. A conversion only renames, reverses and
reshapes tensors, so it applies to gradients too.
"""

import re
from collections.abc import Sequence

from torch import Tensor

from timemix.errors import InvalidValue

# Pairs (original name, name in timemix) of modules, which have a weight and perhaps a bias, and of single tensors.
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
    """Map the original names of each module's weight and bias to the names in timemix."""
    return {f"{theirs}.{each}": f"{ours}.{each}" for theirs, ours in modules for each in ("weight", "bias")}


_TO_OURS = _parameters(_OUTSIDE), _parameters(_IN_BLOCK) | _TENSORS
_TO_THEIRS = [{ours: theirs for theirs, ours in names.items()} for names in _TO_OURS]


def our_name(name: str) -> str:
    """Convert the name of a parameter from the original code to timemix.

    Args:
        name: Name in the original code.

    Returns:
        Name in timemix.

    Raises:
        InvalidValue: The name is unknown.
    """
    return _renamed(name, _TO_OURS, "of the original 2021 code")


def published_name(name: str) -> str:
    """Convert the name of a parameter from timemix to the original code.

    Args:
        name: Name in timemix.

    Returns:
        Name in the original code.

    Raises:
        InvalidValue: The original code has no such parameter.
    """
    return _renamed(name, _TO_THEIRS, "that the original 2021 code has")


def _renamed(name: str, names: Sequence[dict[str, str]], whose: str) -> str:
    """Rename a parameter with one map for names outside blocks and one map for names inside blocks."""
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
    """Convert a tensor from the original layout to the layout of timemix. `table` is the tensor's name in `attn`."""
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
    """Convert a tensor from the layout of timemix to the original layout. `name` is the tensor's name in timemix."""
    match name.rpartition(".mixer.")[2]:
        case "f":
            if x.ndim != 2:
                raise InvalidValue(f"{name} is a free W; the original 2021 code supports only a decomposed W")
            return x.flip(-1)
        case "alpha":
            return x.unsqueeze(1)
        case "beta" | "gamma":
            return x.unsqueeze(-1)
        case "head_mix":
            return x[..., None, None]
    return x
