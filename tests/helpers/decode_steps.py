"""Checks of the compiled decode step of any architecture: against the model, and that bits do not depend on company."""

import torch

from tests.helpers.models import assert_step_close
from timemix.generation.decode import build_step
from timemix.models.quantize import rounded


def check_step_equals_model(model, rows, weights):
    """Compare logits and states of a prompt of 13 tokens and 7 steps with those of the model with rounded weights."""
    expected, step = rounded(model, weights), build_step(model, weights, backend="compiled")
    tokens = torch.randint(model.config.vocab_size, (rows, 20))
    with torch.no_grad():
        logits, after = expected(tokens, expected.init_state(rows))
    state, slots, counts = model.init_state(rows), torch.arange(rows), torch.full((rows,), 13)
    found, state = step(tokens[:, :13].flatten(), state, slots, counts, torch.arange(13 * rows))
    assert_step_close(found.view(rows, 13, -1), logits[:, :13], weights)
    for t in range(13, 20):
        found, state = step(tokens[:, t], state, slots)
        assert_step_close(found, logits[:, t], weights)
    assert state.position.equal(after.position)
    for own, theirs in zip(state.layers, after.layers, strict=True):
        assert own.keys() == theirs.keys()
        for name in own:
            assert_step_close(own[name], theirs[name], weights)


def check_bits(model, weights, cuts, slot, threads):
    """Compare a text in pieces, in a slot, beside another text, with the same text token by token.

    Each cut is the number of tokens of the text and of the other text in one call.
    """
    step, vocabulary = build_step(model, weights, backend="compiled"), model.config.vocab_size
    tokens = torch.randint(vocabulary, (sum(count for count, _ in cuts),))
    alone, logits = model.init_state(1), []
    for token in tokens:
        found, alone = step(token[None], alone, torch.tensor([0]))
        logits.append(found[0])
    before, state, at, other = torch.get_num_threads(), model.init_state(4), 0, (slot + 1) % 4
    try:
        torch.set_num_threads(threads)
        for count, beside in cuts:
            pieces, rows, counts = [tokens[at : at + count]], [slot], [count]
            if beside:
                pieces.insert(0, torch.randint(vocabulary, (beside,)))
                rows, counts = [other, slot], [beside, count]
            wanted = torch.arange(beside, beside + count)
            found, state = step(torch.cat(pieces), state, torch.tensor(rows), torch.tensor(counts), wanted)
            assert found.equal(torch.stack(logits[at : at + count]))
            at += count
    finally:
        torch.set_num_threads(before)
    for own, theirs in zip(state.layers, alone.layers, strict=True):
        assert all(own[name][slot].equal(theirs[name][0]) for name in own)
