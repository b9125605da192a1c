"""Tensor functions of the models. `ops.rwkv1`, `ops.rwkv4`, `ops.rwkv6` and `ops.rwkv7` export the public functions.

The functions have no trainable parameters. The letters in shapes are: B batch size, T tokens of this call, U past and
present positions (0 to U-1), C channels, H heads, N head size (C = H * N), V vocabulary size.
"""
