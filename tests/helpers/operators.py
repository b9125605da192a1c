"""Outputs and gradients of operators, compared by name."""

import torch


def gradients_of(values, leaves):
    """Return gradients of a weighted sum of all values. Each entry has another weight, so errors cannot cancel."""
    total = sum((x * torch.sin(torch.arange(x.numel()).double()).view(x.shape).to(x)).sum() for x in values.values())
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)
