"""/v1/chat/completions: templates, answers, streams, errors."""

import pytest
import torch

from tests.helpers.models import VARIANTS, build
from tests.helpers.scripted import Scripted
from tests.helpers.serving import served, tiny
from tests.helpers.vocabularies import BYTES
from timemix.data.templates import WORLD, Message
from timemix.generation.engine import Engine
from timemix.server.engine_thread import Served
from timemix.tokenizers.character import ByteTokenizer
from timemix.tokenizers.world import WorldTokenizer

TOKENIZER = WorldTokenizer([*BYTES, b"\n\n", b"User", b" Hi"], 300)
HELLO = {"role": "user", "content": "Hello!"}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server():
    with served([tiny("world", tokenizer=TOKENIZER), tiny("plain"), tiny("bounded", "rwkv1")]) as running:
        yield running


def chat(server, *messages, **fields):
    """Return the answer to messages, which must succeed. A text is a message of the user."""
    messages = [{"role": "user", "content": each} if isinstance(each, str) else each for each in messages]
    answer = server.call(PATH, {"messages": messages, "max_tokens": 12, "seed": 3} | fields)
    assert answer.status == 200, answer.body
    return answer.events if fields.get("stream") else answer.json


@pytest.fixture
def scripted():
    """Return a server whose model generates a given text."""

    def scripted(*script, tokenizer=TOKENIZER):
        model = build(VARIANTS["rwkv7"], torch.float32, vocab_size=tokenizer.vocab_size)
        engine = Engine(model, tokenizer, step=Scripted(model, tokenizer, script))
        return served([Served("scripted", engine, "float32", 1, trained="world")])

    return scripted


def test_the_answer_is_the_completion_of_the_rendered_messages(server):
    messages = [("system", "Be short."), ("user", "Hello!"), ("assistant", "Hi.\n\nYou?"), ("user", "x\n\nUser: y")]
    answer = chat(server, *({"role": role, "content": text} for role, text in messages), temperature=0.7)
    text = WORLD.render([Message(*each) for each in messages])
    expected = server.complete(prompt=text, max_tokens=12, seed=3, temperature=0.7)
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": expected["choices"][0]["text"].removeprefix(" "),
        "refusal": None,
    }
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert answer["usage"] == expected["usage"]
    assert (answer["object"], answer["model"]) == ("chat.completion", "world")
    assert answer["id"].startswith("chatcmpl-")


def test_a_model_without_a_template_continues_the_messages(server):
    answer = chat(server, "abc", model="plain")
    assert (
        answer["choices"][0]["message"]["content"]
        == (server.complete(prompt="abc", model="plain", max_tokens=12, seed=3)["choices"][0]["text"])
    )


def test_the_label_of_the_next_message_and_the_end_of_text_end_an_answer(scripted):
    for script in ((" Hi\n\nyou.\n\nUser:",), (" Hi\n\nyou.", 0)):
        with scripted(*script) as server:
            answer = chat(server, HELLO, max_tokens=40)
        assert answer["choices"][0]["message"]["content"] == "Hi\n\nyou."
        assert answer["choices"][0]["finish_reason"] == "stop"
        with scripted(*script) as server:
            chunks = chat(server, HELLO, max_tokens=40, stream=True)
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == "Hi\n\nyou."


def test_an_own_stop_string_ends_an_answer_too(scripted):
    with scripted(" Hi you") as server:
        answer = chat(server, HELLO, stop=" y", max_tokens=40)
    assert answer["choices"][0]["message"]["content"] == "Hi"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_last_message_of_the_assistant_is_continued(scripted):
    begun = {"role": "assistant", "content": "Say "}
    with scripted(" Hi", 0) as server:
        assert chat(server, HELLO, begun)["choices"][0]["message"]["content"] == " Hi"
    with scripted(" Hi", 0) as server:
        assert chat(server, HELLO, begun | {"content": None})["choices"][0]["message"]["content"] == "Hi"


def test_a_stream_joins_to_the_whole_answer(server):
    fields = {"n": 2, "logprobs": True, "top_logprobs": 2, "temperature": 1.5}
    whole = chat(server, HELLO, **fields)
    chunks = chat(server, HELLO, **fields, stream=True, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        scores = [score for c in own if c["logprobs"] for score in c["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"]
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]


def test_log_probabilities_are_those_of_the_completion(server):
    text = WORLD.render([Message("user", "Hello!")])
    expected = server.complete(prompt=text, max_tokens=12, seed=3, logprobs=3)["choices"][0]["logprobs"]
    found = chat(server, HELLO, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert [score["logprob"] for score in found] == expected["token_logprobs"]
    assert [score["token"] for score in found] == expected["tokens"]
    for score, top in zip(found, expected["top_logprobs"], strict=True):
        assert len(score["top_logprobs"]) == 3
        assert {each["token"]: each["logprob"] for each in score["top_logprobs"]}.items() <= top.items()
    assert all(isinstance(score["bytes"], list) for score in found)
    assert chat(server, HELLO, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_content_may_be_a_list_of_texts_and_a_developer_is_the_system(server):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    assert chat(server, {"role": "user", "content": parts})["choices"] == chat(server, "Hel\nlo!")["choices"]
    answers = [chat(server, {"role": role, "content": "Be short."}, HELLO) for role in ("developer", "system")]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_harmless_fields_of_clients_change_nothing(server):
    fields = {"tools": [], "tool_choice": "none", "functions": None, "response_format": {"type": "text"}, "user": "me"}
    fields |= {"add_generation_prompt": True, "continue_final_message": False}
    fields |= {"modalities": ["text"], "store": False, "metadata": {}, "top_logprobs": 0, "parallel_tool_calls": True}
    message = HELLO | {"name": "Ann", "tool_calls": None}
    assert chat(server, message, **fields)["choices"] == chat(server, HELLO)["choices"]


def test_both_names_of_the_length(server):
    for fields, count in (
        ({"max_completion_tokens": 4}, 4),
        ({"max_completion_tokens": 4, "max_tokens": 2}, 4),
        ({"max_completion_tokens": None, "max_tokens": 2}, 2),
    ):
        assert chat(server, HELLO, **fields)["usage"]["completion_tokens"] == count


def test_the_list_of_models_names_the_template(server):
    models = server.call("/v1/models").json["data"]
    assert [each["chat_template"] for each in models] == ["world", None, None]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "Hello!"}, "messages", "a list of at least one message"),
        ({"messages": ["Hello!"]}, "messages[0]", "an object with role and content"),
        ({"messages": [HELLO, {"content": "x"}]}, "messages[1].role", "messages[1].role is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "one of system, developer, user"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "a string"),
        ({"messages": [HELLO | {"tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "'image_url'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "is no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages[0].content[0].text",
            "a string",
        ),
        ({"messages": [{"role": "user", "content": "xyz"}], "model": "plain"}, "messages", "'x' (U+0078)"),
        ({"messages": [{"role": "user", "content": ""}], "model": "plain"}, "messages", "the prompt is empty"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing; give a string"),
        (
            {"messages": [HELLO, {"role": "system", "content": None}]},
            "messages[1].content",
            "is missing; give a string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "is missing; give a string",
        ),
        ({"messages": [HELLO], "continue_final_message": True}, "continue_final_message", "not supported"),
        ({"messages": [HELLO], "add_generation_prompt": False}, "add_generation_prompt", "not supported"),
        ({"messages": [HELLO], "tools": [{}]}, "tools", "tools is not supported; leave tools out"),
        ({"messages": [HELLO], "tool_choice": "required"}, "tool_choice", "not supported"),
        ({"messages": [HELLO], "functions": [{}]}, "functions", "not supported"),
        ({"messages": [HELLO], "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": [HELLO], "modalities": ["audio"]}, "modalities", "not supported"),
        ({"messages": [HELLO], "state": 5}, "state", "a string"),
        ({"messages": [HELLO], "logprobs": 3}, "logprobs", "true or false"),
        ({"messages": [HELLO], "top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"messages": [HELLO], "logprobs": True, "top_logprobs": 21}, "top_logprobs", "to 20"),
        ({"messages": [HELLO], "max_completion_tokens": -1}, "max_completion_tokens", "from 0"),
        ({"messages": [HELLO], "temperature": -1}, "temperature", "at least 0"),
        ({"messages": [HELLO], "stream_options": {}}, "stream_options", "stream: true"),
    ],
)
def test_a_wrong_field_is_named(server, fields, param, words):
    answer = server.call(PATH, fields)
    assert answer.status == 400
    error = answer.json["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]


def test_messages_that_a_bounded_context_does_not_hold(server):
    body = {"model": "bounded", "messages": [{"role": "user", "content": "a" * 13}]}
    assert server.call(PATH, body).json["error"]["code"] == "context_length_exceeded"
    assert chat(server, "a" * 13, model="bounded", context="reanchor")["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    ("end", "tokenizer"), [("\n\nUser:", TOKENIZER), (0, TOKENIZER), ("\n\nUser:", ByteTokenizer())]
)
def test_a_state_continues_a_conversation(scripted, end, tokenizer):
    """Tokens of single bytes are many tokens for one stop string."""
    with scripted(" Hi.", end, " Bye.", end, tokenizer=tokenizer) as server:
        first = chat(server, "Hello!", return_state=True)["choices"][0]
        second = chat(server, "Well?", state=first["state"]["id"])
        step = server.models[0].engine.advance
        assert second["choices"][0]["message"]["content"] == "Bye."
        if end:
            body = {"messages": [{"role": "system", "content": "Short."}, HELLO], "state": first["state"]["id"]}
            answer = server.call(PATH, body)
            assert answer.status == 400
            assert "let messages begin with the role user" in answer.json["error"]["message"]
        text = "User: Hello!\n\nAssistant: Hi.\n\nUser: Well?\n\nAssistant: Bye."
        assert tokenizer.decode(step.read).startswith(text)
