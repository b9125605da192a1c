"""The engine: each request gets what it gets alone, whatever else is written beside it, before it, or in its place."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.engines import CHARACTERS, KINDS, alone, finish, reanchored, recomputed
from tests.helpers.models import CTX, VARIANTS, build
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples
from timemix.errors import InvalidValue
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.tokenizers.character import ByteTokenizer


@pytest.fixture(params=KINDS)
def model(request):
    return KINDS[request.param]()


def assert_same(found, expected):
    assert [(e.token, e.text, e.finished) for e in found] == [(e.token, e.text, e.finished) for e in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a.log_probability is None) == (b.log_probability is None)
        if a.log_probability is not None:
            assert a.log_probability == pytest.approx(b.log_probability, abs=1e-5)


REQUESTS = [
    Request([3], 25, Sampler(temperature=0.8), seed=1, log_probabilities=True),
    Request([1, 2, 3, 4, 5, 6, 7], 4, Sampler(top_k=3), seed=2),
    Request([5] * 30, 17, Sampler(repetition_penalty=1.5, top_p=0.9), seed=1, sample=3, log_probabilities=True),
    Request([9, 8], 1, Sampler(temperature=0), seed=0),
    Request([1, 10], 30, Sampler(), seed=7, stop=("ab", "ccc", "k")),
    Request([2, 2, 2], 9, Sampler(), seed=9, context="exact"),
    Request([3], 25, Sampler(temperature=0.8), seed=1, keep=0.25),
]


def test_requests_that_come_at_any_time_get_what_they_get_alone(model):
    expected = [alone(model, request) for request in REQUESTS]
    engine = Engine(model, CHARACTERS, slots=3)
    events = {}
    for number, request in enumerate(REQUESTS):
        assert engine.add(request) == number
        for event in [*engine.step(), *engine.step()]:
            events.setdefault(event.id, []).append(event)
    for id, rest in finish(engine).items():
        events.setdefault(id, []).extend(rest)
    for number, each in enumerate(expected):
        assert_same(events[number], each)
    assert engine.step() == []


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.booleans()), min_size=1, max_size=8), st.integers(1, 4)
)
@examples(15)
def test_in_any_order_with_any_places_and_cancellations(plan, places):
    model = KINDS["rwkv1, compiled"]()
    engine = Engine(model, CHARACTERS, slots=places)
    events, cancelled = {}, set()
    for which, steps, cancel in plan:
        id = engine.add(REQUESTS[which])
        for _ in range(steps):
            for event in engine.step():
                events.setdefault(event.id, []).append(event)
        if cancel and engine.cancel(id):
            cancelled.add(id)
    for id, rest in finish(engine).items():
        events.setdefault(id, []).extend(rest)
    for id, (which, _, _) in enumerate(plan):
        expected = alone(model, REQUESTS[which])
        found = events.get(id, [])
        assert_same(found, expected[: len(found)])
        assert (len(found) == len(expected)) != (id in cancelled)


def test_equals_recomputing_the_whole_context():
    model = KINDS["rwkv1, compiled"]()
    sampler = Sampler(temperature=0.9, top_a=0.02)
    events = alone(model, Request([3, 4], 40, sampler, seed=7))
    expected = recomputed(model, [3, 4], 40, sampler, 7, reanchored(2, CTX, CTX // 2))
    assert [event.token for event in events] == expected


def test_a_place_used_again_holds_nothing_of_before(model):
    expected = alone(model, REQUESTS[0])
    engine = Engine(model, CHARACTERS, slots=1)
    for request in REQUESTS[1:4]:
        engine.add(request)
        finish(engine)
        # Anything left behind would show in any number that it touches.
        for layer in engine._state.layers:
            for x in layer.values():
                x.fill_(math.nan)
    id = engine.add(REQUESTS[0])
    assert_same(finish(engine)[id], expected)


@pytest.mark.parametrize("kind", ["rwkv1, compiled", "mha_pro"])
def test_a_row_without_finite_logits_ends_alone(kind):
    model = KINDS[kind]()
    with torch.no_grad():
        # Only what reads this token is not finite.
        model.embedding.weight[10] = math.nan
    good = Request([3, 4], 9, seed=5, logit_bias={10: -math.inf}, log_probabilities=True)
    expected = alone(model, good)
    engine = Engine(model, CHARACTERS)
    first, broken, last = engine.add(good), engine.add(Request([1, 10], 9)), engine.add(good)
    events = finish(engine)
    assert [(e.finished, e.token, e.reason) for e in events[broken]] == [
        ("error", None, "the model's logits are not finite")
    ]
    assert_same(events[first], expected)
    assert_same(events[last], expected)
    # Its slot is used again.
    assert_same(alone(model, good), expected)


def test_a_bias_that_excludes_every_token_ends_the_row():
    model = KINDS["rwkv1, compiled"]()
    (event,) = alone(model, Request([1], 5, logit_bias=dict.fromkeys(range(11), -math.inf)))
    assert (event.finished, event.reason) == ("error", "logit_bias excludes every token")


def test_text_held_back_goes_with_the_stream():
    model = build(VARIANTS["rwkv1"], torch.float32, ctx_len=64, vocab_size=11)
    text = [2, 0, 1, 0, 2, 3, 4]
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[text[0]] = 30.0
    whole = written(text, CHARACTERS, tokens=7, stop=("acd",))
    for cut in range(1, 6):
        engine = Engine(model, CHARACTERS, step=writes(model, text))
        id = engine.add(Request([0], tokens=7, stop=("acd",)))
        first = [event for _ in range(cut) for event in engine.step()]
        stream = engine.session(id)
        engine = Engine(model, CHARACTERS, step=writes(model, text))
        engine.add(Request([], tokens=7 - cut, stop=("acd",), start=stream))
        rest = finish(engine)[0]
        assert "".join(e.text for e in [*first, *rest]) == "".join(e.text for e in whole) == "cab"
        assert rest[-1].finished == "stop"


def test_log_probabilities_are_those_of_the_model(model):
    events = alone(model, Request([3, 4, 5], 5, Sampler(temperature=0.5, top_k=2), log_probabilities=True))
    text = [3, 4, 5]
    for event in events:
        with torch.no_grad():
            logits, _ = model(torch.tensor([text]), logits="last")
        assert event.log_probability == pytest.approx(float(logits[0].log_softmax(-1)[event.token]), abs=1e-5)
        text.append(event.token)


def writes(model, text):
    """A model that writes these tokens whatever it reads, through the step that an engine asks."""

    class Step:
        compiled, reason = False, "told to"

        def looks_back(self, position):
            return position

        def __call__(self, tokens, state, rows, counts=1, wanted=None):
            state.position[rows] += counts
            logits = torch.full((len(rows), model.config.vocab_size), -30.0)
            for i, position in enumerate(state.position[rows].tolist()):
                logits[i, text[min(position - 1, len(text) - 1)]] = 30.0
            return logits, state

    return Step()


def written(text, tokenizer, **request):
    """Events of a request whose model writes `text` (tokens), from its second token on."""
    model = build(VARIANTS["rwkv1"], torch.float32, ctx_len=64, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.head.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.norm.weight.zero_()
        model.head.weight[text[0]] = 30.0
    engine = Engine(model, tokenizer, step=writes(model, text))
    engine.add(Request([0], **request))
    return finish(engine)[0]


def test_stop_strings_end_the_text_before_them():
    events = written([2, 0, 1, 0, 2, 3, 4], CHARACTERS, tokens=7, stop=("acd", "zzz"))
    # c, a, b, a, c, d: "a" waits for what follows it.
    assert [e.text for e in events] == ["c", "", "ab", "", "", ""]
    assert [e.finished for e in events] == [None] * 5 + ["stop"]


def test_what_was_held_back_is_told_at_the_end():
    events = written([2, 0, 1, 0, 2, 3, 4], CHARACTERS, tokens=5, stop=("acd",))
    assert "".join(e.text for e in events) == "cabac"
    assert events[-1].finished == "length"


def test_stop_strings_do_not_split_characters_of_several_bytes():
    text = list("a€b€€c".encode())
    tokenizer = ByteTokenizer()
    events = written(text, tokenizer, tokens=len(text), stop=("€c",))
    assert "".join(e.text for e in events) == "a€b€"
    assert events[-1].finished == "stop"
    assert all("\ufffd" not in e.text for e in events)
    # Cut in the midst of a character.
    events = written(text, tokenizer, tokens=3)
    assert "".join(e.text for e in events) == "a\ufffd"


def test_cancel(model):
    engine = Engine(model, CHARACTERS, slots=1)
    first, second, third = (engine.add(REQUESTS[0]) for _ in range(3))
    engine.step()
    assert engine.cancel(first)
    assert engine.cancel(second)
    assert not engine.cancel(first)
    assert not engine.cancel(99)
    events = finish(engine)
    assert list(events) == [third]
    assert_same(events[third], alone(model, REQUESTS[0]))


@pytest.mark.parametrize(("model", "cut"), pairwise(KINDS, [0, 1, 5, 12, 20], strength=1), indirect=["model"])
def test_going_on_from_a_stream_equals_going_on(model, cut):
    whole = Request([1, 2, 3], 25, Sampler(repetition_penalty=1.3), seed=4, log_probabilities=True)
    expected = alone(model, whole)
    engine = Engine(model, CHARACTERS)
    engine.add(Request(whole.prompt, cut, whole.sampler, 4, keep_session=True, log_probabilities=True))
    (first,) = finish(engine).values()
    stream = first[-1].session
    assert stream.written == cut
    engine = Engine(model, CHARACTERS)
    for _ in range(2):
        engine.add(Request([], 25 - cut, whole.sampler, 4, start=stream, log_probabilities=True))
    for rest in finish(engine).values():
        told = [e for e in [*first, *rest] if e.token is not None]
        assert [e.token for e in told] == [e.token for e in expected]
        assert [e.log_probability for e in told] == pytest.approx([e.log_probability for e in expected], abs=1e-5)


def test_a_stream_of_a_request_at_work_branches(model):
    engine = Engine(model, CHARACTERS)
    id = engine.add(Request([1, 2], 20, seed=3))
    for _ in range(6):
        engine.step()
    stream = engine.session(id)
    rest = [e.token for e in finish(engine)[id]]
    same = alone(model, Request([], 14, seed=3, start=stream.clone()))
    assert [e.token for e in same] == rest
    other = alone(model, Request([5, 5], 14, seed=3, start=stream))
    assert [e.token for e in other] != rest
    with pytest.raises(KeyError):
        engine.session(id)


def test_a_prompt_after_a_stream_equals_one_prompt(model):
    engine = Engine(model, CHARACTERS)
    engine.add(Request([1, 2, 3], 0, keep_session=True))
    stream = finish(engine)[0][-1].session
    together = alone(model, Request([1, 2, 3, 4, 5], 6, log_probabilities=True))
    assert_same(alone(model, Request([4, 5], 6, start=stream, log_probabilities=True)), together)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"tokens": -1}, "tokens is -1"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"keep": 0}, "keep is 0"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"sample": -1}, "sample must be a whole number"),
        ({"sampler": Sampler(temperature=[1, 2])}, "one number for each field"),
    ],
)
def test_requests_that_cannot_be(fields, words):
    with pytest.raises(InvalidValue, match=words):
        Request(**({"prompt": [1]} | fields))


def test_one_stop_string_need_not_be_in_a_tuple():
    assert Request([1], stop="ab").stop == ("ab",)


def test_what_an_engine_refuses():
    model = build(VARIANTS["rwkv1"])
    other = build(VARIANTS["rwkv1"], ctx_len=13)
    engine = Engine(other)
    engine.add(Request([1], 0, keep_session=True))
    with pytest.raises(InvalidValue, match="the session to continue is of another model"):
        Engine(model).add(Request([1], start=finish(engine)[0][-1].session))
    with pytest.raises(InvalidValue, match="slots is 0"):
        Engine(model, slots=0)
    with pytest.raises(InvalidValue, match="token 11 is outside the vocabulary of 11"):
        Engine(model).add(Request([3, 11]))
    with pytest.raises(InvalidValue, match="stop strings need a tokenizer"):
        Engine(model).add(Request([3], stop=("a",)))


def test_prompts_are_read_in_pieces_of_bounded_size(model, monkeypatch):
    expected = [alone(model, request) for request in REQUESTS]
    monkeypatch.setattr("timemix.generation.engine.PIECE", 3)
    engine = Engine(model, CHARACTERS)
    for request in REQUESTS:
        engine.add(request)
    events = finish(engine)
    for number, each in enumerate(expected):
        assert_same(events[number], each)
