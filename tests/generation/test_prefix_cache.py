"""The prefix cache: a request that continues from a snapshot gets the bits of a request that does not."""

import functools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.engines import alone, finish
from tests.helpers.models import VARIANTS, build
from tests.helpers.tiers import examples
from timemix.errors import InvalidValue
from timemix.generation.engine import PIECE, Engine
from timemix.generation.prefix_cache import PrefixCache, new_prefix, size_of
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.models.state import State

VOCABULARY = 11
LARGE = 2**30
MODELS = {
    "rwkv6": ("rwkv6", torch.float32, "auto"),
    "rwkv7": ("rwkv7", torch.float32, "auto"),
    "rwkv1, a short context": ("rwkv1", torch.float32, "auto"),
    "llama": ("llama", torch.float32, "auto"),
    "rwkv7, own forward": ("rwkv7", torch.float32, "model"),
    "mha_pro": ("mha_pro", torch.float32, "model"),
}


@functools.cache
def subject(kind):
    """Return a model and its step."""
    from timemix.generation.decode import build_step

    variant, dtype, backend = MODELS[kind]
    torch.manual_seed(0)
    model = build(VARIANTS[variant], dtype, layers=2, ctx_len=150 if "short" in kind else 700, vocab_size=VOCABULARY)
    return model, build_step(model, backend=backend)


def engine_of(kind, max_bytes, **options):
    model, step = subject(kind)
    return Engine(model, step=step, cache=PrefixCache(max_bytes), **options)


def text_of(length, seed=0):
    chosen = random.Random(seed)
    return [chosen.randrange(VOCABULARY) for _ in range(length)]


def bits(events):
    """Return what events report, except the number of cached tokens, by sample."""
    found = {}
    for e in events:
        found.setdefault(e.sample, []).append((e.token, e.top_log_probabilities, e.finished, e.restarted))
    return found


def run(engine, request):
    id = engine.add(request)
    return finish(engine)[id]


def edited(text, chosen):
    """Return a text that differs from another text in its beginning, its middle or its end."""
    at, new = chosen.randrange(len(text)), text_of(chosen.randint(0, 90), chosen.random())
    return text[:at] + new + (text[at:] if chosen.random() < 0.5 else []) or [0]


@functools.cache
def edits(kind):
    """Return requests for edited texts, each with the bits that an engine without a cache gives."""
    (model, step), chosen, texts, found = subject(kind), random.Random(kind), [text_of(300)], []
    for number in range(12):
        texts.append(edited(texts[chosen.randint(0, number)], chosen))
        request = Request(
            texts[-1],
            chosen.randint(0, 70 if step.compiled else 5),
            Sampler(repetition_penalty=chosen.choice((1, 1.2)), presence_penalty=chosen.choice((0, 1))),
            samples=chosen.choice((1, 1, 3)),
            top_log_probabilities=VOCABULARY,
            keep=0.3,
            reuse_decoded=step.compiled and chosen.random() < 0.5,
        )
        found.append((request, bits(run(Engine(model, step=step, slots=slots(step)), request))))
    return found


def slots(step):
    """Only the compiled step gives the same bits beside other rows."""
    return 3 if step.compiled else 1


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("room", [0, 1, 3, 1000])
def test_a_hit_has_the_bits_of_a_miss(kind, room):
    model, step = subject(kind)
    engine, cached = engine_of(kind, room * size_of(model.init_state(1)), slots=slots(step)), 0
    for _ in range(2):
        for begin in range(0, 12, 3):
            expected = {engine.add(request): found for request, found in edits(kind)[begin : begin + 3]}
            events = finish(engine)
            assert {id: bits(own) for id, own in events.items()} == expected
            assert engine.cache.nbytes <= engine.cache.max_bytes
            cached += sum(e.cached for own in events.values() for e in own)
    if room in (0, 1000):
        assert (cached > 0) == (room > 0)


@pytest.mark.parametrize("kind", MODELS)
def test_a_session_after_a_hit_has_the_state_of_a_miss(kind):
    engine = engine_of(kind, LARGE)
    request = Request(text_of(140), 5, keep_session=True)
    first, second = run(engine, request), run(engine, request)
    assert [first[0].cached, second[0].cached] == [0, 2 * PIECE]
    a, b = first[-1].session, second[-1].session
    assert (a.tokens, a.unread, a.written) == (b.tokens, b.unread, b.written)
    assert a.state.position.equal(b.state.position)
    for one, other in zip(a.state.layers, b.state.layers, strict=True):
        assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("kind", MODELS)
def test_generated_tokens_are_reused_only_by_requests_that_allow_it(kind):
    model, step = subject(kind)
    engine = engine_of(kind, LARGE)
    prompt = text_of(30)
    answer = [e.token for e in run(engine, Request(prompt, 60, reuse_decoded=True))]
    later = [*prompt, *answer, 3]
    plain = bits(run(Engine(model, step=step), Request(later, 5, top_log_probabilities=VOCABULARY)))[0]
    for allowed, cached in ((False, 0), (True, PIECE), (False, PIECE)):
        events = run(engine, Request(later, 5, top_log_probabilities=VOCABULARY, reuse_decoded=allowed))
        assert events[0].cached == cached
        if step.compiled or not allowed:
            assert bits(events)[0] == plain
        for event, (token, top, *_) in zip(events, plain, strict=True):
            assert event.token == token
            assert dict(event.top_log_probabilities) == pytest.approx(dict(top), abs=1e-5)


def test_a_text_that_continues_generated_tokens_stays_apart():
    """The state of a prompt that began at a decoded state is not a state of a prompt either."""
    engine = engine_of("rwkv7, own forward", LARGE)
    prompt = text_of(30)
    answer = [e.token for e in run(engine, Request(prompt, 60, reuse_decoded=True))]
    later = [*prompt, *answer, *text_of(100)]
    assert run(engine, Request(later, 1, reuse_decoded=True))[0].cached == PIECE
    assert run(engine, Request(later, 1))[0].cached == 0
    assert run(engine, Request(later, 1, reuse_decoded=True))[0].cached == 2 * PIECE


def test_only_the_newest_state_of_an_answer_is_kept():
    engine = engine_of("rwkv7", LARGE)
    run(engine, Request([1], 5 * PIECE, reuse_decoded=True))
    assert len(engine.cache) == 1
    run(engine, Request([2], 5 * PIECE))
    assert len(engine.cache) == 1


def test_scopes_share_nothing():
    engine = engine_of("rwkv7", LARGE)
    request = {"prompt": text_of(200), "tokens": 1}
    assert [run(engine, Request(**request, scope=scope))[0].cached for scope in ("a", "b", "a", "")] == [0, 0, 192, 0]
    with pytest.raises(InvalidValue, match="scope is None; it must be a string"):
        Request(**request, scope=None)


def test_a_prompt_with_scores_processes_every_token():
    engine = engine_of("rwkv7", LARGE)
    request = Request(text_of(200), 1, prompt_log_probabilities=True)
    first, second = (run(engine, request)[0] for _ in range(2))
    assert (first.cached, second.cached, len(engine.cache)) == (0, 0, 0)
    assert first.prompt_log_probabilities == second.prompt_log_probabilities


def test_hits_and_tokens_are_counted():
    engine = engine_of("rwkv7", LARGE)
    prompt = text_of(3 * PIECE)
    run(engine, Request(prompt[: PIECE - 1], 1))
    assert (engine.cache.hits, engine.cache.misses) == (0, 0)
    first = run(engine, Request(prompt, 2, samples=3))
    again = run(engine, Request(prompt, 2, samples=3))
    assert (engine.cache.hits, engine.cache.misses) == (1, 1)
    assert [e.cached for e in first] == [0] * 6
    # Each sample reports the number in its first event. The last of the prompt's tokens is not in a snapshot.
    assert [e.cached for e in again] == [2 * PIECE] * 3 + [0] * 3


def test_progress_counts_cached_tokens():
    engine = engine_of("rwkv7", LARGE, slots=1)
    run(engine, Request(text_of(300), 1))
    id = engine.add(Request(text_of(300)[:290], 2))
    assert engine.progress(id) == (0, 290)
    engine.step()
    # The last snapshot is after 256 tokens, and the first step reads the rest.
    assert engine.progress(id) == (290, 290)
    later = engine.add(Request(text_of(200)[:-1] + [0] * 100, 1, keep_session=True))
    engine.cancel(id)
    engine.step()
    assert engine.progress(later) == (192 + PIECE, 299)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [(0, []), (1, [1]), (2, [1, 2]), (9, [1, 5, 7, 8, 9]), (20, [4, 12, 16, 18, 19, 20])],
)
def test_a_prompt_stores_few_snapshots_that_are_denser_at_its_end(pieces, expected):
    engine = engine_of("rwkv7", LARGE)
    text = text_of(PIECE * pieces + 1)
    run(engine, Request(text, 1))
    assert len(engine.cache) == len(expected)
    # A prompt that differs in piece n, counted from 1, continues from the nearest snapshot before it.
    for number in range(1, pieces + 1):
        other = [*text[: PIECE * number - 1], (text[PIECE * number - 1] + 1) % VOCABULARY]
        id = engine.add(Request([*other, 0], 1))
        engine.step()
        nearest = max((each for each in expected if each < number), default=0)
        assert engine.progress(id)[0] >= PIECE * nearest
        engine.cancel(id)


def state(size):
    return State(torch.zeros(1, dtype=torch.int64), [{"x": torch.zeros(1, size, dtype=torch.uint8)}])


def stored(cache, text):
    prefix = new_prefix("", [text, 0], 1)
    cache.store(prefix, [text], 1, lambda: state(100))


def is_found(cache, text):
    return cache.find(new_prefix("", [text, 0], 1)) is not None


def test_the_least_recently_used_snapshot_is_removed():
    cache = PrefixCache(3 * size_of(state(100)) + 99)
    for text in (1, 2, 3):
        stored(cache, text)
    assert is_found(cache, 1)
    stored(cache, 2)
    stored(cache, 4)
    assert [is_found(cache, text) for text in (1, 2, 3, 4)] == [True, True, False, True]
    assert cache.nbytes == 3 * size_of(state(100)) <= cache.max_bytes


@pytest.mark.parametrize("max_bytes", [0, 1])
def test_a_cache_without_room_stores_nothing(max_bytes):
    cache = PrefixCache(max_bytes)
    stored(cache, 1)
    assert (len(cache), cache.nbytes, is_found(cache, 1)) == (0, 0, False)
    with pytest.raises(InvalidValue, match="max_bytes is -1; it must be a number of bytes"):
        PrefixCache(-1)


TEXTS = st.lists(st.integers(0, 1), max_size=12)


@given(TEXTS, TEXTS, st.sampled_from(["", "a", "\ud800"]), st.sampled_from(["", "a"]))
@examples(200)
def test_digests_are_equal_for_equal_prefixes_of_one_scope(first, second, scope, other):
    a, b = new_prefix(scope, [*first, 0], 2), new_prefix(other, [*second, 0], 2)
    assert (a.last, b.last) == (len(first) // 2, len(second) // 2)
    for i in range(a.last + 1):
        for j in range(b.last + 1):
            is_same = scope == other and first[: 2 * i] == second[: 2 * j] and i == j
            assert (a.digests[i] == b.digests[j]) == is_same


def test_a_text_past_its_context_neither_stores_nor_finds_states_of_it():
    kind = "rwkv1, a short context"
    model, step = subject(kind)
    engine = engine_of(kind, LARGE)
    request = Request(text_of(400), 300, keep=0.9, reuse_decoded=True, top_log_probabilities=VOCABULARY)
    expected = bits(run(Engine(model, step=step), request))
    for cached in (0, 128):
        events = run(engine, request)
        assert bits(events) == expected
        # The model processes only the last 150 tokens of the prompt.
        assert events[0].cached == cached
    assert sum(e.restarted for e in events) == 19


def test_the_first_event_after_a_restart_says_so():
    model, _ = subject("rwkv1, a short context")
    request = Request(text_of(148), 40, keep=0.9)
    # When 150 tokens are in the state, the newest 135 tokens with the new token are processed again.
    assert [i for i, e in enumerate(alone(model, request, None)) if e.restarted] == [3, 19, 35]
    exact = Request(text_of(148), 40, context="exact")
    assert not any(e.restarted for e in alone(model, exact, None))
