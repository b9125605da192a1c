"""Bit-identical texts: alone, and among requests that join, leave, fork and are cancelled at any time."""

import contextlib
import functools
import random

import pytest
import torch

from tests.helpers.engines import finish
from tests.helpers.models import VARIANTS, build
from tests.helpers.tiers import slow
from timemix.generation.decode import build_step
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.models.quantize import WEIGHTS

VOCABULARY = 11
SIZES = {
    "rwkv1": {"layers": 2, "ctx_len": 150},
    "shift by 1, 2, 3": {"layers": 1, "ctx_len": 70, "channels": 36, "heads": 1},
    "one head": {"layers": 1, "ctx_len": 4096, "channels": 8},
    "rwkv1_exp": {"layers": 2, "ctx_len": 24},
    "exponentials, odd": {"layers": 1, "ctx_len": 12, "channels": 21, "heads": 3},
    "rwkv7": {"layers": 2},
    "mha_rotary": {"layers": 1, "ctx_len": 150, "channels": 36, "heads": 3},
    "shift interpolated": {"layers": 2, "ctx_len": 24},
    "grouped heads": {"layers": 2, "ctx_len": 150, "channels": 64},
}


@functools.cache
def subject(kind, weights):
    """Return a model, its step, requests of all kinds, and the events of each request alone on one thread."""
    torch.manual_seed(0)
    model = build(VARIANTS[kind], torch.float32, 0.2, vocab_size=VOCABULARY, **SIZES[kind])
    chosen = random.Random(kind + weights)
    requests = []
    for length in (1, 2, 3, 7, 40, 63, 64, 65, 130, 200, 0 if kind != "one head" else 1500):
        request = Request(
            [chosen.randrange(VOCABULARY) for _ in range(length or 90)],
            chosen.randint(1, 12),
            Sampler(temperature=0.8, repetition_penalty=chosen.choice((1, 1.2))),
            seed=length,
            samples=chosen.choice((1, 1, 3)),
            # All candidates: the whole distribution, in the bits of float64.
            top_log_probabilities=VOCABULARY,
            prompt_log_probabilities=chosen.random() < 0.3,
            keep=chosen.choice((0.1, 0.5)),
        )
        requests.append(request)
    torch.set_num_threads(1)
    step = build_step(model, weights, backend="compiled")
    return model, step, requests, [by_sample(engine_alone(model, step, request)) for request in requests]


def engine_alone(model, step, request):
    engine = Engine(model, step=step)
    engine.add(request)
    return finish(engine)[0]


def by_sample(events):
    found = {}
    for e in events:
        found.setdefault(e.sample, []).append(
            (e.token, e.top_log_probabilities, e.prompt_log_probabilities, e.finished)
        )
    return found


def run_schedule(model, step, requests, expected, chosen):
    """Requests arrive, are copied and are cancelled at random; each text is compared with the same request alone."""
    torch.set_num_threads(chosen.choice((1, 1, 1, 1, 1, 1, 1, 2)))
    engine = Engine(model, slots=chosen.choice((1, 2, 3, 5, 32)), step=step)
    events, which, cancelled, sessions = {}, {}, set(), []

    def steps(count):
        for _ in range(count):
            for event in engine.step():
                assert event.id not in cancelled
                events.setdefault(event.id, []).append(event)

    for _ in range(chosen.randint(2, 9)):
        number = chosen.randrange(len(requests))
        id = engine.add(requests[number])
        which[id] = number
        steps(chosen.choice((0, 0, 1, 2, 5)))
        if chosen.random() < 0.15 and engine.cancel(victim := chosen.choice(list(which))):
            cancelled.add(victim)
        if chosen.random() < 0.15 and id not in cancelled and requests[number].samples == 1:
            # A pending request has no session.
            with contextlib.suppress(KeyError):
                sessions.append((id, len(events.get(id, ())), engine.session(id)))
    while engine.busy:
        steps(1)
    for id, number in which.items():
        found = by_sample(events.get(id, ()))
        for sample, whole in expected[number].items():
            own = found.get(sample, [])
            assert own == whole[: len(own)], (id, number, sample)
            assert len(own) == len(whole) or id in cancelled
    for id, count, session in sessions:
        rest = expected[which[id]][0][count:]
        request = requests[which[id]]
        again = Request(
            [],
            len(rest),
            request.sampler,
            request.seed,
            start=session,
            top_log_probabilities=VOCABULARY,
            keep=request.keep,
        )
        if rest:
            tokens = by_sample(engine_alone(model, step, again))[0]
            assert [each[:2] for each in tokens] == [each[:2] for each in rest]


@pytest.mark.parametrize("schedules", [8, slow(700)])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", SIZES)
def test_a_text_has_the_same_bits_in_any_company(kind, weights, schedules):
    threads = torch.get_num_threads()
    try:
        for seed in range(schedules):
            run_schedule(*subject(kind, weights), random.Random(f"{kind} {weights} {seed}"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", SIZES)
def test_a_prompt_has_the_bits_of_its_tokens_one_by_one(kind, weights):
    model, step, *_ = subject(kind, weights)
    length = model.max_position or 200
    tokens = torch.randint(VOCABULARY, (min(length, 300),))
    state, logits = model.init_state(1), []
    for token in tokens:
        found, state = step(token[None], state, torch.tensor([0]))
        logits.append(found[0])
    expected = torch.stack(logits)
    for seed in range(4):
        chosen = random.Random(seed)
        state, at, slot = model.init_state(3), 0, seed % 3
        while at < len(tokens):
            count = min(len(tokens) - at, chosen.choice((1, 2, 3, 64, 100)))
            # Beside a row of another length, in the slot before or after it.
            other, beside = (slot + 1) % 3, chosen.randint(1, 9)
            state.position[other] = 0
            rows, counts = [slot, other], [count, beside]
            pieces = [tokens[at : at + count], torch.randint(VOCABULARY, (beside,))]
            if is_later := chosen.random() < 0.5:
                rows, counts, pieces = rows[::-1], counts[::-1], pieces[::-1]
            wanted = torch.arange(count) + is_later * beside
            found, state = step(torch.cat(pieces), state, torch.tensor(rows), torch.tensor(counts), wanted)
            assert found.equal(expected[at : at + count])
            at += count
