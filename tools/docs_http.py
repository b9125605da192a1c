"""Write the page of the HTTP API from the description of the server, timemix/server/openapi.json."""

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timemix.server

DOCUMENT: dict[str, Any] = json.loads((Path(timemix.server.__file__).parent / "openapi.json").read_text("utf-8"))
BODY = "application/json"


def http_page() -> str:
    """Return the Markdown of the page."""
    return "\n".join(_page())


def _page() -> Iterator[str]:
    """Yield the page: each operation by its tag, then the objects to which operations refer."""
    yield "# HTTP API\n"
    yield f"{_text(DOCUMENT['info']['description'])}\n"
    yield "`timemix serve` answers these requests. `GET /openapi.json` returns the same description for programs. If"
    yield "the server has API keys, a request needs the header `Authorization: Bearer KEY`.\n"
    for tag in DOCUMENT["tags"]:
        yield f"## {tag['name']}\n\n{tag['description']}\n"
        for path, item in DOCUMENT["paths"].items():
            for method, operation in item.items():
                if method != "parameters" and tag["name"] in operation["tags"]:
                    yield from _operation(method.upper(), path, operation, item.get("parameters", []))
    yield "## Errors\n\nEach of these answers is an [Error](#error), apart from status 503 of `/health`.\n"
    yield "| status | meaning |\n| --- | --- |"
    yield from (f"| {status} | {meaning} |" for status, meaning in sorted(_errors().items()))
    yield "\n## Objects\n"
    for name, schema in DOCUMENT["components"]["schemas"].items():
        if _fields(schema) and not name.endswith(("Request", "Sampling")):
            yield f"### {name}\n\n{_text(schema.get('description', ''))}\n"
            yield from _table(schema)


def _operation(method: str, path: str, operation: dict[str, Any], shared: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the section of one operation."""
    words = f"{_text(operation['summary'])} {_text(operation.get('description', ''))}".strip()
    yield f"### {method} {path}\n\n{words}\n"
    parameters = [_resolved(each) for each in (*shared, *operation.get("parameters", []))]
    if operation.get("security") == [{}]:
        yield "This request needs no API key.\n"
    if parameters:
        yield "| parameter | place | meaning |\n| --- | --- | --- |"
        yield from (f"| `{each['name']}` | {each['in']} | {_text(each['description'])} |" for each in parameters)
        yield ""
    body = operation.get("requestBody", {}).get("content", {})
    if BODY in body:
        yield from _table(_resolved(body[BODY]["schema"]))
    elif body:
        yield f"The body is a file ({', '.join(body)}).\n"
    content = operation["responses"]["200"]["content"]
    kinds = [_type(each["schema"]) if kind == BODY else f"`{kind}`" for kind, each in content.items()]
    errors = [status for status in operation["responses"] if status != "200"]
    yield f"Answer: {' or '.join(kinds)}. [Errors](#errors): {', '.join(errors)}.\n"


def _errors() -> dict[str, str]:
    """Return the meaning of each status of an error."""
    operations = [each for item in DOCUMENT["paths"].values() for name, each in item.items() if name != "parameters"]
    found: dict[str, str] = {}
    for operation in operations:
        for status, answer in operation["responses"].items():
            if status != "200" and "$ref" in answer:
                found[status] = _text(_resolved(answer)["description"])
    return found


def _table(schema: dict[str, Any]) -> Iterator[str]:
    """Yield the table of the fields of an object."""
    yield "| field | type | default | meaning |\n| --- | --- | --- | --- |"
    for name, field in _fields(schema).items():
        default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
        meaning = field.get("description", _resolved(field).get("description", ""))
        yield f"| `{name}` | {_type(field)} | {default} | {_text(meaning)} |"
    yield ""


def _fields(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the fields of an object by name."""
    found = dict(schema.get("properties", {}))
    for part in reversed(schema.get("allOf", [])):
        found |= _fields(_resolved(part))
    return found


def _resolved(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of the document, or the part to which it refers."""
    found: Any = part
    if "$ref" in part:
        found = DOCUMENT
        for name in part["$ref"].removeprefix("#/").split("/"):
            found = found[name]
    assert isinstance(found, dict)
    return found


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a value in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if _fields(_resolved(schema)) else _type(_resolved(schema))
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else [each for each in schema["enum"] if each is not None]
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if "anyOf" in schema and "type" not in schema:
        return " or ".join(dict.fromkeys(_type(each) for each in schema["anyOf"] if each != {"type": "null"}))
    if "allOf" in schema:
        return _type(schema["allOf"][0])
    kinds = schema.get("type", "any value")
    named = [_kind(kind, schema) for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind != "null"]
    return " or ".join(named) or "null"


def _kind(kind: str, schema: dict[str, Any]) -> str:
    """Return one type of a schema in words, with its range."""
    if kind == "array":
        items = schema["items"].get("allOf", [schema["items"]])[0]
        words = items["type"] + "s" if isinstance(items.get("type"), str) else _type(items) if "$ref" in items else ""
        most = f", at most {schema['maxItems']:,}" if "maxItems" in schema else ""
        return f"list{' of ' * bool(words)}{words}{most}"
    low, high = schema.get("minimum"), schema.get("maximum")
    ranges = [
        f"{low:,} to {high:,}" if low is not None and high is not None else "",
        f"at least {low:,}" if low is not None and high is None else "",
        f"above {schema['exclusiveMinimum']}" if schema.get("exclusiveMinimum", -1e300) > -1e300 else "",
        f"at most {high}" if low is None and high in (0, 1) else "",
    ]
    words = {"boolean": "true or false"}.get(kind, kind)
    return ", ".join([words, *filter(None, ranges)])


def _text(text: str) -> str:
    """Return a text as Markdown on one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return escaped.replace("|", "&#124;").replace("\\", "\\\\").replace("*", "\\*").replace("_", "\\_")
