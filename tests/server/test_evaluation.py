"""The requests with which lm-evaluation-harness (`local-completions`) scores a model give the numbers of timemix."""

import math

import pytest
import torch

from tests.helpers.engines import CHARACTERS
from tests.helpers.serving import served, tiny
from timemix.evaluation.texts import evaluate_text

TEXT = "abcdefghijkjihgfedcba" * 4 + "kkeeddbbaa"
PREFIX = CHARACTERS.encode("a").tolist()[0]


@pytest.fixture(scope="module")
def server():
    with served([tiny(), tiny("bounded", "rwkv1"), tiny("exact", "rwkv1_exp")]) as running:
        yield running


def payload(model, prompts):
    """Return the body of a request for scores."""
    return {
        "model": model,
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def scores(server, model, pairs):
    """Score continuations as the program does; return (log-probability, whether it is the greedy one) of each pair."""
    answer = server.call(
        "/v1/completions",
        payload(model, [context + continuation for context, continuation in pairs]),
        authorization="Bearer ",
    )
    assert answer.status == 200, answer.body
    found = []
    for choice, (context, _) in zip(sorted(answer.json["choices"], key=lambda c: c["index"]), pairs, strict=True):
        values = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        found.append((sum(values), all(x == max(top.values()) for x, top in zip(values, tops, strict=True))))
    return found


def windows(ids, max_length):
    """Yield (context, continuation) of the rolling windows of a text.

    The program sends `max_length` - 1 tokens at most, as it keeps one place for the token that the server generates.
    """
    size = max_length - 2
    text, done = [PREFIX, *ids], 0
    while done < len(ids):
        new = min(size, len(ids) - done)
        begin = max(done + new - size, 0)
        yield text[begin : done + 1], text[done + 1 : done + 1 + new]
        done += new


def bits_per_byte(server, model, text, max_length, batch_size):
    """Return the metric of a task with the output `loglikelihood_rolling`."""
    pairs = list(windows(CHARACTERS.encode(text).tolist(), max_length))
    batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    total = sum(value for batch in batches for value, _ in scores(server, model, batch))
    return -total / len(text.encode()) / math.log(2)


def own_numbers(server, index, text, **options):
    """Return the metric that timemix computes. The first token of its text is the prefix of the program."""
    model = server.models[index].engine.model
    return evaluate_text(model, CHARACTERS, CHARACTERS.decode([PREFIX]) + text, **options).bits_per_byte


@pytest.mark.parametrize(("index", "name"), [(0, "tiny"), (2, "exact")])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_bits_per_byte_in_windows_equal_those_of_timemix_eval(server, index, name, batch_size):
    length = server.models[index].engine.model.config.ctx_len
    # The program gives a shorter last window more context.
    text = TEXT[: len(TEXT) // length * length]
    found = bits_per_byte(server, name, text, length + 2, batch_size)
    assert found == pytest.approx(own_numbers(server, index, text), rel=1e-5)


def test_bits_per_byte_of_the_whole_text_equal_those_with_a_carried_state(server):
    found = bits_per_byte(server, "tiny", TEXT, 4096, 1)
    assert found == pytest.approx(own_numbers(server, 0, TEXT, carry_state=True), rel=1e-5)
    assert found != pytest.approx(own_numbers(server, 0, TEXT), rel=1e-3)


def test_a_bounded_context_needs_its_length(server):
    limit = server.models[1].engine.model.max_position
    text = TEXT[: limit - 1]
    found = bits_per_byte(server, "bounded", text, limit + 1, 1)
    assert found == pytest.approx(own_numbers(server, 1, text), rel=1e-5)
    refused = server.call("/v1/completions", payload("bounded", [[PREFIX] * (limit + 1)]))
    assert refused.json["error"]["code"] == "context_length_exceeded"


def test_choices_of_a_question_have_their_log_probabilities(server):
    context, choices = [0, 3, 5], [[1, 2], [4], [10, 0, 7, 7]]
    model = server.models[0].engine.model
    for choice, (value, is_greedy) in zip(
        choices, scores(server, "tiny", [(context, c) for c in choices]), strict=True
    ):
        with torch.no_grad():
            logits, _ = model(torch.tensor([context + choice]))
        own = logits.double().log_softmax(-1)[0, len(context) - 1 : -1]
        assert value == pytest.approx(sum(own[i, token].item() for i, token in enumerate(choice)), abs=1e-5)
        assert is_greedy == (own.argmax(-1).tolist() == choice)


def test_the_greedy_continuation_is_recognized(server):
    answer = server.complete(prompt=[0, 3, 5], max_tokens=4, temperature=0, return_token_ids=True)
    continuation = answer["choices"][0]["token_ids"]
    assert [is_greedy for _, is_greedy in scores(server, "tiny", [([0, 3, 5], continuation)])] == [True]


@pytest.mark.parametrize("until", [[], ["b", "c", "dd", "ee", "ffff"]])
def test_a_request_for_a_generated_answer(server, until):
    body = {
        "prompt": [[0, 1, 2], [3]],
        "model": "tiny",
        "max_tokens": 12,
        "temperature": 0,
        "stop": until,
        "seed": 1234,
    }
    choices = server.complete(**body)["choices"]
    assert len(choices) == 2
    assert not any(stop in choice["text"] for stop in until for choice in choices)


def test_a_missing_prefix_token_is_an_error_of_the_client(server):
    answer = server.call("/v1/completions", payload("tiny", [[None, 1, 2]]))
    assert answer.status == 400
    assert answer.json["error"]["param"] == "prompt"


def test_the_program_finds_the_tokenizer(server):
    assert "eos_token" in server.call("/tokenizer_info").json
    found = server.call("/tokenize", {"prompt": "abc", "add_special_tokens": False}).json["tokens"]
    assert server.call("/detokenize", {"tokens": found}).json == {"prompt": "abc"}
