"""The tensor functions of the models, without parameters of their own; `ops.rwkv1` and `ops.rwkv7` export the public ones.

Shapes everywhere: B batch, T time (tokens of this call), U past and present (positions 0 ... U-1), C channels, H heads,
N head size (C = H * N), V vocabulary.
"""
