"""The client of OpenAI against the server: its calls, its streams, its retries and its exceptions."""

import asyncio
import contextlib
import json
import time

import openai
import pytest

from tests.helpers.serving import served, tiny
from timemix.server.app import Settings

KEY = "a key of a test"


@pytest.fixture(scope="module")
def server():
    with served([tiny(), tiny("bounded", "rwkv1")], Settings(keys=[KEY])) as running:
        yield running


@contextlib.contextmanager
def opened(server, received=None, **options):
    """Yield a client. `received` is called with each answer."""
    http = openai.DefaultHttpxClient(event_hooks={"response": [received] if received else []})
    with openai.OpenAI(base_url=f"{server.url}/v1", http_client=http, **{"api_key": KEY, **options}) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    with opened(server) as client:
        yield client


def whole(server, **body):
    """Return the answer that a request without the client gets."""
    answer = server.call("/v1/completions", body, authorization=f"Bearer {KEY}")
    assert answer.status == 200, answer.body
    return answer.json


FIELDS = {
    "plain": {"prompt": "abc"},
    "token ids": {"prompt": [0, 1, 2]},
    "prompts": {"prompt": ["abc", "de"], "n": 2},
    "prompts of token ids": {"prompt": [[0, 1], [2]], "echo": True},
    "sampler": {"prompt": "abc", "temperature": 0.5, "top_p": 0.9, "logit_bias": {"3": 5}},
    "scores": {"prompt": "abc", "logprobs": 5, "echo": True},
    "stop strings": {"prompt": "abc", "stop": ["a", "bc"], "max_tokens": 60},
    "ignored": {"prompt": "abc", "best_of": 1, "suffix": "", "user": "someone"},
}
EXTRA = {"top_k": 3, "min_p": 0.01, "top_a": 0.1, "top_a_power": 1.5, "repetition_penalty": 1.1, "stop_token_ids": [4]}


def content(completion):
    """Return the choices and the usage of an answer of the client, as the server sends them."""
    found = json.loads(completion.model_dump_json(exclude_unset=True))
    return found["choices"], found["usage"]


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_completion_of_the_client_is_the_servers(server, client, fields):
    fields = {"seed": 7, "max_tokens": 9, **fields}
    expected = whole(server, **fields)
    assert content(client.completions.create(model="tiny", **fields)) == (expected["choices"], expected["usage"])


def test_further_fields_pass_in_extra_body(server, client):
    body = {"prompt": "abc", "seed": 7, "max_tokens": 40}
    found = client.completions.create(model="tiny", **body, extra_body=EXTRA | {"return_token_ids": True})
    expected = whole(server, **body, **EXTRA, return_token_ids=True)
    assert found.choices[0].text == expected["choices"][0]["text"] != whole(server, **body)["choices"][0]["text"]
    assert found.choices[0].model_extra["token_ids"] == expected["choices"][0]["token_ids"]


@pytest.mark.parametrize("scores", [None, 3])
def test_a_stream_of_the_client_joins_to_the_whole_answer(server, client, scores):
    body = {"prompt": ["abc", "d"], "seed": 7, "max_tokens": 20, "stop": ["kk"], "logprobs": scores}
    expected = whole(server, **body)
    options = {"include_usage": True}
    chunks = list(client.completions.create(model="tiny", stream=True, stream_options=options, **body))
    assert chunks.pop().usage.total_tokens == expected["usage"]["total_tokens"]
    assert all(chunk.usage is None for chunk in chunks)
    for choice in expected["choices"]:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice["index"]]
        assert "".join(part.text for part in own) == choice["text"]
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        if scores:
            assert [x for part in own for x in part.logprobs.tokens] == choice["logprobs"]["tokens"]


def test_the_asynchronous_client_runs_calls_at_once(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            create = client.completions.create

            async def streamed(seed):
                stream = await create(model="tiny", prompt="abc", seed=seed, max_tokens=12, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def plain(seed):
                found = await create(model="tiny", prompt="abc", seed=seed, max_tokens=12)
                return found.choices[0].text

            return await asyncio.gather(*map(streamed, range(6)), *map(plain, range(6)))

    texts = asyncio.run(run())
    alone = [whole(server, prompt="abc", seed=seed, max_tokens=12)["choices"][0]["text"] for seed in range(6)]
    assert texts == alone + alone


def test_the_models(server, client):
    assert [model.id for model in client.models.list()] == ["tiny", "bounded"]
    model = client.models.retrieve("bounded")
    assert (model.object, model.owned_by, model.model_extra["max_position"]) == ("model", "timemix", 12)


@pytest.mark.parametrize(
    ("kind", "fields", "key", "param", "code"),
    [
        (openai.BadRequestError, {"temperature": -1}, KEY, "temperature", None),
        (openai.BadRequestError, {"suffix": "end"}, KEY, "suffix", "unsupported_parameter"),
        (openai.BadRequestError, {"model": "bounded", "prompt": "a" * 13}, KEY, "prompt", "context_length_exceeded"),
        (openai.NotFoundError, {"model": "gpt"}, KEY, "model", "model_not_found"),
        (openai.AuthenticationError, {}, "wrong", None, "invalid_api_key"),
    ],
)
def test_a_refused_call_raises_and_is_not_sent_again(server, kind, fields, key, param, code):
    answers = []
    with opened(server, answers.append, api_key=key) as client, pytest.raises(kind) as raised:
        client.completions.create(**{"model": "tiny", "prompt": "a", **fields})
    assert len(answers) == 1
    assert (raised.value.param, raised.value.code) == (param, code)
    assert raised.value.body["message"]


def test_a_full_queue_raises_if_the_client_does_not_retry(full):
    running, _ = full
    with opened(running, max_retries=0) as client, pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(model="tiny", prompt="a")
    assert (raised.value.code, raised.value.response.headers["retry-after"]) == ("queue_full", "1")


def test_a_call_to_a_full_queue_is_sent_again_after_the_named_time(full):
    running, streams = full
    answers = []

    def received(answer):
        answers.append(answer.status_code)
        for stream in streams:
            stream.close()

    with opened(running, received) as client:
        began = time.monotonic()
        found = client.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert found.usage.completion_tokens == 1
    assert answers == [429, 200]
    assert time.monotonic() - began >= 1


@pytest.fixture
def full():
    """Yield a server with one slot and a queue of one request, and the two streams that take them."""
    with served([tiny(slots=1, max_pending=1)]) as running, opened(running) as client:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 10**6}
        streams = [client.completions.create(stream=True, **body) for _ in range(2)]
        yield running, streams
        for stream in streams:
            stream.close()


def test_an_error_after_the_first_chunk_raises(monkeypatch):
    def fail():
        raise RuntimeError("a fault of a test")

    with served([tiny()]) as running, opened(running) as client:
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=10**6, stream=True)
        next(stream)
        monkeypatch.setattr(running.models[0].engine, "step", fail)
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
