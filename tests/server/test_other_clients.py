"""Requests of other programs, as these programs send them, and their reading of the answers."""

import json
import math

import pytest

from tests.helpers.engines import CHARACTERS
from tests.helpers.serving import served, tiny
from timemix.tokenizers.character import ByteTokenizer


@pytest.fixture(scope="module")
def server():
    with served([tiny(), tiny("bytes", tokenizer=ByteTokenizer())]) as running:
        yield running


def lines(answer):
    """Yield the JSON of a stream line by line, as programs without a client library read it."""
    assert answer.status == 200, answer.body
    messages = answer.body.decode().split("\n\n")
    assert messages[-2:] == ["data: [DONE]", ""]
    for message in messages[:-2]:
        if not message.startswith(":"):
            yield json.loads(message.removeprefix("data: "))


@pytest.mark.parametrize("ignore_eos", [{}, {"ignore_eos": True}])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_the_serving_benchmark_of_vllm(server, ignore_eos, logprobs):
    body = {
        "model": "tiny",
        "prompt": "abcdef",
        "repetition_penalty": 1.0,
        "max_tokens": 12,
        "logprobs": logprobs,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = server.call("/v1/completions", body | ignore_eos, x_request_id="bench-0")
    text, usage, timed = "", None, 0
    for data in lines(answer):
        if data.get("choices"):
            text += data["choices"][0].get("text") or ""
            timed += 1
        elif data.get("usage"):
            usage = data["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 12)
    assert len(text) == 12
    assert 1 <= timed <= 12


def test_guidellm(server):
    assert server.call("/health").status == 200
    model = server.call("/v1/models").json["data"][0]["id"]
    body = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 10,
        "stop": None,
        "ignore_eos": True,
        "prompt": "ab cd".replace(" ", ""),
    }
    texts, usages = [], []
    for data in lines(server.call("/v1/completions", body)):
        choices = data.get("choices", [])
        if choices and choices[0].get("text"):
            texts.append(choices[0]["text"])
        usages.append(data["usage"])
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[-1] == 10 == len("".join(texts))
    assert {usage["prompt_tokens"] for usage in usages} == {4}


MIKUPAD = {
    "prompt": "abcd",
    "max_tokens": 8,
    "logprobs": 10,
    "temperature": 0.7,
    "repetition_penalty": 1.1,
    "repetition_penalty_range": 1024,
    "max_context_length": 8192,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0,
    "tfs": 1,
    "typical_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "ban_eos_token": False,
    "dynatemp_range": 0,
    "logit_bias": {},
    "stop": [],
    "seed": -1,
    "stream": True,
}


def test_mikupad(server):
    """The page reads the first entry of the log-probabilities of a chunk, and finds the token there by its text."""
    answer = server.call("/v1/completions", MIKUPAD, authorization="Bearer undefined", x_real_url=server.url)
    seen = 0
    for data in lines(answer):
        choice = data["choices"][0]
        top = choice["logprobs"]["top_logprobs"][0]
        assert choice["text"] in top
        assert 0 < math.exp(top[choice["text"]]) <= 1
        seen += 1
    assert seen == 8
    refused = server.call("/v1/completions", MIKUPAD | {"prompt": "xyz"})
    assert "'x' (U+0078)" in refused.json["error"]["message"]


def test_the_seed_minus_one_asks_for_a_new_seed(server):
    body = {"prompt": "abcd", "seed": -1, "max_tokens": 20}
    assert len({server.complete(**body)["choices"][0]["text"] for _ in range(4)}) > 1


def test_the_scores_of_byte_tokens_have_distinct_names(server):
    body = {"model": "bytes", "prompt": "é", "max_tokens": 3, "logprobs": 20, "echo": True, "seed": 1}
    scores = server.complete(**body)["choices"][0]["logprobs"]
    assert scores["tokens"][:2] == [r"bytes:\xc3", r"bytes:\xa9"]
    assert scores["text_offset"][:3] == [0, 0, 1]
    for token, value, top in list(zip(*(scores[n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True))[
        1:
    ]:
        assert top[token] == value
        assert len(top) in (20, 21)


def test_a_gateway_that_counts_tokens(server):
    """The routes with which evaluation programs and gateways find the tokenizer of a server."""
    found = server.call("/tokenize", {"prompt": "abc", "add_special_tokens": False}).json
    assert found == {"tokens": CHARACTERS.encode("abc").tolist(), "count": 3, "max_model_len": None}
    assert server.call("/detokenize", {"tokens": found["tokens"]}).json == {"prompt": "abc"}
    assert server.call("/tokenizer_info").json["eos_token"] is None
