"""Arbitrary requests: each gets an answer that openapi.json declares, and the fields obey its schemas."""

import http.client
import json
import random
import string
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.openapi import operations, validator
from tests.helpers.serving import served, tiny
from tests.helpers.tiers import examples
from timemix.server.errors import ApiError
from timemix.server.fields import Fields

REQUESTS = 20_000
"""Number of requests that clients send at once, in `make test-all`."""
BODIES = 2_000
"""Number of bodies of /v1/completions with wrong fields in `make test-all`."""
OTHERS = 500
"""Number of requests of each other kind in `make test-all`."""

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-2, 20) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)
PROMPT = st.text("abcdefghijk", min_size=1, max_size=12)
IDS = st.lists(st.integers(0, 10), min_size=1, max_size=12)
FIELDS = {
    "prompt": PROMPT | IDS | st.lists(PROMPT | IDS, min_size=1, max_size=3),
    "model": st.sampled_from(["tiny", "", None]),
    "max_tokens": st.integers(0, 6),
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "temperature": st.floats(0, 1e299),
    "top_k": st.integers(0, 2**70),
    "top_p": st.floats(0, 1, exclude_min=True),
    "min_p": st.floats(0, 1),
    "top_a": st.floats(0, 1),
    "top_a_power": st.floats(0, 1e299),
    "repetition_penalty": st.floats(0, 1e299, exclude_min=True),
    "logit_bias": st.dictionaries(st.integers(0, 10).map(str), st.floats(-1e299, 1e299), max_size=11),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text("abc", min_size=1, max_size=3), max_size=16),
    "stop_token_ids": st.lists(st.integers(0, 10), max_size=16),
    "ignore_eos": st.booleans(),
    "echo": st.booleans(),
    "logprobs": st.integers(0, 20),
    "return_token_ids": st.booleans(),
    "stream": st.booleans(),
    "context": st.sampled_from(["reanchor", "exact", "error"]),
    "best_of": st.just(1),
    "suffix": st.just(""),
    "response_format": st.just({"type": "text"}),
    "user": JSON,
}
OUTSIDE_THE_SCHEMA = {"prompt", "model", "logit_bias", "stop_token_ids", "stream_options", "state"}
"""Fields whose values also depend on the model, on other fields or on the states of the server."""


@st.composite
def right_bodies(draw):
    """Draw a body of /v1/completions that the server accepts."""
    names = draw(st.sets(st.sampled_from(sorted(FIELDS)))) | {"prompt"}
    body = {name: draw(FIELDS[name] if name == "prompt" else st.none() | FIELDS[name]) for name in sorted(names)}
    if body.get("stream") and draw(st.booleans()):
        body["stream_options"] = {"include_usage": draw(st.booleans())}
    return body


@st.composite
def wrong_bodies(draw):
    """Draw a body of /v1/completions in which some fields have any value."""
    body = draw(right_bodies())
    for name in draw(st.lists(st.sampled_from([*FIELDS, "stream_options"]), min_size=1, max_size=3)):
        body[name] = draw(JSON)
    if draw(st.integers(0, 9)) == 0:
        del body["prompt"]
    tokens = body.get("max_tokens")
    if isinstance(tokens, int | float) and 6 < tokens <= 1_000_000:
        body["max_tokens"] = 6
    return body


@pytest.fixture(scope="module")
def server():
    with served([tiny(), tiny("bounded", "rwkv1")]) as running:
        yield running
        waited = time.monotonic()
        while any(each.engine.busy for each in running.models):
            assert time.monotonic() - waited < 10, "a request still runs after its answer"


@given(body=right_bodies())
@examples(OTHERS)
def test_a_right_body_is_accepted_and_described(server, body):
    validator("CompletionRequest").validate(body)
    answer = server.call("/v1/completions", body)
    assert answer.status == 200, answer.body


@given(body=wrong_bodies())
@examples(BODIES)
def test_the_server_refuses_what_the_schema_refuses(server, body):
    answer = server.call("/v1/completions", body)
    if not validator("CompletionRequest").is_valid(body):
        assert answer.status in (400, 404), answer.body
    elif answer.status != 200:
        assert answer.json["error"]["param"] in OUTSIDE_THE_SCHEMA, answer.body


def drawn(strategy, count):
    """Return values of a strategy."""
    found = []

    @given(value=strategy)
    @settings(max_examples=count, deadline=None, database=None)
    def draw(value):
        found.append(value)

    draw()
    return found


def combined(chosen, rights, values):
    """Return a body from the fields of right bodies, in which up to three fields have any value."""
    body = chosen.choice(rights) | chosen.choice(rights)
    for name in chosen.sample([*FIELDS, "stream_options"], chosen.choice([0, 0, 1, 2, 3])):
        body[name] = chosen.choice(values)
    for name, most in (("max_tokens", 3), ("n", 2)):
        if isinstance(body.get(name), int | float) and most < body[name] <= 1_000_000:
            body[name] = most
    return body


@pytest.mark.slow
def test_clients_that_send_combinations_of_fields_at_once(server):
    rights, values = drawn(right_bodies(), 150), drawn(JSON, 300)
    host = server.url.removeprefix("http://")

    def client(seed):
        chosen, statuses = random.Random(seed), Counter()
        connection = http.client.HTTPConnection(host, timeout=60)
        for _ in range(REQUESTS // 4):
            connection.request("POST", "/v1/completions", json.dumps(combined(chosen, rights, values)))
            answer = connection.getresponse()
            content = answer.read()
            statuses[answer.status] += 1
            if answer.status != 200:
                assert validator("Error").is_valid(json.loads(content)), content
        connection.close()
        return statuses

    with ThreadPoolExecutor(4) as threads:
        statuses = sum(threads.map(client, range(4)), Counter())
    assert statuses.total() == REQUESTS
    assert set(statuses) <= {200, 400, 404}
    assert min(statuses[200], statuses[400]) > REQUESTS / 10


@pytest.mark.parametrize("path", ["/v1/next_token", "/tokenize", "/detokenize"])
@given(
    body=st.fixed_dictionaries(
        {},
        optional={
            "prompt": JSON | PROMPT | IDS,
            "model": st.none() | st.just("bounded") | JSON,
            "tokens": JSON | IDS,
            "top": JSON | st.integers(1, 1000),
            "report_unknown": JSON | st.booleans(),
        },
    )
)
@examples(OTHERS)
def test_bodies_of_other_paths(server, path, body):
    assert server.call(path, body).status in (200, 400, 404)


@st.composite
def raw_bodies(draw):
    """Draw bytes, or the JSON of a body with a change anywhere."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=60))
    text = json.dumps(draw(right_bodies()) | {"user": draw(st.text(max_size=5))}, ensure_ascii=draw(st.booleans()))
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    at = draw(st.integers(0, len(data)))
    data[at : at + draw(st.integers(0, 3))] = draw(
        st.sampled_from([b"", b"\xff", b"NaN", b'"', b"{", b"\\ud800", b","])
    )
    return bytes(data)


@pytest.mark.parametrize("path", [path for method, path in operations() if method == "POST"])
@given(body=raw_bodies())
@examples(OTHERS // 2)
def test_bodies_that_are_no_json(server, path, body):
    answer = server.call(path, body)
    assert answer.status in (200, 400, 404)


@given(
    path=st.text(string.ascii_letters + string.digits + "/-_.~%", max_size=20).map(lambda rest: f"/{rest}")
    | st.sampled_from([path for _, path in operations()]),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"]),
)
@examples(OTHERS)
def test_other_paths_and_methods(server, path, method):
    answer = server.call(path.replace("%", "%25"), method=method)
    assert answer.status in (200, 400, 404, 405, 307)
    if answer.status in (404, 405) and method != "HEAD":
        validator("Error").validate(answer.json)


READERS = {
    "text": lambda fields: fields.text("x"),
    "flag": lambda fields: fields.flag("x"),
    "integer": lambda fields: fields.integer("x", 1, 0, 5),
    "number": lambda fields: fields.number("x", 1.0),
    "one_of": lambda fields: fields.one_of("x", "a", ("a", "b")),
    "ids": lambda fields: fields.ids("x"),
    "texts": lambda fields: fields.texts("x", 3),
    "unsupported": lambda fields: fields.unsupported("x", (1, False, {"type": "text"})),
}


@pytest.mark.parametrize("reader", READERS)
@given(value=JSON | st.text())
@examples(500)
def test_a_reader_returns_a_value_or_names_the_field(reader, value):
    found, error = None, None
    try:
        found = READERS[reader](Fields({"x": value}))
    except ApiError as raised:
        error = raised
    if error is not None:
        assert (error.status, error.param) == (400, "x")
        assert error.message.startswith("x ")
        assert len(error.message) < 200
        assert value is not None
    elif reader in ("text", "flag", "integer", "number") and value is not None:
        # A number is a float, which rounds whole numbers above 2^53.
        assert found == (float(value) if reader == "number" else value)
        assert isinstance(found, bool) == isinstance(value, bool)
