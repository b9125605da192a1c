"""Pure tensor functions of the models.

Shapes everywhere: B batch, T time (tokens of this call), U past and present (positions 0 .. U-1), C channels,
H heads, N head size (C = H * N), V vocabulary.
"""

from timemix.ops.exponential import Curves, ExpState, exp_state, wkv1_exp
from timemix.ops.wkv1 import BACKENDS, Wkv1State, choose_backend, wkv1, wkv1_state

__all__ = [
    "BACKENDS",
    "Curves",
    "ExpState",
    "Wkv1State",
    "choose_backend",
    "exp_state",
    "wkv1",
    "wkv1_exp",
    "wkv1_state",
]
