"""The description of the API in openapi.json, and checks of answers against it."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs

import timemix.server

DOCUMENT: dict[str, Any] = json.loads((Path(timemix.server.__file__).parent / "openapi.json").read_text())
CHUNKS = {"/v1/completions": "CompletionChunk", "/v1/chat/completions": "ChatChunk"}
"""Schema of the data of the events of a stream, by path."""


def operations() -> list[tuple[str, str]]:
    """Return method and path of each operation that exists."""
    found = ((method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item)
    return [(method, path) for method, path in found if method != "PARAMETERS"]


@functools.cache
def validator(name: str) -> Any:
    """Return the validator of a schema of the document."""
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})


def resolved(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of the document, or the part to which it refers."""
    if "$ref" not in part:
        return part
    found: Any = DOCUMENT
    for name in part["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return found


def operation_of(method: str, url: str) -> tuple[str, dict[str, Any]] | None:
    """Return path and operation of a request, or None if the document has none."""
    for own, path in operations():
        if own == method and re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)), url.partition("?")[0]):
            return path, DOCUMENT["paths"][path][method.lower()]
    return None


def check_answer(method: str, url: str, status: int, headers: dict[str, str], body: bytes) -> None:
    """Check that the document declares an answer: its status, its type and its content."""
    found = operation_of(method, url)
    if found is None:
        return
    path, operation = found
    assert str(status) in operation["responses"], f"{method} {path} does not declare status {status}: {body[:300]!r}"
    declared = resolved(operation["responses"][str(status)])
    kind = {name.lower(): value for name, value in headers.items()}["content-type"].partition(";")[0]
    assert kind in declared["content"], f"{method} {path} does not declare {kind} for status {status}"
    if kind == "application/json":
        schema = declared["content"][kind]["schema"]
        jsonschema_rs.validate(schema | {"components": DOCUMENT["components"]}, json.loads(body))
    if kind == "text/event-stream":
        for event in re.findall(r"^data: (\{.*)$", body.decode(), re.MULTILINE):
            data = json.loads(event)
            validator("Error" if "error" in data else CHUNKS[path]).validate(data)
