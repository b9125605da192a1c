"""Ops that several architectures share: convolutions, histories, C kernels of training and of decode steps."""
