"""The time-mix of RWKV-4: `wkv4`, weighted averages of values with an exponential decay per channel."""

from timemix.ops.rwkv4.api import BACKENDS, choose_backend, wkv4

__all__ = ["BACKENDS", "choose_backend", "wkv4"]
