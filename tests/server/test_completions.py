"""/v1/completions: its fields, its answers, its errors."""

import math

import pytest

from tests.helpers.engines import alone
from tests.helpers.serving import served, tiny
from timemix.generation.request import Request
from timemix.generation.sampler import Sampler
from timemix.server import completions
from timemix.tokenizers.make import train_tokenizer


@pytest.fixture(scope="module")
def server():
    with served([tiny(), tiny("bounded", "rwkv1")]) as running:
        yield running


def direct(server, prompt, **fields):
    """Return the events of a request that runs alone in an engine of its own."""
    return alone(server.models[0].engine.model, Request(prompt, **fields))


def test_the_text_is_the_engines(server):
    answer = server.complete(prompt="abc", max_tokens=9, seed=5, temperature=0.7, top_k=5)
    events = direct(server, [0, 1, 2], tokens=9, seed=5, sampler=Sampler(temperature=0.7, top_k=5))
    assert answer["choices"][0]["text"] == "".join(event.text for event in events)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 9,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("prompt", ["abc", [0, 1, 2], ["abc"], [[0, 1, 2]]])
def test_every_shape_of_a_prompt(server, prompt):
    assert server.complete(prompt=prompt, seed=1)["choices"] == server.complete(prompt="abc", seed=1)["choices"]


def test_prompts_and_samples_are_choices_in_order(server):
    answer = server.complete(prompt=["ab", "cd"], n=2, seed=3, max_tokens=4)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[2:] == [
        choice["text"] for choice in server.complete(prompt="cd", n=2, seed=3, max_tokens=4)["choices"]
    ]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stop", [None, "a", ["ab", "k", "dd"]])
def test_a_stream_joins_to_the_whole_answer(server, stop):
    body = {"prompt": ["ab", "c"], "n": 2, "seed": 8, "max_tokens": 30, "stop": stop, "logprobs": 2, "echo": True}
    whole = server.complete(**body)
    options = {"include_usage": True}
    chunks = server.call("/v1/completions", body | {"stream": True, "stream_options": options}).events
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [x for c in own for x in c["logprobs"][name]] == values
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


def test_echo_scores_the_prompt(server):
    answer = server.complete(prompt="abcab", max_tokens=1, echo=True, logprobs=3, seed=0)
    logprobs = answer["choices"][0]["logprobs"]
    (event,) = direct(server, [0, 1, 2, 0, 1], tokens=1, prompt_log_probabilities=True, log_probabilities=True)
    assert logprobs["token_logprobs"] == [*event.prompt_log_probabilities, event.log_probability]
    assert logprobs["tokens"][:5] == list("abcab")
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5]
    for token, value, top in list(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    )[1:]:
        assert top[token] == value
        assert len(top) in (3, 4)


def test_echo_scores_the_prompt_in_every_choice(server):
    answer = server.complete(prompt="abcab", max_tokens=2, n=3, echo=True, logprobs=1, seed=0)
    first, *others = [choice["logprobs"] for choice in answer["choices"]]
    assert all(score is not None for score in first["token_logprobs"][1:])
    for other in others:
        for name, values in first.items():
            assert other[name][:5] == values[:5]


def test_offsets_of_words_count_the_space_after_the_prompt():
    tokenizer = train_tokenizer("word", ["the cat sat on the mat"])
    with served([tiny("words", tokenizer=tokenizer)]) as server:
        (choice,) = server.complete(prompt="the", max_tokens=4, logprobs=0, seed=1)["choices"]
    places = choice["logprobs"]["text_offset"]
    words = choice["text"].split()
    assert len(words) == 4
    assert choice["text"] == "".join(f" {word}" for word in words)
    assert places == [sum(len(word) + 1 for word in words[:n]) for n in range(4)]


def test_choices_that_repeat_a_long_prompt_are_refused(server, monkeypatch):
    monkeypatch.setattr(completions, "MOST_REPEATED", 100)
    for more in ({"echo": True}, {"return_token_ids": True}):
        answer = server.call("/v1/completions", {"prompt": "ab" * 20, "n": 3, "max_tokens": 1} | more)
        assert (answer.status, answer.json["error"]["param"]) == (400, "n")
        assert answer.json["error"]["message"].startswith(
            "the choices repeat 120 tokens of prompts, more than 100; give"
        )
        assert server.complete(prompt="ab" * 60, max_tokens=1, **more)
    assert len(server.complete(prompt="ab" * 20, n=3, max_tokens=1)["choices"]) == 3


def test_a_greedy_token_has_the_largest_of_the_reported_numbers(server):
    answer = server.complete(prompt="abc", max_tokens=5, temperature=0, logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [max(top.values()) for top in logprobs["top_logprobs"]]


def test_no_tokens_at_all_with_echo(server):
    answer = server.complete(prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert answer["choices"][0]["text"] == "abc"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3
    assert answer["usage"]["completion_tokens"] == 0


def test_a_call_without_a_seed_gets_a_text_of_its_own(server):
    assert len({server.complete(prompt="a", max_tokens=20)["choices"][0]["text"] for _ in range(4)}) > 1


def test_equal_prompts_without_a_seed_get_texts_of_their_own(server):
    texts = [choice["text"] for choice in server.complete(prompt=["a"] * 4, n=2, max_tokens=20)["choices"]]
    assert len(set(texts)) == 8


def test_offsets_of_an_echo_are_places_in_the_text():
    """A word vocabulary changes spaces and unknown words, so an echo with offsets is the text of the tokens."""
    tokenizer = train_tokenizer("word", ["the cat sat on the mat"], unknown="unk")
    with served([tiny("words", tokenizer=tokenizer)]) as server:
        body = {"prompt": "the  zebra sat", "max_tokens": 3, "seed": 1, "echo": True}
        (choice,) = server.complete(**body, logprobs=0)["choices"]
        (plain,) = server.complete(**body)["choices"]
    assert plain["text"].startswith("the  zebra sat")
    assert choice["text"].startswith("the <unk> sat")
    scores = choice["logprobs"]
    for place, token in zip(scores["text_offset"], scores["tokens"], strict=True):
        assert choice["text"][place:].lstrip().startswith(token)


@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_an_echo_that_ends_inside_a_character(tokens):
    tokenizer = train_tokenizer("byte", "a")
    prompt = [*b"the ", *"\U0001f600".encode()[:3]]
    with served([tiny("bytes", tokenizer=tokenizer)]) as server:
        # The fourth byte of the character comes first.
        body = {"prompt": prompt, "max_tokens": tokens, "echo": True, "logit_bias": {0x80: 1000}}
        (choice,) = server.complete(**body, logprobs=0, return_token_ids=True)["choices"]
        (plain,) = server.complete(**body)["choices"]
    ids = prompt + [0x80] * tokens
    assert choice["text"] == plain["text"] == tokenizer.decode(ids)
    scores = choice["logprobs"]
    assert scores["text_offset"][:8] == [0, 1, 2, 3, 4, 4, 4, 4][: 7 + tokens]
    assert scores["text_offset"][8:] == [5, 6, 7][: max(0, tokens - 1)]


def test_more_biases_than_tokens_are_refused(server):
    answer = server.call("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 0 for i in range(50_000)}})
    assert answer.status == 400
    assert "logit_bias has 50000 ids; the vocabulary has 11" in answer.json["error"]["message"]


def test_the_list_of_models_with_a_slash(server):
    assert server.call("/v1/models/").json == server.call("/v1/models").json


def test_null_counts_as_absent(server):
    fields = ("logprobs", "stop", "seed", "n", "logit_bias", "suffix", "stream_options", "temperature", "best_of")
    assert server.complete(prompt="a", model=None, **dict.fromkeys(fields))["model"] == "tiny"


def test_fields_of_other_servers_with_a_value_that_changes_nothing(server):
    harmless = {"min_tokens": 0, "bad_words": [], "length_penalty": 1.0, "include_stop_str_in_output": False}
    harmless |= {"use_beam_search": False, "response_format": {"type": "text"}}
    assert server.complete(prompt="a", seed=1, **harmless) | {"id": 0, "created": 0} == (
        server.complete(prompt="a", seed=1) | {"id": 0, "created": 0}
    )


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "must be a string"),
        ({"prompt": [None]}, "prompt", "must be a string"),
        ({"prompt": [[0], "a", 3]}, "prompt", "must be a string"),
        ({"prompt": {"a": 1}}, "prompt", "an object"),
        ({"prompt": "xyz"}, "prompt", "'x' (U+0078)"),
        ({"prompt": [99]}, "prompt", "prompt holds 99; the vocabulary has ids from 0 to 10"),
        ({"prompt": "a", "temperature": -1}, "temperature", "at least 0"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "a number"),
        ({"prompt": "a", "top_p": 0}, "top_p", "above 0"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "from 0"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"prompt": "a", "n": 0}, "n", "from 1"),
        ({"prompt": "a", "n": True}, "n", "whole number"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "to 20"),
        ({"prompt": "a", "stop": [""]}, "stop", "none of them empty"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "at most 16"),
        ({"prompt": "a", "stop": False}, "stop", "a string or a list"),
        ({"prompt": ["a"] * 1025}, "prompt", "at most 1024"),
        ({"prompt": "a", "stop_token_ids": [11]}, "stop_token_ids", "from 0 to 10"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "by token id"),
        ({"prompt": "a", "logit_bias": [1]}, "logit_bias", "by token id"),
        ({"prompt": "a", "logit_bias": {" 1": 1}}, "logit_bias", "by token id"),
        ({"prompt": "a", "logit_bias": {"1": "2"}}, "logit_bias", "by token id"),
        ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias", "by token id"),
        ({"prompt": "a", "best_of": 2}, "best_of", "not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "min_tokens": 5}, "min_tokens", "not supported"),
        ({"prompt": "a", "allowed_token_ids": [1]}, "allowed_token_ids", "not supported"),
        ({"prompt": "a", "bad_words": ["b"]}, "bad_words", "not supported"),
        ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs", "not supported"),
        ({"prompt": "a", "include_stop_str_in_output": True}, "include_stop_str_in_output", "not supported"),
        ({"prompt": "a", "length_penalty": 0.5}, "length_penalty", "not supported"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"prompt": "a", "stream": True, "stream_options": []}, "stream_options", "an object"),
        ({"prompt": "a", "stream": 1}, "stream", "true or false"),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos", "true or false"),
        ({"prompt": "a", "context": ""}, "context", "one of reanchor, exact, error"),
        ({"prompt": "a", "seed": 2**64}, "seed", "whole number"),
        ({"prompt": "a", "model": "bounded", "max_tokens": 20, "context": "error"}, "prompt", "12 tokens"),
        ({"prompt": "a" * 13, "model": "bounded"}, "prompt", "has 12 tokens, but the prompt has 13"),
        ({"prompt": "\ud800"}, "prompt", "a string without lone surrogates"),
    ],
)
def test_a_wrong_field_is_named(server, fields, param, words):
    answer = server.call("/v1/completions", fields)
    assert answer.status == 400
    error = answer.json["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


def test_a_long_prompt_of_a_bounded_context_has_its_code(server):
    answer = server.call("/v1/completions", {"prompt": "a" * 13, "model": "bounded"})
    assert answer.json["error"]["code"] == "context_length_exceeded"
    body = {"prompt": "a" * 13, "model": "bounded", "context": "reanchor", "max_tokens": 30}
    assert server.complete(**body)["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b'"a"', b"null"])
def test_a_body_that_is_no_object(server, body):
    answer = server.call("/v1/completions", body)
    assert answer.status == 400
    assert "JSON" in answer.json["error"]["message"]


def test_more_prompts_than_slots_and_queue_together():
    with served([tiny(slots=1, max_pending=1)]) as small:
        assert len(small.complete(prompt=["a", "b"], max_tokens=1)["choices"]) == 2
        answer = small.call("/v1/completions", {"prompt": ["a", "b", "c"]})
        assert answer.status == 400
        assert answer.json["error"]["message"] == "prompt holds 3 prompts; the server takes at most 2"


def test_an_unknown_model(server):
    answer = server.call("/v1/completions", {"prompt": "a", "model": "gpt"})
    assert answer.status == 404
    assert answer.json["error"]["code"] == "model_not_found"
    assert "tiny, bounded" in answer.json["error"]["message"]


def test_a_bias_that_excludes_every_token(server):
    body = {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(11)), -1e299)}
    assert server.call("/v1/completions", body).status == 200


def test_other_paths_and_methods_answer_in_the_same_form(server):
    assert server.call("/v1/nothing").json["error"]["type"] == "not_found_error"
    assert server.call("/v1/completions").status == 405


def test_the_next_token(server):
    found = server.call("/v1/next_token", {"prompt": "abc", "top": 4}).json
    (event,) = direct(server, [0, 1, 2], tokens=1, top_log_probabilities=11)
    assert [(each["id"], each["logprob"]) for each in found["top"]] == list(event.top_log_probabilities[:4])
    assert [bytes(each["bytes"]).decode() for each in found["top"]] == [each["token"] for each in found["top"]]
    rest = sum(math.exp(x) for _, x in event.top_log_probabilities[4:])
    assert found["rest"] == pytest.approx(math.log(rest))
    assert server.call("/v1/next_token", {"prompt": "abc", "top": 1000}).json["rest"] is None
