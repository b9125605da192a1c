"""/v1/states, and completions that begin from a state and return one."""

import contextlib
import json
import os
import re
import socket
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.engines import alone
from tests.helpers.serving import served, tiny
from tests.helpers.tiers import examples
from timemix.generation.prefix_cache import PrefixCache
from timemix.generation.request import Request
from timemix.generation.session import load_session, save_session, session_from_bytes, session_to_bytes
from timemix.server.app import Settings
from timemix.server.state_store import largest_file

OWN = "state-" + "0" * 32


def same():
    """Return a model with the same random weights at each call."""
    torch.manual_seed(1)
    return tiny()


@pytest.fixture(scope="module")
def server():
    with served([same(), tiny("bounded", "rwkv1")]) as running:
        yield running


@pytest.fixture(scope="module")
def model(server):
    return server.models[0].engine.model


@pytest.fixture(scope="module")
def upload(model):
    """The content of a file with the state after a text."""
    return session_to_bytes(session_after(model, [0, 1, 2, 3]), model)


def session_after(model, prompt):
    (event,) = alone(model, Request(prompt, tokens=0, keep_session=True))
    return event.session


def read(server, prompt="abcab", **fields):
    """Return the description of a new state."""
    answer = server.call("/v1/states", {"prompt": prompt} | fields)
    assert answer.status == 200, answer.body
    return answer.json


def assert_refused(answer, status, param, words, code=None):
    error = answer.json["error"]
    assert (answer.status, error["param"], error["code"]) == (status, param, code), error
    assert words in error["message"]


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
    assert_refused(answer, 400, "prompt", "the state has 8, the prompt 5", "context_length_exceeded")
    answer = server.call("/v1/completions", body | {"prompt": "", "context": "error", "max_tokens": 5})
    assert_refused(answer, 400, "prompt", "the state has 8, the prompt 0 and 5 new tokens", "context_length_exceeded")
    long = body | {"context": "reanchor", "max_tokens": 30, "seed": 1}
    whole = server.complete(model="bounded", prompt="a" * 13, context="reanchor", max_tokens=30, seed=1)
    assert server.complete(**long)["usage"]["completion_tokens"] == 30
    assert whole["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("id", ["state-1", "state-" + "0" * 33, "state-" + "A" * 32, "x", "state-" + "0" * 31 + "%0a"])
def test_an_id_of_an_upload_has_128_bits(server, upload, id):
    answer = server.call(f"/v1/states/{id}", upload, "PUT")
    assert_refused(answer, 400, "id", "32 random hexadecimal digits")


@pytest.mark.parametrize("damage", ["empty", "short", "header", "zeros", "json", "changed", "large"])
def test_a_damaged_upload(server, model, upload, damage):
    middle = len(upload) - 40
    content = {
        "empty": b"",
        "short": upload[:-1],
        "header": (2**62).to_bytes(8, "little") + upload[8:],
        "zeros": bytes(len(upload)),
        "json": json.dumps({"a": 1}).encode(),
        "changed": upload[:middle] + bytes([upload[middle] ^ 1]) + upload[middle + 1 :],
        "large": upload + bytes(largest_file(model)),
    }[damage]
    answer = server.call(f"/v1/states/{OWN}", content, "PUT")
    if damage == "large":
        assert_refused(answer, 413, None, "larger than", "body_too_large")
    else:
        assert_refused(answer, 400, None, "damaged")
    assert server.call(f"/v1/states/{OWN}").status == 404


@examples(300)
@given(data=st.data())
def test_no_upload_breaks_the_server(server, model, upload, data):
    """Bytes changed anywhere, also in the header, with and without the checksum."""
    content = bytearray(upload)
    if data.draw(st.booleans()):
        content = content.replace(b'"crc32"', b'"crc33"')
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(content), len(content) - 8, 8, 100]))
    answer = server.call(f"/v1/states/{OWN}", bytes(content[:end]), "PUT")
    assert answer.status in (200, 400), answer.body
    if answer.status == 200:
        body = {"state": OWN, "prompt": "ab", "echo": True, "logprobs": 3, "max_tokens": 3}
        assert server.call("/v1/completions", body).status in (200, 400)


@pytest.mark.parametrize("value", [3e38, -3e38, 1e30])
def test_numbers_that_overflow_the_model(server, model, value):
    session = session_after(model, [0, 1, 2])
    state = session.state.clone()
    for layer in state.layers:
        for x in layer.values():
            x.fill_(value)
    content = session_to_bytes(replace(session, state=state), model)
    assert server.call(f"/v1/states/{OWN}", content, "PUT").status == 200
    for path, fields in (
        ("/v1/completions", {"prompt": "abc", "echo": True, "logprobs": 5, "max_tokens": 0}),
        ("/v1/completions", {"logprobs": 5, "return_state": True}),
        ("/v1/next_token", {}),
        ("/v1/states", {"prompt": "abc"}),
    ):
        answer = server.call(path, fields | {"state": OWN})
        assert answer.status in (200, 400)
        if answer.status == 400:
            assert_refused(answer, 400, "state", "not finite")


def test_numbers_that_are_not_finite(server, model):
    session = session_after(model, [0, 1, 2])
    state = session.state.clone()
    next(iter(state.layers[0].values())).view(-1)[0] = torch.nan
    answer = server.call(f"/v1/states/{OWN}", session_to_bytes(replace(session, state=state), model), "PUT")
    assert_refused(answer, 400, None, "not finite")


@pytest.mark.parametrize("name", ["tiny", "bounded"])
@pytest.mark.parametrize(
    "changes",
    [
        {"written": 2**63 - 1},
        {"held": "x" * 1000},
        {"held": "\ud800"},
        {"counts": {0: 2**63 - 1}},
        {"position": 0},
        {"position": 12},
        {"unread": 3},
        {"unread": 5000, "tokens": (0,) * 5000},
        {"tokens": (0,) * 5000},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_extreme_values_of_an_upload(server, name, changes):
    changes = dict(changes)
    model = next(each for each in server.models if each.name == name).engine.model
    session = session_after(model, [0, 1, 2])
    state = session.state.clone()
    state.position.fill_(changes.pop("position", 2))
    content = session_to_bytes(replace(session, state=state, **changes), model)
    answer = server.call(f"/v1/states/{OWN}?model={name}", content, "PUT")
    if changes.get("held") == "\ud800":
        assert_refused(answer, 400, None, "not Unicode")
        return
    assert answer.status == 200
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": 2}
    for path, fields in (
        ("/v1/completions", penalties | {"n": 2, "return_state": True, "context": "reanchor", "max_tokens": 20}),
        ("/v1/completions", {"context": "exact", "prompt": "abc", "echo": True, "logprobs": 2}),
        ("/v1/completions", {"context": "reanchor", "echo": True, "logprobs": 2, "max_tokens": 0}),
        ("/v1/next_token", {"context": "reanchor"}),
        ("/v1/states", {"context": "reanchor", "prompt": "ab"}),
    ):
        answer = server.call(path, fields | {"model": name, "state": OWN})
        assert answer.status == 200, answer.body
    assert server.call("/health").status == 200


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


def test_a_full_store_refuses_before_it_generates(model):
    most = 3 * largest_file(model)
    with served([same()], Settings(state_bytes=most)) as server:
        state = read(server)
        body = {"prompt": "a", "max_tokens": 1, "return_state": True}
        assert_full(server.call("/v1/completions", body | {"n": 3}))
        assert server.models[0].metrics.generated_tokens == 0
        stored = [state]
        with contextlib.suppress(AssertionError):
            while True:
                stored.append(read(server))
        assert sum(each["bytes"] for each in stored) <= most
        assert_full(server.call("/v1/states", {"prompt": "a"}))
        assert_full(server.call("/v1/completions", body))
        assert_full(server.call(f"/v1/states/{OWN}", b"", "PUT"))
        while server.call(f"/v1/states/{state['id']}/fork", {}).status == 200:
            pass
        assert_full(server.call(f"/v1/states/{state['id']}/fork", {}))
        found = server.call("/v1/states").json["data"]
        assert sum(each["bytes"] for each in found) <= most
        for each in found:
            server.call(f"/v1/states/{each['id']}", method="DELETE")
        assert read(server)["tokens"] == 5


def assert_full(answer):
    assert_refused(answer, 429, None, "the storage for states is full", "state_storage_full")


def test_open_uploads_count_as_stored(model):
    most = largest_file(model)
    with served([same()], Settings(state_bytes=2 * most)) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            head = f"PUT /v1/states/{OWN} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n"
            stack.enter_context(socket.create_connection(address(server))).sendall(head.encode())
        until(lambda: server.call(f"/v1/states/{OWN}", b"", "PUT").status == 429)
        assert server.call("/v1/completions", {"prompt": "a", "return_state": True}).status == 429
        stack.close()
        until(lambda: server.call(f"/v1/states/{OWN}", b"", "PUT").status == 400)


def test_a_client_that_leaves_ends_the_reading(server):
    engine, before = server.models[0].engine, server.call("/v1/states").json
    body = json.dumps({"prompt": "abcdefghijk" * 20_000}).encode()
    head = f"POST /v1/states HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(address(server)) as client:
        client.sendall(head + body)
        until(lambda: engine.busy)
    until(lambda: not engine.busy)
    assert server.call("/v1/states").json == before


def address(server):
    return "127.0.0.1", int(server.url.rpartition(":")[2])


def until(holds, seconds=5.0):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_states_in_a_folder_survive_a_restart(tmp_path):
    settings = Settings(state_dir=tmp_path / "states", keys=["one", "two"])
    key, body = {"Authorization": "Bearer one"}, {"seed": 1, "max_tokens": 6}
    with served([same()], settings) as server:
        state = server.call("/v1/states", {"prompt": "abcab", "name": "a\nb"}, **key).json
        expected = server.call("/v1/completions", {"prompt": "abcab"} | body, **key).json["choices"]
        content = server.call(f"/v1/states/{state['id']}", **key).body
    (path,) = (tmp_path / "states").glob("*/*")
    assert path.name == state["id"]
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    with served([same()], settings) as server:
        assert server.app.state.service.states.nbytes == state["bytes"]
        assert server.call("/v1/states", **key).json["data"] == [state]
        assert server.call("/v1/states", Authorization="Bearer two").json["data"] == []
        assert server.call("/v1/completions", {"state": state["id"]} | body, **key).json["choices"] == expected
        assert server.call(f"/v1/states/{state['id']}", **key).body == content
        server.call(f"/v1/states/{state['id']}", method="DELETE", **key)
        assert not path.exists()
        assert server.app.state.service.states.nbytes == 0


def test_damaged_files_are_reported_and_left_out(tmp_path, capsys):
    settings = Settings(state_dir=tmp_path)
    with served([same()], settings) as server:
        states = [read(server, name=str(number)) for number in range(5)]
    folder = tmp_path / "no-key"
    short, junk, wrong, inner, good = (folder / each["id"] for each in states)
    short.write_bytes(short.read_bytes()[:-1])
    junk.write_bytes(b"\xff" * 10_000)
    wrong.write_bytes(wrong.read_bytes().replace(b'"tokens": 5', b'"tokens": -'))
    inner.write_bytes(inner.read_bytes()[:-1] + b"\x01")
    (folder / "notes.txt").write_text("not a state")
    (folder / OWN).mkdir()
    capsys.readouterr()
    with served([same()], settings) as server:
        found = server.call("/v1/states").json["data"]
        assert {each["id"] for each in found} == {inner.name, good.name}
        reported = capsys.readouterr().err
        assert sorted(re.findall(r"state-\w+", reported)) == sorted([short.name, junk.name, wrong.name, OWN])
        answer = server.call("/v1/completions", {"state": inner.name})
        assert_refused(answer, 400, "state", "content differs from its checksum")
        assert server.complete(state=good.name, max_tokens=1)["usage"]["completion_tokens"] == 1


def test_two_servers_share_a_folder(tmp_path):
    settings = Settings(state_dir=tmp_path)
    with served([same()], settings) as one, served([same()], settings) as two:
        state = read(one)["id"]
        body = {"state": state, "seed": 1, "max_tokens": 6}
        assert two.complete(**body)["choices"] == one.complete(**body)["choices"]
        assert two.call(f"/v1/states/{state}", method="DELETE").status == 200
        assert one.call(f"/v1/states/{state}").status == 404
        assert one.call("/v1/states").json["data"] == []
        assert one.app.state.service.states.nbytes == 0


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    from timemix.storage import files

    def no_space(path):
        raise OSError(28, "No space left on device")

    with served([same()], Settings(state_dir=tmp_path)) as server:
        state = read(server)
        monkeypatch.setattr(files, "_sync", no_space)
        answer = server.call("/v1/states", {"prompt": "abc"})
        assert_refused(answer, 429, None, "its disk is full", "state_storage_full")
        assert str(tmp_path) not in answer.json["error"]["message"]
        assert "no space left" in capsys.readouterr().err
        monkeypatch.undo()
        assert [each["id"] for each in server.call("/v1/states").json["data"]] == [state["id"]]
        assert server.app.state.service.states.nbytes == state["bytes"]
        assert [path.name for path in tmp_path.glob("*/*")] == [state["id"]]


def test_requests_share_the_session_of_a_state(server):
    states = server.app.state.service.states
    id = read(server)["id"]
    one, two = (states.session("", id, server.models[0]) for _ in range(2))
    assert one is two


def test_session_bytes_stay_what_they_were(server, model, upload):
    """A request from a state does not change the state."""
    server.call(f"/v1/states/{OWN}", upload, "PUT")
    server.complete(state=OWN, max_tokens=9, n=4)
    assert server.call(f"/v1/states/{OWN}").body == upload
    assert session_from_bytes(upload, model).unread == 1


LONG = "abcdefghijk" * 60


@pytest.fixture
def cached():
    """A server with a cache of states, and with two keys."""
    torch.manual_seed(1)
    models = [tiny(cache=PrefixCache(10**6)), tiny("bounded", "rwkv1", cache=PrefixCache(10**6))]
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
    cache = cached.models[0].engine.cache
    assert found['timemix_state_cache_bytes{model="tiny"}'] == str(cache.nbytes)
    assert found['timemix_state_cache_entries{model="tiny"}'] == str(len(cache))
    assert (found["timemix_states_stored{}"], found["timemix_states_bytes{}"]) == ("1", str(state["bytes"]))


def test_an_answer_reports_where_the_context_was_restarted(server):
    body = {"model": "bounded", "prompt": "a" * 10, "max_tokens": 20, "seed": 1, "context": "reanchor"}
    # The context has 12 tokens. A restart keeps the newest 6 tokens, which gives room for 7 draws.
    restarts = server.complete(**body)["choices"][0]["restarts"]
    assert restarts == [3, 10, 17]
    chunks = server.call("/v1/completions", body | {"stream": True}).events
    assert [x for chunk in chunks for c in chunk["choices"] for x in c.get("restarts", [])] == restarts
    assert "restarts" not in server.complete(**body | {"max_tokens": 2})["choices"][0]
