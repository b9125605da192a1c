"""/openapi.json: it describes the routes that exist, the fields that are read, and the answers."""

import jsonschema_rs
import pytest
from starlette.routing import Route

from tests.helpers.openapi import DOCUMENT, check_answer, operations, resolved, validator
from tests.helpers.serving import served, tiny
from timemix.server.completions import UNSUPPORTED
from timemix.server.fields import Fields

READ_LATER = {
    "state",
    "return_state",
    "reuse_decoded",
    "presence_penalty",
    "frequency_penalty",
}
"""Fields that no handler reads yet."""
WORKING = {
    "/v1/completions": {"prompt": "ab", "stream": True, "logprobs": 2, "logit_bias": {"1": 2}, "stream_options": {}},
    "/v1/next_token": {"prompt": "ab"},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [0]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ab"}], "stream": True, "stream_options": {}},
    "/v1/states": {"prompt": "ab"},
}
"""A body for each path that takes one."""
ALSO_SAMPLING = ("/v1/next_token", "/v1/states")
"""Paths that check the fields of sampling, which change nothing there."""


@pytest.fixture(scope="module")
def server():
    with served([tiny(), tiny("bounded", "rwkv1")]) as running:
        yield running


def test_the_server_returns_the_document(server):
    answer = server.call("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == DOCUMENT


def test_routes_and_paths_agree(server):
    routes = [route for route in server.app.routes if isinstance(route, Route)]
    existing = {(method, route.path.replace(":path}", "}")) for route in routes for method in route.methods}
    existing = {(method, path) for method, path in existing if method != "HEAD"}
    assert existing == set(operations())


@pytest.mark.parametrize("path", sorted({path for _, path in operations()}))
def test_an_unknown_method_gets_the_methods_of_the_path(server, path):
    answer = server.call(path.replace("{id}", "a").replace("{name}", "a"), method="PATCH")
    methods = {method for method, own in operations() if own == path}
    assert answer.status == 405
    assert set(answer.headers["allow"].split(", ")) - {"HEAD"} == methods


def test_the_schemas_are_schemas():
    for name, schema in DOCUMENT["components"]["schemas"].items():
        jsonschema_rs.meta.validate(schema)
        validator(name)


def test_each_reference_leads_somewhere():
    def walk(part):
        if isinstance(part, dict):
            assert "$ref" not in part or resolved(part)
        for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            walk(each)

    walk(DOCUMENT)


def fields_of(schema):
    """Return the fields of a schema by name."""
    schema = resolved(schema)
    found = dict(schema.get("properties", {}))
    for part in schema.get("allOf", ()):
        found |= fields_of(part)
    return found


@pytest.mark.parametrize("path", list(WORKING))
def test_the_document_has_the_fields_that_are_read(server, path, monkeypatch):
    read, get = set(), Fields.get

    def noted(self, name):
        if "[" not in name:
            read.add(name)
        return get(self, name)

    monkeypatch.setattr(Fields, "get", noted)
    assert server.call(path, WORKING[path]).status == 200
    described = fields_of(DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])
    ignored = {name for name, field in described.items() if set(field) == {"description"}}
    options = set(described.get("stream_options", {}).get("properties", {}))
    assert set(described) - ignored - READ_LATER <= read
    if path not in ALSO_SAMPLING:
        assert read <= {*described, *options, *UNSUPPORTED, *WORKING[path].get("logit_bias", {})}


def test_each_field_of_a_request_has_a_description():
    for name, schema in DOCUMENT["components"]["schemas"].items():
        if name.endswith("Request") or name in ("Sampling", "Message"):
            for field, each in fields_of(schema).items():
                assert each.get("description") or resolved(each)["description"], f"{name}.{field}"


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (201, "application/json", b"{}"),
        (200, "text/html", b"{}"),
        (200, "application/json", b'{"prompt": 1}'),
        (200, "application/json", b'{"prompt": "a", "more": 1}'),
        (400, "application/json", b'{"error": "words"}'),
    ],
)
def test_an_answer_that_the_document_does_not_declare_is_found(status, kind, body):
    with pytest.raises((AssertionError, jsonschema_rs.ValidationError)):
        check_answer("POST", "/detokenize", status, {"Content-Type": kind}, body)
