"""Conversations in random interleaving: each text equals the text of the same conversation alone, bit for bit."""

import functools
import random
from dataclasses import dataclass, field

import pytest
import torch

from tests.helpers.engines import finish
from tests.helpers.models import VARIANTS, build
from tests.helpers.tiers import slow
from timemix.generation.decode import build_step
from timemix.generation.engine import PIECE, Engine
from timemix.generation.prefix_cache import PrefixCache, size_of
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler

VOCABULARY = 11
SAMPLERS = [
    Sampler(),
    Sampler(temperature=0),
    Sampler(temperature=0.7, top_p=0.9, repetition_penalty=1.2),
    Sampler(top_k=5, presence_penalty=0.5, frequency_penalty=-0.2),
    Sampler(min_p=0.05, frequency_penalty=0.3),
]


@functools.cache
def subject(kind):
    """Return a model and its compiled step."""
    torch.manual_seed(0)
    model = build(VARIANTS[kind], torch.float32, 0.2, layers=1, ctx_len=200, vocab_size=VOCABULARY)
    return model, build_step(model, backend="compiled")


@dataclass
class Conversation:
    """Turns, each with new tokens, the fields of a request, and whether it continues the session or sends all text."""

    turns: list
    events: list = field(default_factory=list)
    """Events of each turn that has begun."""
    text: list = field(default_factory=list)
    session: object = None
    is_cancelled: bool = False

    def next_request(self):
        """Begin the next turn."""
        new, fields, sends_text = self.turns[len(self.events)]
        self.events.append([])
        self.text += new
        start = None if sends_text else self.session
        return Request(self.text if start is None else new, start=start, keep_session=True, **fields)

    def note(self, event):
        """Note an event; return whether another turn follows."""
        self.events[-1].append(event)
        if event.token is not None:
            self.text.append(event.token)
        self.session = event.session
        return event.finished is not None and len(self.events) < len(self.turns)

    def bits(self):
        """Return what the events report."""
        return [[(e.token, e.log_probability, e.finished, e.restarted) for e in events] for events in self.events]


def turns_of(seed):
    """Return the turns of a conversation. Some conversations begin with the same tokens."""
    chosen = random.Random(seed)
    opening = random.Random(seed % 3).choices(range(VOCABULARY), k=(1, 90, 200)[seed % 3])
    turns = []
    for number in range(chosen.randint(1, 3)):
        new = chosen.choices(range(VOCABULARY), k=chosen.choice((1, 2, 10, 70)))
        fields = {
            "tokens": chosen.choice((1, 3, 20)),
            "sampler": chosen.choice(SAMPLERS),
            "seed": chosen.randrange(2**64),
            "stop_tokens": chosen.choice(((), (7,))),
            "log_probabilities": True,
            "scope": str(seed % 2),
            "reuse_decoded": chosen.random() < 0.5,
        }
        turns.append((new if number else opening + new, fields, chosen.random() < 0.6))
    return turns


def alone(model, step, turns):
    """Return the bits of a conversation without other conversations and without a cache."""
    conversation, goes_on = Conversation(turns), True
    while goes_on:
        engine = Engine(model, step=step)
        engine.add(conversation.next_request())
        for event in finish(engine)[0]:
            goes_on = conversation.note(event)
    return conversation.bits()


def interleaved(engine, conversations, chosen):
    """Run conversations together. They begin, pause and are cancelled at random."""
    waiting, active = list(conversations), {}
    while waiting or active:
        while waiting and len(active) < 24 and chosen.random() < 0.7:
            conversation = waiting.pop(chosen.randrange(len(waiting)))
            active[engine.add(conversation.next_request())] = conversation
        if active and chosen.random() < 0.05:
            id = chosen.choice(list(active))
            assert engine.cancel(id)
            active.pop(id).is_cancelled = True
        for event in engine.step():
            if active[event.id].note(event):
                waiting.append(active[event.id])
            if event.finished:
                del active[event.id]


@pytest.mark.parametrize("count", [40, slow(1000)])
@pytest.mark.parametrize("kind", ["rwkv7", "rwkv1", "llama"])
def test_a_conversation_has_the_same_bits_in_any_company(kind, count):
    (model, step), chosen = subject(kind), random.Random(kind)
    conversations = [Conversation(turns_of(seed)) for seed in range(count)]
    cache = PrefixCache(20 * size_of(model.init_state(1)))
    engine = Engine(model, step=step, slots=16, cache=cache)
    interleaved(engine, conversations, chosen)
    assert not engine.busy
    assert cache.hits > 0
    assert cache.nbytes <= cache.max_bytes
    for conversation in conversations:
        found, expected = conversation.bits(), alone(model, step, conversation.turns)
        if conversation.is_cancelled:
            *before, last = found
            assert before == expected[: len(before)]
            assert last == expected[len(before)][: len(last)]
        else:
            assert found == expected
    assert 0 < sum(each.is_cancelled for each in conversations) < count / 2


def test_a_step_reads_one_piece_of_a_long_prompt_beside_eight_streams():
    model, step = subject("rwkv7")
    sizes = []

    class Counting:
        compiled, reason = True, ""

        def __call__(self, tokens, *others):
            sizes.append(len(tokens))
            return step(tokens, *others)

    engine = Engine(model, step=Counting(), slots=9)
    streams = [engine.add(Request([1 + i], 200)) for i in range(8)]
    engine.step()
    long = engine.add(Request([3] * 100_000, 1))
    assert engine.progress(long) == (0, 100_000)
    for number in range(1, 101):
        # Each stream gets a token in each step.
        assert [e.id for e in engine.step()] == streams
        assert engine.progress(long) == (number * PIECE // 2, 100_000)
    assert max(sizes) == PIECE // 2 + 8
    # Two long prompts take turns; they do not add up.
    other = engine.add(Request([4] * 100_000, 1))
    assert engine.cancel(streams[0])
    for _ in range(10):
        engine.step()
    assert max(sizes) == PIECE // 2 + 8
    assert engine.progress(other)[0] == 5 * PIECE // 2
    assert engine.progress(streams[0]) == (0, 0)


def test_requests_that_end_in_any_way_free_their_slot():
    model, step = subject("rwkv7")
    engine = Engine(model, step=step, slots=4, max_pending=8, cache=PrefixCache(2**20))
    excluded = dict.fromkeys(range(VOCABULARY), -float("inf"))
    prompt = [1] * 70
    for round in range(30):
        reading, streaming, error, pending = (
            engine.add(Request(prompt * 3, 5)),
            engine.add(Request([2], 50)),
            engine.add(Request([3], 5, logit_bias=excluded)),
            engine.add(Request([4], 2, samples=6)),
        )
        events = [e for _ in range(1 + round % 3) for e in engine.step()]
        assert [e.id for e in events if e.finished == "error"] == [error]
        for id in (reading, streaming, pending):
            engine.cancel(id)
        assert not engine.busy
        assert engine.step() == []
    # No slot is lost: four texts run at once.
    for token in range(4):
        engine.add(Request([token], 3))
    assert len(engine.step()) == 4
