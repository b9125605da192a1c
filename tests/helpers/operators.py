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


def bytes_kept(call):
    """Return the number of bytes that a function keeps for the backward pass.

    Args:
        call: Function without arguments that returns a tensor with a gradient.
    """
    kept = {}

    def add(x):
        storage = x.untyped_storage()
        # While a storage is held, no other storage can get its address.
        kept[storage.data_ptr()] = storage
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(add, lambda x: x):
        result = call()
    # The hooks get the tensors of `save_for_backward`, but not other attributes of the context of a function.
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [each for each, _ in node.next_functions]
            for value in getattr(node, "__dict__", {}).values():
                for x in value if isinstance(value, tuple | list) else [value]:
                    if isinstance(x, torch.Tensor):
                        add(x)
    return sum(storage.nbytes() for storage in kept.values())


def check_a_reset_forgets_a_nan(recurrence, arguments, broken, backend):
    """Check that no output and no state after a reset is NaN.

    Args:
        recurrence: Function of the recurrence, for 80 tokens of one row.
        arguments: Arguments of the recurrence.
        broken: Numbers of the arguments (B, T, ...) that are NaN at token 3.
        backend: Backend of the recurrence.
    """
    arguments = [x.detach() for x in arguments]
    for number in broken:
        arguments[number][0, 3] = torch.nan
    y, end = recurrence(*arguments, resets=torch.arange(80)[None] == 5, backend=backend)
    assert y[0, 3].isnan().all()
    assert y[0, 5:].isfinite().all()
    assert end.isfinite().all()


def check_an_empty_batch_is_empty(found, names, arguments):
    """Check the shapes of y, of the last state and of the gradients of all arguments for a batch of no rows."""
    assert {name: value.shape for name, value in found.items()} == {
        "y": arguments[3].shape,
        "end": arguments[-1].shape,
        **{name: x.shape for name, x in zip(names, arguments, strict=True)},
    }
    assert not any(value.any() for value in found.values())


def check_lengths_are_clamped(results, arguments, backend):
    """Check rows of 9 tokens with lengths below 0 and above 9. A row without tokens keeps its state."""
    clean = results(arguments, backend, lengths=torch.tensor([0, 9, 0]))
    for name, value in results(arguments, backend, lengths=torch.tensor([0, 1000, -1000])).items():
        assert torch.equal(value, clean[name]), name
    assert torch.equal(clean["end"][0], arguments[-1].detach()[0])
