"""The cache of prompts over HTTP: what it saves, and what it counts."""

import pytest

from tests.helpers.serving import served, tiny
from tests.helpers.states import same
from timemix.generation.prefix_cache import PrefixCache
from timemix.server.app import Settings

LONG = "abcdefghijk" * 60


@pytest.fixture
def cached():
    """A server with a cache of states, and with two keys."""
    models = [same(cache=PrefixCache(10**6)), tiny("bounded", "rwkv1", cache=PrefixCache(10**6))]
    with served(models, Settings(keys=["one", "two"])) as running:
        yield running


def with_key(server, key="one", path="/v1/completions", **body):
    answer = server.call(path, body, Authorization=f"Bearer {key}")
    assert answer.status == 200, answer.body
    return answer.json


def number_cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_prompt_that_begins_like_another_is_cached(server, cached):
    body = {"seed": 3, "max_tokens": 8, "logprobs": 2, "n": 2}
    assert number_cached(with_key(cached, prompt=LONG)) == 0
    for prompt in (LONG, LONG + "abc", LONG[:500], LONG[:300] + "a" * 300):
        expected = server.complete(prompt=prompt, **body)["choices"]
        answer = with_key(cached, prompt=prompt, **body)
        assert answer["choices"] == expected
        assert 0 < number_cached(answer) < len(prompt)
        assert number_cached(answer) % 64 == 0
    # Another key has a cache of its own.
    assert number_cached(with_key(cached, "two", prompt=LONG)) == 0
    assert number_cached(with_key(cached, "two", prompt=LONG)) == 640
    state = with_key(cached, path="/v1/states", prompt=LONG)["id"]
    answer = with_key(cached, state=state, **body)
    assert answer["choices"] == server.complete(prompt=LONG, **body)["choices"]
    # Scores of a prompt need the whole prompt.
    assert number_cached(with_key(cached, prompt=LONG, echo=True, logprobs=0)) == 0


def test_a_decoded_state_is_reused_only_if_the_call_allows_it(cached):
    body = {"seed": 3, "max_tokens": 200}
    for allows, expected in ((False, 64), (True, 256)):
        first = with_key(cached, prompt="a" * 100, reuse_decoded=allows, **body)["choices"][0]["text"]
        answer = with_key(cached, prompt="a" * 100 + first, reuse_decoded=allows, max_tokens=1)
        assert number_cached(answer) == expected
        answer = with_key(cached, prompt="a" * 100 + first, max_tokens=1)
        assert number_cached(answer) >= 64


def test_the_metrics_count_states(cached):
    with_key(cached, prompt=LONG, n=3)
    with_key(cached, prompt=LONG, n=3)
    state = with_key(cached, path="/v1/states", prompt="abc")
    lines = cached.call("/metrics", Authorization="Bearer one").body.decode().splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert found['timemix_state_cache_hits_total{model="tiny"}'] == "1"
    assert found['timemix_state_cache_misses_total{model="tiny"}'] == "1"
    assert found['timemix_cached_tokens_total{model="tiny"}'] == "640"
    with_key(cached, path="/v1/next_token", prompt=LONG)
    with_key(cached, path="/v1/states", prompt=LONG)
    assert cached.models[0].metrics.cached_tokens == 3 * 640
    cache = cached.models[0].engine.cache
    assert found['timemix_state_cache_bytes{model="tiny"}'] == str(cache.nbytes)
    assert found['timemix_state_cache_entries{model="tiny"}'] == str(len(cache))
    assert (found["timemix_states_stored"], found["timemix_states_bytes"]) == ("1", str(state["bytes"]))
