"""Ops that several architectures share: convolutions, histories, and C kernels for training and decode steps."""
