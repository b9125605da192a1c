"""Requests that schemathesis derives from openapi.json: no fault of the server, no answer that is not declared."""

import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import positive_data_acceptance

from tests.helpers.openapi import DOCUMENT
from tests.helpers.serving import served, tiny
from tests.helpers.tiers import examples
from timemix.tokenizers.character import ByteTokenizer

EXAMPLES = 200
"""Number of random requests of each operation."""
NOT_CHECKED = [positive_data_acceptance]
"""The schemas do not state the vocabulary of a model, so that the server refuses some values that they accept."""

pytestmark = pytest.mark.slow
description = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def server():
    with served([tiny(tokenizer=ByteTokenizer())]) as running:
        yield running


@description.parametrize()
@examples(EXAMPLES, suppress_health_check=list(HealthCheck))
def test_each_answer_is_declared(case, server):
    if isinstance(case.body, dict):
        if isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        # A million tokens take hours.
        for name, most in (("max_tokens", 6), ("max_completion_tokens", 6), ("n", 3)):
            value = case.body.get(name)
            if isinstance(value, int | float) and most < value <= 1_000_000:
                case.body[name] = most
    case.call_and_validate(base_url=server.url, excluded_checks=NOT_CHECKED)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_declared(path, server):
    prompt = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    body = prompt | {"max_tokens": 3, "stream": True}
    case = description[path]["POST"].Case(body=body, media_type="application/json")
    response = case.call_and_validate(base_url=server.url, excluded_checks=NOT_CHECKED)
    assert response.headers["content-type"][0].startswith("text/event-stream")
