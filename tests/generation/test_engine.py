"""The engine: each request gets the result that it gets alone, whatever other requests run before or beside it."""

import contextlib
import itertools
import math
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.engines import CHARACTERS, KINDS, alone, finish, reanchored, recomputed
from tests.helpers.models import CTX, VARIANTS, build
from tests.helpers.pairwise import pairwise
from tests.helpers.tiers import examples
from tests.helpers.vocabularies import BYTES
from timemix.errors import InvalidValue, TooManyRequests
from timemix.generation.decode import build_step
from timemix.generation.engine import Engine
from timemix.generation.request import Request
from timemix.generation.row import Emitter
from timemix.generation.sampler import Sampler
from timemix.generation.session import Session, load_session, save_session
from timemix.tokenizers.character import ByteTokenizer, CharacterTokenizer
from timemix.tokenizers.make import train_tokenizer
from timemix.tokenizers.world import WorldTokenizer


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
        # Leftover state would change any number computed from it.
        for layer in engine._state.layers:
            for x in layer.values():
                x.fill_(math.nan)
    id = engine.add(REQUESTS[0])
    assert_same(finish(engine)[id], expected)


@pytest.mark.parametrize("kind", ["rwkv1, compiled", "mha_pro"])
def test_a_row_without_finite_logits_ends_alone(kind):
    model = KINDS[kind]()
    with torch.no_grad():
        # Only rows that read this token are not finite.
        model.embedding.weight[10] = math.nan
    good = Request([3, 4], 9, seed=5, logit_bias={10: -math.inf}, log_probabilities=True)
    expected = alone(model, good)
    engine = Engine(model, CHARACTERS)
    first, broken, last = engine.add(good), engine.add(Request([1, 10], 9)), engine.add(good)
    events = finish(engine)
    assert [(e.finished, e.token, e.reason) for e in events[broken]] == [
        ("error", None, "the model's logits are not finite; use another checkpoint")
    ]
    assert_same(events[first], expected)
    assert_same(events[last], expected)
    # Its slot is used again.
    assert_same(alone(model, good), expected)


def test_a_bias_that_excludes_every_token_ends_the_row():
    model = KINDS["rwkv1, compiled"]()
    (event,) = alone(model, Request([1], 5, logit_bias=dict.fromkeys(range(11), -math.inf)))
    assert (event.finished, event.reason) == ("error", "logit_bias excludes every token; allow at least one")


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


def writes(model, text, *, counted=False):
    """A step that returns given tokens whatever it reads: by position or, with `counted`, one per call."""
    calls = itertools.count()

    class Step:
        compiled, reason = False, "set by the test"

        def looks_back(self, position):
            return position

        def __call__(self, tokens, state, rows, counts=1, wanted=None):
            state.position[rows] += counts
            logits = torch.full((len(rows), model.config.vocab_size), -30.0)
            for i, position in enumerate(state.position[rows].tolist()):
                at = next(calls) if counted else position - 1
                logits[i, text[min(at, len(text) - 1)]] = 30.0
            return logits, state

    return Step()


def written(text, tokenizer, **request):
    """Return the events of a request whose model generates `text` (tokens), from its second token on."""
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
    # c, a, b, a, c, d: the engine holds "a" back until the next token.
    assert [e.text for e in events] == ["c", "", "ab", "", "", ""]
    assert [e.finished for e in events] == [None] * 5 + ["stop"]


@pytest.mark.parametrize("tokens", [["x", "a", "b", "c", "d", "x"], ["x", "abcd", "x"], ["xabcdx"], ["xab", "cdx"]])
def test_of_overlapping_stop_strings_the_first_complete_one_ends_the_text(tokens):
    longer = [each.encode() for each in tokens if len(each) > 1]
    emitter = Emitter(WorldTokenizer([*BYTES, *longer], 300), [], "", ("abcd", "bc"))
    text = ""
    for each in tokens:
        # Token 0 ends a text, and the bytes have the ids 1 to 256.
        more, is_stopped = emitter.push(1 + [*BYTES, *longer].index(each.encode()))
        text += more
        if is_stopped:
            break
    assert (text, is_stopped) == ("xa", True)


def test_text_that_was_held_back_comes_with_the_end():
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
    # Cut in the middle of a character.
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


def test_a_request_that_is_cancelled_during_a_step_has_no_event_of_it(model):
    engine = Engine(model, slots=2)
    first, second = (engine.add(REQUESTS[0]) for _ in range(2))
    advance = engine.advance

    def cancelling(*arguments):
        engine.cancel(first)
        return advance(*arguments)

    engine.advance = cancelling
    assert [event.id for event in engine.step()] == [second]
    assert first not in finish(engine)


@pytest.mark.parametrize(("model", "cut"), pairwise(KINDS, [0, 1, 5, 12, 20], strength=1), indirect=["model"])
def test_a_request_from_a_session_continues_it_exactly(model, cut):
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
        sampled = [e for e in [*first, *rest] if e.token is not None]
        assert [e.token for e in sampled] == [e.token for e in expected]
        assert [e.log_probability for e in sampled] == pytest.approx([e.log_probability for e in expected], abs=1e-5)


def test_a_session_of_an_active_request_branches(model):
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
        ({"stop": ("a", "")}, "stop holds an empty string"),
        ({"keep": 0}, "keep is 0"),
        ({"seed": -1}, "seed is -1; it must be a whole number"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be"),
        ({"sample": -1}, "sample is -1; it must be a whole number"),
        ({"sampler": Sampler(temperature=[1, 2])}, "sampler has a field with one number per row"),
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
    with pytest.raises(InvalidValue, match="start is a session of another model"):
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


@pytest.mark.parametrize("kind", ["rwkv1, compiled", "rwkv1_exp", "mha_pro"])
@pytest.mark.parametrize(
    ("text", "stop"),
    [("a€b€€c😀é", ()), ("lou cheis, lo", ("lou",)), ("lou cheis, lo", ("s", "heist")), ("he, w he, wa", ("he, wo",))],
)
def test_two_parts_joined_are_the_whole_for_every_cut(kind, text, stop, tmp_path):
    ids, tokenizer = list(text.encode()), ByteTokenizer()
    model = build(KINDS[kind]().config, torch.float32, vocab_size=256, ctx_len=64)
    whole = written(ids, tokenizer, tokens=len(ids), stop=stop)
    expected = "".join(e.text for e in whole)
    # After a stop string, the next part would continue behind it.
    for cut in range(len(whole) + int(whole[-1].finished == "length")):
        request = Request([0], cut, stop=stop, keep_session=True)
        *_, last = first = played(model, tokenizer, ids, request)
        save_session(last.session, tmp_path / "session", model)
        session = load_session(tmp_path / "session", model)
        rest = played(model, tokenizer, ids[cut:], Request([], len(ids) - cut, stop=stop, start=session))
        assert "".join(e.text for e in [*first, *rest]) == expected
        assert rest[-1].finished == whole[-1].finished


def played(model, tokenizer, ids, request):
    """Return the events of a request in an engine whose step returns these tokens in order."""
    engine = Engine(model, tokenizer, step=writes(model, ids, counted=True))
    engine.add(request)
    return finish(engine)[0]


def test_what_follows_a_stop_string_in_its_token_begins_the_next_part():
    tokenizer = train_tokenizer("word", "one two three one two")
    ids = tokenizer.encode("one two three").tolist()
    model = build(KINDS["rwkv1, compiled"]().config, torch.float32, vocab_size=tokenizer.vocab_size)
    first = played(model, tokenizer, ids, Request([0], 3, stop=("tw",), keep_session=True))
    assert "".join(e.text for e in first) == " one "
    rest = played(model, tokenizer, ids[2:], Request([], 1, start=first[-1].session))
    assert "".join(e.text for e in rest) == "o three"


def test_stop_tokens_end_the_text_before_them_and_the_session_reads_them():
    model = KINDS["rwkv1, compiled"]()
    whole = alone(model, Request([3], 30, seed=2))
    end = whole[11].token
    before = next(i for i, e in enumerate(whole) if e.token == end)
    events = alone(model, Request([3], 30, seed=2, stop_tokens=(end,), keep_session=True))
    assert [e.token for e in events] == [e.token for e in whole[: before + 1]]
    assert "".join(e.text for e in events) == "".join(e.text for e in whole[:before])
    assert events[-1].finished == "stop"
    rest = alone(model, Request([], 29 - before, seed=2, start=events[-1].session))
    assert [e.token for e in rest] == [e.token for e in whole[before + 1 :]]


def test_samples_read_their_prompt_once_and_are_those_of_requests_of_their_own(model):
    read = []

    class Counting:
        compiled, reason, inner = False, "", build_step(model)

        def __call__(self, tokens, state, rows, counts=None, wanted=None):
            read.append(len(tokens))
            return self.inner(tokens, state, rows, counts, wanted)

    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    engine = Engine(model, CHARACTERS, slots=2, step=Counting())
    engine.add(Request(prompt, 3, seed=6, sample=4, samples=5, log_probabilities=True))
    events = finish(engine)[0]
    # Besides the prompt: its last token and two tokens of each sample.
    assert sum(read) == len(prompt) - 1 + 5 * 3
    for sample in range(4, 9):
        own = [e for e in events if e.sample == sample]
        assert_same(own, alone(model, Request(prompt, 3, seed=6, sample=sample, log_probabilities=True)))


@pytest.mark.parametrize("prompt", [[3], [3, 4, 5]])
def test_every_sample_and_session_begins_with_the_state_of_a_session_that_has_read_nothing(prompt):
    """A learned state has read no token, and differs from the state of the model."""
    model = KINDS["rwkv7"]()
    start = Session(model.init_state(1), tokens=(), unread=0)
    torch.manual_seed(0)
    for layer in start.state.layers:
        for x in layer.values():
            x.normal_()
    engine = Engine(model, CHARACTERS)
    engine.add(Request(prompt, 4, seed=6, samples=3, start=start, log_probabilities=True))
    events = finish(engine)[0]
    for sample in range(3):
        request = Request(prompt, 4, seed=6, sample=sample, start=start, log_probabilities=True)
        assert_same([e for e in events if e.sample == sample], alone(model, request))
    (kept,) = alone(model, Request([3], 0, start=start, keep_session=True))
    rest = alone(model, Request([4], 4, seed=6, start=kept.session, log_probabilities=True))
    assert_same(rest, alone(model, Request([3, 4], 4, seed=6, start=start, log_probabilities=True)))


@pytest.mark.parametrize("length", [CTX // 2 + 2, CTX - 1, CTX + 5])
def test_a_prompt_after_a_session_is_read_as_far_as_the_context_reaches(length):
    model = build(VARIANTS["rwkv1"])
    (*_, last) = alone(model, Request([3] * (CTX // 2), 0, keep_session=True))
    prompt = [(7 * i) % 10 for i in range(length)]
    after = alone(model, Request(prompt, 4, seed=1, start=last.session, log_probabilities=True))
    # The model has not read the last token of the session.
    newest = [3, *prompt][-CTX:]
    assert_same(after, alone(model, Request(newest, 4, seed=1, log_probabilities=True)))


def test_a_session_keeps_enough_tokens_for_a_stop_string():
    model = KINDS["rwkv7"]()
    (*_, last) = alone(model, Request(list(range(10)) * 20, 5, keep_session=True))
    assert len(last.session.tokens) == 64


def test_the_most_probable_tokens_and_the_prompt_are_scored_as_the_model_does(model):
    prompt = [3, 4, 5, 6]
    request = Request(prompt, 2, top_log_probabilities=3, prompt_log_probabilities=True)
    first, second = alone(model, request)
    with torch.no_grad():
        scores = model(torch.tensor([prompt]))[0][0].log_softmax(-1)
    assert first.prompt_log_probabilities[0] is None
    expected = [float(scores[i, token]) for i, token in enumerate(prompt[1:])]
    assert first.prompt_log_probabilities[1:] == pytest.approx(expected, abs=1e-5)
    best = scores[-1].topk(3)
    assert [token for token, _ in first.top_log_probabilities] == best.indices.tolist()
    assert [p for _, p in first.top_log_probabilities] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert second.prompt_log_probabilities is None
    # Without a sampled token they come with the end.
    (only,) = alone(model, Request(prompt, 0, prompt_log_probabilities=True))
    assert only.prompt_log_probabilities[1:] == pytest.approx(expected, abs=1e-5)
    assert only.token is None


def test_a_long_prompt_stalls_no_other_row_and_can_be_cancelled():
    model = KINDS["rwkv1_exp"]()
    engine = Engine(model)
    short = engine.add(Request([1, 2], 20))
    engine.step()
    long = engine.add(Request([3] * 100_000, 1))
    other = engine.add(Request([4] * 200, 1))
    ids = [[e.id for e in engine.step()] for _ in range(15)]
    # Prompts take turns, 32 tokens at a time: the prompt of 200 tokens is read after seven pieces.
    assert all(short in each for each in ids)
    assert sum(other in each for each in ids) == 1
    assert engine.session(long).unread > 99_000
    assert engine.cancel(long)
    assert long not in finish(engine)


class Refuses(CharacterTokenizer):
    """A tokenizer that cannot decode."""

    def stream(self):
        decoder = super().stream()
        decoder.push = self.refuse
        return decoder

    def refuse(self, token):
        raise KeyboardInterrupt


def test_a_step_that_raises_ends_the_active_requests_alone():
    """Also for an error after the tokens are sampled: the next step runs, and so do pending requests."""
    model = KINDS["rwkv1, compiled"]()
    engine = Engine(model, Refuses(list("abcdefghijk"), "error"), slots=1)
    first, second = (engine.add(Request([1], 2)) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(KeyError):
        engine.session(first)
    engine.tokenizer = None
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not engine.busy
    last = engine.add(Request([1], 2))
    assert [event.id for event in engine.step()] == [last] != [second]


def test_the_tokenizer_of_another_model_is_refused():
    with pytest.raises(InvalidValue, match="tokenizer has 3 entries, but model has a vocabulary of 11"):
        Engine(KINDS["rwkv1, compiled"](), CharacterTokenizer(list("abc"), "error"))


def test_a_queue_counts_neither_cancelled_requests_nor_those_that_a_free_slot_takes():
    engine = Engine(KINDS["rwkv1, compiled"](), slots=2, max_pending=1)
    ids = [engine.add(Request([1], 3)) for _ in range(3)]
    with pytest.raises(TooManyRequests):
        engine.add(Request([1], 3))
    advance = engine.advance

    def cancelling(*arguments):
        engine.cancel(ids[2])
        engine.add(Request([1], 3))
        return advance(*arguments)

    engine.advance = cancelling
    engine.step()


def test_progress_counts_only_the_tokens_that_fit_after_a_session():
    model = KINDS["rwkv1, compiled"]()
    session = alone(model, Request([1, 2, 3], 2, keep_session=True))[-1].session
    engine = Engine(model, slots=1)
    long = model.max_position + 5
    id = engine.add(Request([1] * long, 2, start=session))
    before = engine.progress(id)
    engine.step()
    assert before == (0, long + session.unread)
    assert engine.progress(id) == (model.max_position, model.max_position)


def test_a_full_queue_refuses_until_one_has_left():
    engine = Engine(KINDS["rwkv1, compiled"](), slots=1, max_pending=2)
    first = engine.add(Request([1], 50))
    engine.step()
    for _ in range(2):
        engine.add(Request([1], 1))
    with pytest.raises(TooManyRequests, match="the queue is full, as max_pending is 2"):
        engine.add(Request([1], 1))
    engine.cancel(first)
    engine.step()
    engine.add(Request([1], 1))


def test_threads_add_cancel_and_copy_while_one_steps():
    model = KINDS["rwkv1, compiled"]()
    engine = Engine(model, CHARACTERS, slots=4)
    expected = [(e.token, e.text) for e in alone(model, Request([3], 6, seed=1))]
    events, gone, faults, adding = {}, set(), [], threading.Event()

    def add():
        try:
            for number in range(25):
                id = engine.add(Request([3], 6, seed=1))
                if number % 5 == 4 and engine.cancel(id):
                    gone.add(id)
                with contextlib.suppress(KeyError):
                    assert engine.session(id).tokens[0] == 3
        except Exception as error:
            faults.append(error)

    def steps():
        try:
            while engine.busy or not adding.is_set():
                for event in engine.step():
                    events.setdefault(event.id, []).append((event.token, event.text))
        except Exception as error:
            faults.append(error)

    adders = [threading.Thread(target=add) for _ in range(4)]
    steppers = [threading.Thread(target=steps) for _ in range(2)]
    for thread in adders + steppers:
        thread.start()
    for thread in adders:
        thread.join(60)
    adding.set()
    for thread in steppers:
        thread.join(60)
    assert not faults
    assert len(events.keys() | gone) == 100
    for id in events.keys() - gone:
        assert sorted(events[id], key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("kind", ["rwkv1", "mha_rotary", "llama"])
def test_dropout_is_off_and_the_mode_of_the_model_stays(kind):
    model = build(VARIANTS[kind], torch.float32, dropout=0.5)
    request = Request([1, 2, 3, 4, 5], 8, log_probabilities=True)
    expected = alone(model, request)
    model.train()
    model.blocks[1].eval()
    assert_same(alone(model, request), expected)
    assert model.training
    assert not model.blocks[1].training
    assert model.blocks[0].training


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 1.5}, "tokens is 1.5; it must be a whole number"),
        ({"tokens": True}, "tokens is True"),
        ({"prompt": [1.5]}, "prompt holds 1.5; token ids must be whole numbers"),
        ({"prompt": [True]}, "prompt holds True"),
        ({"prompt": ["a"]}, "prompt holds 'a'"),
        ({"prompt": 3}, "prompt is 3; it must be a sequence"),
        ({"prompt": torch.tensor([1.0])}, "prompt holds 1.0"),
        ({"sampler": None}, "sampler is None; it must be a Sampler"),
        ({"start": "a file"}, "start is 'a file'"),
        ({"seed": 1.0}, "seed is 1.0; it must be a whole number"),
        ({"sample": False}, "sample is False; it must be a whole number"),
        ({"stop": (1,)}, "stop holds 1; it must hold strings"),
        ({"stop": 1}, "stop is 1; it must be a sequence"),
        ({"keep": "half"}, "keep is 'half'"),
        ({"samples": 0}, "samples is 0"),
        ({"sample": 2**64 - 1, "samples": 2}, "with samples=2 passes 2^64 - 1"),
        ({"logit_bias": {1: 10**400}}, "logit_bias holds 1: 1000"),
        ({"stop_tokens": (2.0,)}, "stop_tokens holds 2.0"),
        ({"top_log_probabilities": -1}, "top_log_probabilities is -1"),
        ({"logit_bias": [1]}, "logit_bias is"),
        ({"logit_bias": {1: math.inf}}, "logit_bias holds 1: inf"),
        ({"logit_bias": {1: math.nan}}, "logit_bias holds 1: nan"),
        ({"logit_bias": {"a": 1}}, "logit_bias holds 'a': 1"),
    ],
)
def test_values_of_a_wrong_kind_are_refused(fields, words):
    with pytest.raises(InvalidValue, match=re.escape(words)):
        Request(**({"prompt": [1]} | fields))


def test_numbers_of_numpy_and_torch_are_numbers():
    request = Request(np.array([1, 2], np.uint16), np.int64(3), seed=np.uint64(2**63), stop_tokens=torch.tensor([4]))
    assert (request.prompt, request.stop_tokens) == ((1, 2), (4,))
    model = KINDS["rwkv1, compiled"]()
    assert [e.token for e in alone(model, request)] == [e.token for e in alone(model, Request([1, 2], 3, seed=2**63))]
