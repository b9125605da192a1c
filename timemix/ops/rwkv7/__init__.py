"""The time-mix of RWKV-7: `wkv7`, a recurrence of matrix-valued states with a generalized delta rule."""

from timemix.ops.rwkv7.api import BACKENDS, choose_backend, wkv7

__all__ = ["BACKENDS", "choose_backend", "wkv7"]
