"""The decode step as a CUDA graph gives the results of the model's own step, for any rows of the state."""

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.models import VARIANTS, build
from tests.helpers.operators import assert_same
from timemix.generation.decode import ModelStep
from timemix.generation.engine import Engine
from timemix.generation.graph import STEPS_BEFORE, DecodeGraph
from timemix.generation.request import Request
from timemix.runtime.device import cuda_graph, recording

DEVICE = torch.device(os.environ.get("TIMEMIX_TEST_DEVICE", "cpu"))
pytestmark = pytest.mark.cuda


def repeated(work):
    """Stand for `cuda_graph` on the CPU: run the function once, and again at each replay."""

    def replay():
        with recording():
            work()

    replay()
    return replay


def step_with_graph(model):
    step = ModelStep(model, "a test")
    step._graph = DecodeGraph(model, cuda_graph if DEVICE.type == "cuda" else repeated)
    return step


@pytest.mark.parametrize("name", VARIANTS)
def test_a_graph_gives_the_logits_and_the_state_of_the_model(name):
    model = build(VARIANTS[name]).to(DEVICE).eval()
    steps = [ModelStep(model, "a test"), step_with_graph(model)]
    states = [model.init_state(3) for _ in steps]
    # All rows, one row twice, a row alone that stays behind, then a new text in row 1.
    turns = [[0, 1, 2]] * 2 + [[2, 0]] * 2 + [[0]] + [[0, 2]] * 2 + [[1]] * 3
    assert len(turns) > STEPS_BEFORE
    for number, rows in enumerate(turns):
        tokens = torch.randint(11, (len(rows),))
        if number == STEPS_BEFORE + 1:
            for state in states:
                state.put(torch.tensor([1], device=DEVICE), model.init_state(1))
        found = [step(tokens, state, torch.tensor(rows)) for step, state in zip(steps, states, strict=True)]
        states = [state for _, state in found]
        (expected, _), (logits, _) = found
        assert_same({"logits": logits}, {"logits": expected}, atol=1e-9, rtol=1e-9)
    expected, state = states
    assert state.position.tolist() == expected.position.tolist() == [7, 1, 6]
    # The tokens after a row's last token have no meaning in a history, so compare what comes next.
    rows, tokens = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    after = [step(tokens, state, rows)[0] for step, state in zip(steps, states, strict=True)]
    assert_same({"logits": after[1]}, {"logits": after[0]}, atol=1e-9, rtol=1e-9)


def test_an_engine_with_a_graph_writes_the_same_tokens_while_requests_come_and_go():
    model = build(VARIANTS["rwkv1"], torch.float32).to(DEVICE).eval()

    def texts(step):
        engine = Engine(model, slots=3, step=step)
        for i, tokens in enumerate([5, 30, 9, 14, 3]):
            engine.add(Request([1 + i] * (1 + 3 * i), tokens, sample=i))
        found = {}
        while engine.busy:
            for event in engine.step():
                found.setdefault(event.id, []).append(event.token)
        return list(found.values())

    assert texts(step_with_graph(model)) == texts(ModelStep(model, "a test"))


def test_a_full_context_is_refused_before_the_graph_runs():
    model = build(VARIANTS["rwkv1"]).to(DEVICE).eval()
    step, state, row = step_with_graph(model), model.init_state(2), torch.tensor([1])
    limit = model.max_position
    assert limit > STEPS_BEFORE
    for _ in range(limit):
        _, state = step(torch.tensor([1]), state, row)
    with pytest.raises(ValueError, match=f"{limit + 1} tokens are more than this model's context of {limit}"):
        step(torch.tensor([1]), state, row)
    # The other row can still be used, beside the full row.
    _, state = step(torch.tensor([1]), state, torch.tensor([0]))
    assert state.position.tolist() == [1, limit]


@pytest.mark.parametrize("name", VARIANTS)
def test_no_kernel_of_a_graph_needs_a_value_from_the_device(name):
    # A fake tensor has no values: reading one raises an error.
    fake, model = FakeTensorMode(), build(VARIANTS[name])
    for module in model.modules():
        own = {name: fake.from_tensor(p) for name, p in module._parameters.items() if p is not None}
        module._parameters.update(own)
    with fake, torch.no_grad():
        graph, state = DecodeGraph(model, repeated), model.init_state(2)
        assert [graph.handles(state) for _ in range(STEPS_BEFORE + 1)] == [False] * STEPS_BEFORE + [True]
        graph._replay()
