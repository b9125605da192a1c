"""/v1/states, and completions that begin from a state and return one."""

import os
import re

import pytest

from tests.helpers.engines import alone
from tests.helpers.raw_http import post, within
from tests.helpers.serving import served
from tests.helpers.states import OWN, assert_refused, read, same, session_after
from timemix.generation.request import Request
from timemix.generation.session import load_session, save_session, session_to_bytes
from timemix.server.app import Settings


def test_a_text_is_read_once_and_continued_often(server):
    state = read(server, "abcabcdefgh" * 20, name="chapter 1")
    assert re.fullmatch(r"state-[0-9a-f]{32}", state["id"])
    assert (state["object"], state["model"], state["name"], state["parent"]) == ("state", "tiny", "chapter 1", None)
    assert state["tokens"] == 220
    before = server.models[0].metrics.prompt_tokens
    for fields in ({"seed": 1}, {"seed": 2, "n": 3}, {"seed": 3, "stop": ["d", "ab"]}, {"seed": 4, "logprobs": 2}):
        fields |= {"max_tokens": 8}
        answer = server.complete(state=state["id"], **fields)
        assert answer["usage"]["prompt_tokens"] == 0
        assert answer["choices"] == server.complete(prompt="abcabcdefgh" * 20, **fields)["choices"]
    # The four calls from the state read no prompt.
    assert server.models[0].metrics.prompt_tokens - before == 4 * 220


def test_the_prompt_continues_the_state(server):
    state = read(server, "abc")["id"]
    whole = server.complete(prompt="abcde", seed=3, max_tokens=9, logprobs=1, echo=True)["choices"][0]
    part = server.complete(state=state, prompt="de", seed=3, max_tokens=9, logprobs=1, echo=True)
    assert part["usage"]["prompt_tokens"] == 2
    choice = part["choices"][0]
    assert choice["text"] == whole["text"][3:]
    assert choice["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][3:]
    assert choice["logprobs"]["tokens"][:2] == ["d", "e"]
    again = read(server, "de", state=state)
    assert (again["parent"], again["tokens"]) == (state, 5)
    assert server.complete(state=again["id"], seed=3, max_tokens=9)["choices"][0]["text"] == whole["text"][5:]


@pytest.mark.parametrize("prompt", [None, "", []])
def test_a_state_needs_no_prompt(server, prompt):
    body = {"state": read(server)["id"], "prompt": prompt, "seed": 1, "max_tokens": 4}
    assert server.complete(**body)["choices"] == server.complete(prompt="abcab", seed=1, max_tokens=4)["choices"]


def test_answers_join_to_the_answer_of_one_call(server):
    body = {"seed": 9, "temperature": 1.5, "repetition_penalty": 1.3, "top_k": 6}
    whole = server.complete(prompt="abc", max_tokens=30, **body)["choices"][0]["text"]
    found = server.complete(prompt="abc", max_tokens=10, return_state=True, **body)["choices"][0]
    text = found["text"]
    for _ in range(2):
        parent = found["state"]["id"]
        found = server.complete(state=parent, max_tokens=10, return_state=True, **body)["choices"][0]
        assert found["state"]["parent"] == parent
        text += found["text"]
    assert text == whole
    assert found["state"]["tokens"] == 33


def test_a_stream_returns_each_choices_state_in_its_last_chunk(server):
    body = {"prompt": "abc", "seed": 5, "n": 3, "max_tokens": 6, "return_state": True}
    chunks = [c for chunk in server.call("/v1/completions", body | {"stream": True}).events for c in chunk["choices"]]
    last = {c["index"]: c["state"]["id"] for c in chunks if c["finish_reason"]}
    assert [c["finish_reason"] for c in chunks if "state" in c] == ["length"] * 3
    assert len(set(last.values())) == 3
    whole = server.complete(**body)["choices"]
    for choice in whole:
        texts = [
            server.complete(state=id, seed=5, max_tokens=6)["choices"][0]["text"]
            for id in (last[choice["index"]], choice["state"]["id"])
        ]
        assert texts[0] == texts[1]


def test_a_state_holds_back_what_may_begin_a_stop_string(server):
    body = {"seed": 6, "temperature": 2}
    whole = server.complete(prompt="abc", max_tokens=12, **body)["choices"][0]["text"]
    # The first part ends inside the stop string, which the second part completes.
    stop = whole[4:7]
    assert whole.index(stop) == 4
    first = server.complete(prompt="abc", max_tokens=6, stop=stop, return_state=True, **body)["choices"][0]
    assert (first["text"], first["finish_reason"]) == (whole[:4], "length")
    id = first["state"]["id"]
    assert server.complete(state=id, max_tokens=6, **body)["choices"][0]["text"] == whole[4:]
    second = server.complete(state=id, max_tokens=6, stop=stop, **body)["choices"][0]
    assert (second["text"], second["finish_reason"]) == ("", "stop")


def test_a_state_after_a_stop_string_continues_after_it(server):
    body = {"seed": 6, "temperature": 2}
    whole = server.complete(prompt="abc", max_tokens=12, **body)["choices"][0]["text"]
    first = server.complete(prompt="abc", max_tokens=12, stop=whole[4:7], return_state=True, **body)["choices"][0]
    assert (first["text"], first["finish_reason"]) == (whole[:4], "stop")
    assert first["state"]["tokens"] == 3 + 7
    assert server.complete(state=first["state"]["id"], max_tokens=5, **body)["choices"][0]["text"] == whole[7:]


def test_the_next_token_after_a_state(server):
    direct = server.call("/v1/next_token", {"prompt": "abcde", "top": 5}).json
    state = read(server, "abc")["id"]
    assert server.call("/v1/next_token", {"state": state, "prompt": "de", "top": 5}).json == direct
    assert server.call("/v1/next_token", {"state": read(server, "abcde")["id"], "top": 5}).json == direct


def test_list_fork_and_delete(server):
    state = read(server, name="one")
    answer = server.call(f"/v1/states/{state['id']}/fork", {"name": "two"})
    fork = answer.json
    assert fork == state | {"id": fork["id"], "name": "two", "parent": state["id"], "created": fork["created"]}
    assert server.call(f"/v1/states/{state['id']}/fork", b"").json["name"] is None
    listed = server.call("/v1/states").json
    assert listed["object"] == "list"
    assert [each for each in listed["data"] if each["id"] in (state["id"], fork["id"])] == [state, fork]
    deleted = server.call(f"/v1/states/{state['id']}", method="DELETE")
    assert deleted.json == {"id": state["id"], "object": "state", "deleted": True}
    body = {"seed": 1, "max_tokens": 4}
    expected = server.complete(prompt="abcab", **body)["choices"]
    assert server.complete(state=fork["id"], **body)["choices"] == expected
    for path, method in (("", "GET"), ("", "DELETE"), ("/fork", "POST")):
        answer = server.call(f"/v1/states/{state['id']}{path}", b"" if method == "POST" else None, method)
        assert_refused(answer, 404, "state", "there is no state", "state_not_found")
    answer = server.call("/v1/completions", {"state": state["id"]})
    assert_refused(answer, 404, "state", "there is no state", "state_not_found")


@pytest.mark.parametrize(
    ("path", "methods"), [("", "GET HEAD POST"), (f"/{OWN}", "DELETE GET HEAD PUT"), (f"/{OWN}/fork", "POST")]
)
def test_another_method_is_refused_with_the_right_ones(server, path, methods):
    answer = server.call(f"/v1/states{path}", method="PATCH")
    assert answer.status == 405
    assert " ".join(sorted(answer.headers["allow"].split(", "))) == methods


def test_a_file_moves_between_the_api_and_python(server, model, tmp_path):
    state = read(server)
    file = server.call(f"/v1/states/{state['id']}")
    assert len(file.body) == state["bytes"]
    assert file.headers["content-type"] == "application/octet-stream"
    (tmp_path / "from.state").write_bytes(file.body)
    session = load_session(tmp_path / "from.state", model)
    (event, *_) = alone(model, Request([], tokens=1, start=session, seed=2))
    assert server.complete(state=state["id"], max_tokens=1, seed=2)["choices"][0]["text"] == event.text
    save_session(session, tmp_path / "to.state", model)
    assert (tmp_path / "to.state").read_bytes() == file.body
    own = f"state-{os.urandom(16).hex()}"
    put = server.call(f"/v1/states/{own}?name=back", file.body, "PUT")
    assert (put.status, put.json) == (200, state | {"id": own, "name": "back", "created": put.json["created"]})
    assert server.call(f"/v1/states/{own}").body == file.body
    # A second upload replaces the first.
    other = session_to_bytes(session_after(model, [5]), model)
    assert server.call(f"/v1/states/{own}", other, "PUT").json["tokens"] == 1
    assert server.call(f"/v1/states/{own}").body == other
    text = server.complete(state=own, max_tokens=5, seed=2)["choices"]
    assert text == server.complete(prompt="f", max_tokens=5, seed=2)["choices"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/completions", {"state": 5}, "state", "must be a string"),
        ("/v1/completions", {"state": "x" * 99, "prompt": "a"}, "state", "'xxx"),
        ("/v1/completions", {"prompt": "a", "return_state": 1}, "return_state", "true or false"),
        ("/v1/completions", {"return_state": True}, "prompt", "prompt is missing"),
        ("/v1/states", {}, "prompt", "prompt is missing"),
        ("/v1/states", {"prompt": ["a", "b"]}, "prompt", "give one"),
        ("/v1/states", {"prompt": "xyz"}, "prompt", "'x' (U+0078)"),
        ("/v1/states", {"prompt": "a", "name": "n" * 201}, "name", "at most 200"),
        ("/v1/states", {"prompt": "a", "name": 5}, "name", "a string"),
        ("/v1/states", {"prompt": "a" * 13, "model": "bounded"}, "prompt", "12 tokens"),
    ],
)
def test_a_wrong_field_is_named(server, path, body, param, words):
    answer = server.call(path, body)
    assert answer.status == (404 if body.get("state") == "x" * 99 else 400)
    assert answer.json["error"]["param"] == param
    assert words in answer.json["error"]["message"]


def test_a_state_of_another_model(server, upload):
    state = read(server, "abc", model="bounded")["id"]
    assert_refused(server.call("/v1/completions", {"state": state}), 400, "state", "belongs to the model bounded")
    assert server.complete(model="bounded", state=state, max_tokens=2)["usage"]["completion_tokens"] == 2
    answer = server.call(f"/v1/states/{OWN}?model=bounded", upload, "PUT")
    assert_refused(answer, 400, None, "a session of another model (rwkv7)")
    answer = server.call(f"/v1/states/{OWN}?model=gpt", upload, "PUT")
    assert_refused(answer, 404, "model", "there is no model 'gpt'", "model_not_found")


def test_the_state_counts_in_a_bounded_context(server):
    state = read(server, "a" * 8, model="bounded")["id"]
    body = {"model": "bounded", "state": state, "prompt": "a" * 5}
    answer = server.call("/v1/completions", body)
    assert_refused(answer, 400, "prompt", "the state has 8 and the prompt has 5", "context_length_exceeded")
    answer = server.call("/v1/completions", body | {"prompt": "", "context": "error", "max_tokens": 5})
    assert_refused(
        answer, 400, "prompt", "the state has 8 and the prompt has 0 and max_tokens is 5", "context_length_exceeded"
    )
    long = body | {"context": "reanchor", "max_tokens": 30, "seed": 1}
    whole = server.complete(model="bounded", prompt="a" * 13, context="reanchor", max_tokens=30, seed=1)
    assert server.complete(**long)["usage"]["completion_tokens"] == 30
    assert whole["usage"]["completion_tokens"] == 30


def test_each_key_has_its_own_states(upload):
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    with served([same()], Settings(keys=["one", "two"])) as server:
        assert server.call("/v1/states").status == 401
        state = server.call("/v1/states", {"prompt": "abc"}, **one).json["id"]
        assert server.call("/v1/states", **two).json["data"] == []
        for path, body, method in (
            (f"/v1/states/{state}", None, "GET"),
            (f"/v1/states/{state}", None, "DELETE"),
            (f"/v1/states/{state}/fork", {}, "POST"),
            ("/v1/completions", {"state": state}, "POST"),
            ("/v1/next_token", {"state": state}, "POST"),
            ("/v1/states", {"state": state, "prompt": "a"}, "POST"),
        ):
            answer = server.call(path, body, method, **two)
            assert_refused(answer, 404, "state", "there is no state", "state_not_found")
        assert server.call(f"/v1/states/{state}", upload, "PUT", **two).status == 200
        assert server.call(f"/v1/states/{state}", **two).body == upload
        assert server.call(f"/v1/states/{state}", **one).body != upload


def test_a_client_that_leaves_ends_the_reading(server):
    engine, before = server.models[0].engine, server.call("/v1/states").json
    with post(server, "/v1/states", {"prompt": "abcdefghijk" * 20_000}):
        assert within(5, lambda: engine.busy)
    assert within(5, lambda: not engine.busy)
    assert server.call("/v1/states").json == before


def test_a_request_does_not_change_its_state(server, upload):
    server.call(f"/v1/states/{OWN}", upload, "PUT")
    server.complete(state=OWN, max_tokens=9, n=4)
    assert server.call(f"/v1/states/{OWN}").body == upload


@pytest.mark.parametrize("first", range(1, 20))
def test_a_state_that_fills_a_bounded_context_can_be_continued(server, first):
    body = {"model": "bounded", "seed": 1, "return_state": True}
    whole = server.complete(prompt="abc", max_tokens=20, **body)["choices"][0]["text"]
    begun = server.complete(prompt="abc", max_tokens=first, **body)["choices"][0]
    state = begun["state"]["id"]
    rest = server.complete(state=state, max_tokens=20 - first, **body)["choices"][0]
    assert begun["text"] + rest["text"] == whole
    assert server.call("/v1/next_token", {"model": "bounded", "state": state}).status == 200


def test_an_answer_reports_where_the_context_was_restarted(server):
    body = {"model": "bounded", "prompt": "a" * 10, "max_tokens": 20, "seed": 1, "context": "reanchor"}
    # The context has 12 tokens. A restart keeps the newest 6 tokens, which gives room for 7 draws.
    restarts = server.complete(**body)["choices"][0]["restarts"]
    assert restarts == [3, 10, 17]
    chunks = server.call("/v1/completions", body | {"stream": True}).events
    assert [x for chunk in chunks for c in chunk["choices"] for x in c.get("restarts", [])] == restarts
    assert "restarts" not in server.complete(**body | {"max_tokens": 2})["choices"][0]
