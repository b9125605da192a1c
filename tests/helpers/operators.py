"""Outputs and gradients of operators, compared by name, and the memory of their backward pass."""

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


def stores_states(monkeypatch, kernels, recurrence, arguments, is_training):
    """Return whether the C code of a recurrence gets memory for the states that its backward pass needs."""
    given, call = [], kernels.call
    monkeypatch.setattr(kernels, "call", lambda *passed: (given.append(passed), call(*passed)))
    with torch.set_grad_enabled(is_training):
        recurrence(**{name: x.float().requires_grad_() for name, x in arguments.items()}, backend="c")
    # The name of the C function, its inputs, the state, y, and the memory
    ((_, _, _, _, starts, *_),) = given
    return starts is not None
