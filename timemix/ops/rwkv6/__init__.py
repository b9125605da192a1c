"""The time-mix of RWKV-5 and RWKV-6: `wkv6`, a recurrence of matrix-valued states with a decay per key channel."""

from timemix.ops.rwkv6.api import BACKENDS, choose_backend, wkv6

__all__ = ["BACKENDS", "choose_backend", "wkv6"]
