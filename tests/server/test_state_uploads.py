"""Uploads of states from anyone: damaged, hostile, too large, or never complete."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.raw_http import connect, within
from tests.helpers.serving import served
from tests.helpers.states import OWN, assert_refused, same, session_after
from tests.helpers.tiers import examples
from timemix.generation.session import session_to_bytes
from timemix.server.app import Settings
from timemix.server.state_store import largest_file


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


def test_open_uploads_count_as_stored(model):
    most = largest_file(model)
    with served([same()], Settings(state_bytes=2 * most)) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            head = f"PUT /v1/states/{OWN} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n"
            stack.enter_context(connect(server)).sendall(head.encode())
        assert within(5, lambda: server.call(f"/v1/states/{OWN}", b"", "PUT").status == 429)
        assert server.call("/v1/completions", {"prompt": "a", "return_state": True}).status == 429
        stack.close()
        assert within(5, lambda: server.call(f"/v1/states/{OWN}", b"", "PUT").status == 400)
