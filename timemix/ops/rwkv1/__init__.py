"""The time-mix of RWKV from 2021: `wkv1` with a table of weights by lag, and `wkv1_exp` with sums of exponentials."""

from timemix.ops.rwkv1.api import BACKENDS, choose_backend, wkv1
from timemix.ops.rwkv1.curves import Curves
from timemix.ops.rwkv1.exponential import ExpState, exp_state, wkv1_exp
from timemix.ops.rwkv1.state import Wkv1State, wkv1_state

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
