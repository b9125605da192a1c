"""Ops that several architectures share: convolutions, stored past values, and C kernels."""
